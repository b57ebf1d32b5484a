"""A store and a folder of text; property tests are derandomised and have no deadline on a busy machine."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import load

from llmos_cli.data.layout import Split, shard_entries
from llmos_cli.formats.manifest import Manifest
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.objects import read_file

settings.register_profile("llmos", derandomize=True, database=None, deadline=None, max_examples=100)
settings.load_profile("llmos")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init_store(tmp_path / ".llmos")
    with open_store(tmp_path / ".llmos") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small documents in a folder of their own."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat sat on the mat\n" * 40)
    (folder / "b.md").write_text("# Title\n\nWörter, 你好。\n" * 30)
    (folder / "sub").mkdir()
    (folder / "sub" / "c.py").write_text("def f(x):\n    return x + 1\n" * 30)
    return folder


DocumentsOf = Callable[..., list[np.ndarray]]


@pytest.fixture
def documents_of(store: Store) -> DocumentsOf:
    """What a tensor of a packed dataset holds of each document, put together by the letter of layout.py, by other code
    than the reader's."""

    def documents(manifest: Manifest, split: Split = "train", tensor: str = "tokens") -> list[np.ndarray]:
        pieces: dict[int, list[tuple[int, np.ndarray]]] = {}
        lengths: list[int] = []
        for entry in shard_entries(manifest, split):
            shard = load(read_file(store, entry))
            lengths += shard["documents"][:, 3].tolist()
            column, last = 0, -1
            for row, document, offset, length in shard["segments"].tolist():
                column = column if row == last else 0
                pieces.setdefault(document, []).append((offset, shard[tensor][row, column : column + length]))
                column, last = column + length, row
        found = []
        for number, length in enumerate(lengths):
            parts = sorted(pieces.pop(number, []), key=lambda part: part[0])
            ends = np.cumsum([0, *(part.size for _, part in parts)])
            assert [offset for offset, _ in parts] == ends[:-1].tolist()
            assert ends[-1] == length
            found.append(np.concatenate([np.empty(0, np.int64), *(part for _, part in parts)]))
        assert not pieces
        return found

    return documents

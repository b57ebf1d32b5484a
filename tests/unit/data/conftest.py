"""A store and a folder of text; property tests are derandomised and have no deadline on a busy machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from llmos_cli.store.local import Store, init_store, open_store

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

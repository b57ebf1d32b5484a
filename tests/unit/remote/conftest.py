"""Stores and remotes to exchange between, small and quick to make."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.app import main
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange.pull import PullResult, execute_pull, plan_pull
from llmos_cli.remote.exchange.push import PushResult, execute_push, plan_push
from llmos_cli.remote.open import Remote
from llmos_cli.remote.transports.folder import FolderTransport
from llmos_cli.store.fsck.fsck import check
from llmos_cli.store.handle import Store
from llmos_cli.store.local import init_store, open_store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.store.transaction import begin

Run = Callable[..., tuple[int, Any, str]]


@dataclass(frozen=True)
class Exchange:
    """The verbs of this room as tests use them: on names, without progress."""

    folder: Path
    open_stores: ExitStack

    def store(self, name: str) -> Store:
        """A store in the folder of that name, made when first asked for; for a remote, the store that it is."""
        init_store(self.folder / name)
        return self.open_stores.enter_context(open_store(self.folder / name))

    def remote(self, name: str = "nas") -> Remote:
        """A remote, which need not be there yet."""
        return Remote(name, FolderTransport(self.folder / name))

    def noise(self, seed: int, size: int = 300_000) -> bytes:
        return random.Random(seed).randbytes(size)

    def commit(self, store: Store, ref: str, **files: bytes) -> ObjectId:
        """Store files under a ref."""
        with begin(store, purpose="test", ref=parse_ref(ref)) as tx:
            entries = tuple(tx.add_bytes(f"{name}.bin", data) for name, data in files.items())
            return tx.commit(Manifest("files", entries), message=f"add {', '.join(files)}").id

    def push(self, store: Store, *refs: str, to: str = "nas", force: bool = False) -> PushResult:
        plan = plan_push(store, self.remote(to), _names(refs), force=force)
        return execute_push(store, self.remote(to), plan, Silent())

    def pull(self, store: Store, *refs: str, source: str = "nas", force: bool = False) -> PullResult:
        plan = plan_pull(store, self.remote(source), _names(refs), force=force)
        return execute_pull(store, self.remote(source), plan, Silent())

    def value(self, store: Store, ref: str) -> ObjectId | None:
        entry = read_ref(store, parse_ref(ref))
        return entry.id if entry else None

    def files(self, store: Store, ref: str) -> dict[str, bytes]:
        """The files of a ref, read back in full."""
        entry = read_ref(store, parse_ref(ref))
        assert entry
        return {item.path: read_file(store, item) for item in read_manifest(store, entry.id).files}

    def problems(self, store: Store) -> list[str]:
        """What a full check of the store finds wrong."""
        return [problem.what for problem in check(store, quick=False, progress=Silent()).problems]

    def packs(self, name: str = "nas") -> list[Path]:
        return sorted((self.folder / name).glob("packs/*/*.pack"))

    def leftovers(self, name: str) -> list[Path]:
        return sorted((self.folder / name).rglob(".tmp-*"))


def _names(refs: tuple[str, ...]) -> list[RefName] | None:
    """No names: all refs."""
    return [parse_ref(ref) for ref in refs] or None


@pytest.fixture
def exchange(tmp_path: Path) -> Iterator[Exchange]:
    with ExitStack() as stack:
        yield Exchange(tmp_path, stack)


@pytest.fixture
def overwrite() -> Callable[[Path, bytes], None]:
    """Replace a pack's bytes behind everybody's back; packs are read-only."""

    def write(path: Path, data: bytes) -> None:
        path.chmod(0o644)
        path.write_bytes(data)

    return write


def model_files(seed: int, **other: bytes) -> dict[str, bytes]:
    """The files of a model of twelve layers; `other` gives some tensors other bytes."""
    tensors = [(f"model.layers.{number}.w", "U8", (300_000,)) for number in range(12)]
    data = [other.get(f"w{number}") or random.Random(seed + number).randbytes(300_000) for number in range(12)]
    return {"model.safetensors": encode_header(tensors, {}) + b"".join(data), "config.json": b'{"model_type": "llama"}'}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command line, in the store `reader`, beside the remote `nas` that `tiny` and `tuned` were pushed to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLMOS_STORE", "writer")

    def run(*words: str) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = main(list(words))
        out, err = capfd.readouterr()
        return code, json.loads(out) if "--json" in words and out else out, err

    assert run("init", "writer")[0] == 0
    assert run("remote", "add", "nas", "nas")[0] == 0
    for name, files in (("tiny", model_files(1)), ("tuned", model_files(1, w3=random.Random(99).randbytes(300_000)))):
        (tmp_path / name).mkdir()
        for path, data in files.items():
            (tmp_path / name / path).write_bytes(data)
        assert run("add", name, name)[0] == 0
    assert run("push", "nas", "--all")[0] == 0
    monkeypatch.setenv("LLMOS_STORE", "reader")
    assert run("init", "reader")[0] == 0
    assert run("remote", "add", "nas", "nas")[0] == 0
    return run


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The bytes read from folders that are remotes since the last question."""
    counts: list[int] = []
    read = FolderTransport.read

    def counting(self: FolderTransport, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = read(self, key, start, end)
        counts.append(len(data))
        return data

    monkeypatch.setattr(FolderTransport, "read", counting)

    def since() -> int:
        total = sum(counts)
        counts.clear()
        return total

    return since

"""Stores and remotes to exchange between, small and quick to make."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.remote.folder import FolderTransport
from llmos_cli.remote.open import Remote
from llmos_cli.store.handle import Store
from llmos_cli.store.local import init_store, open_store
from llmos_cli.store.transaction import begin

MakeStore = Callable[[str], Store]


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[MakeStore]:
    """Stores by name, made when first asked for."""
    with ExitStack() as stack:

        def make(name: str) -> Store:
            init_store(tmp_path / name)
            return stack.enter_context(open_store(tmp_path / name))

        yield make


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    return make_store("here")


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    """A remote that is not there yet."""
    return Remote("nas", FolderTransport(tmp_path / "nas"))


def noise(seed: int, size: int = 300_000) -> bytes:
    return random.Random(seed).randbytes(size)


def commit(store: Store, ref: str, **files: bytes) -> ObjectId:
    """Store files under a ref."""
    with begin(store, purpose="test", ref=parse_ref(ref)) as tx:
        entries = tuple(tx.add_bytes(f"{name}.bin", data) for name, data in files.items())
        return tx.commit(Manifest("files", entries), message=f"add {', '.join(files)}").id

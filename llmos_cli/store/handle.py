"""The handle of an open store: where its parts lie, its settings, its index.

Every function of the store takes it first.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from llmos_cli.config import Config
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.layout import PACKS, REFS, pack_key
from llmos_cli.formats.pack import Entry
from llmos_cli.progress import Progress
from llmos_cli.store.packs.index import Index


class Elsewhere(Protocol):
    """Another place where objects can be read that the store lacks. What comes from there is not kept. All methods may
    be called from several threads."""

    @property
    def label(self) -> str:
        """What messages call it."""

    def entries(self, oid: ObjectId) -> Sequence[Entry]:
        """How an object lies there, the copy that is read first before the others; none if it is not there."""

    def read(self, oid: ObjectId) -> tuple[Entry, memoryview] | None:
        """An object's plain bytes, proven by its id; None if it is not there. Raises Damaged."""


class Store:
    """An open store; a context manager."""

    def __init__(self, root: Path, config: Config, progress: Progress) -> None:
        self.root = root
        self.config = config
        self.progress = progress
        self.packs = root / PACKS
        self.refs = root / REFS
        self.logs = root / "logs"
        self.leases = root / "leases"
        self.trash = root / "trash"
        self.tmp = root / "tmp"
        self.index = Index(root / "index.db")
        self.elsewhere: tuple[Elsewhere, ...] = ()  # where reads go on, in this order, when the store lacks an object

    def pack_path(self, name: ObjectId) -> Path:
        return self.root / pack_key(name)

    def close(self) -> None:
        self.index.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

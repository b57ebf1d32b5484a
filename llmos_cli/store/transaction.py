"""Transactions: the one way to make something visible. Chunks, then the manifest, then the ref; a crash anywhere
leaves the old state plus unreachable packs, which gc knows.

A transaction that finds a chunk in the store does not write it again. Before it publishes, it makes sure that every
chunk its manifest names is still there and freshens the packs that hold them: a gc may have run meanwhile.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

from llmos_cli.errors import LlmosError
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.manifest import FileEntry, Manifest, encode_manifest
from llmos_cli.formats.names import RefName, check_path
from llmos_cli.progress import Progress, Silent, Task
from llmos_cli.store.gc.reach import objects_of
from llmos_cli.store.handle import Store
from llmos_cli.store.intake.adopt import KNOWN, Adoption, adopt_path
from llmos_cli.store.intake.bases import Base, open_base
from llmos_cli.store.intake.ingest import Tensor, put_path, put_stream, put_tensors, status_of
from llmos_cli.store.intake.statcache import Seen, recall, remember
from llmos_cli.store.leases import hold
from llmos_cli.store.packs.packs import secure
from llmos_cli.store.packs.pipeline import Pipeline, open_pipeline
from llmos_cli.store.refs.point import make_reachable
from llmos_cli.store.refs.refs import read_ref, update_ref

__all__ = ["Commit", "Tensor", "Transaction", "begin"]


@dataclass(frozen=True)
class Commit:
    """What a transaction made. `size` is the plain bytes of the manifest's files, `stored` the bytes the store grew by,
    `reused` the plain bytes that were there already, `as_delta` those stored as deltas, `adopted` those that stay in
    adopted files; `unchanged` means the ref pointed to this very id before. `adoptions` says what was done with each
    file that was to be adopted."""

    id: ObjectId
    ref: RefName | None
    size: int
    stored: int
    reused: int
    as_delta: int
    unchanged: bool
    adopted: int = 0
    adoptions: tuple[Adoption, ...] = ()


class Transaction:
    """Add files, then commit once. Made by `begin`. Tensors rest on the `base` where that saves space: unless it is
    set, on what the ref points to now."""

    def __init__(
        self, store: Store, ref: RefName | None, expected: ObjectId | None, pipeline: Pipeline, task: Task
    ) -> None:
        self.store = store
        self.ref = ref
        self.expected = expected
        self._pipeline = pipeline
        self._task = task
        self._seen: list[Seen] = []
        self._adoptions: list[Adoption] = []

    @cached_property
    def base(self) -> Base | None:
        if self.expected is None:
            return None
        try:
            return open_base(self.store, self.expected)
        except LlmosError:
            return None

    def add_path(self, name: str, path: Path, *, rehash: bool = False, adopt: bool = False) -> FileEntry:
        """Store a regular file under a name. One that was stored before and is untouched since is not read again,
        unless `rehash`. With `adopt`, without a second copy of its bytes where that can be."""
        check_path(name)
        status = status_of(path)
        known = None if rehash else recall(self.store, name, path)
        if known:
            self._task.advance(known.size)
            self._pipeline.written.reused += known.size
            if adopt:
                self._adoptions.append(Adoption(path, KNOWN, known.size))
            return known
        entry = self._adopt(name, path) if adopt else None
        entry = entry or put_path(self._pipeline, name, path, self._task, self.base)
        self._seen.append((name, path, status, entry))
        return entry

    def _adopt(self, name: str, path: Path) -> FileEntry | None:
        entry, adoption = adopt_path(self.store, self._pipeline, name, path, self._task)
        self._adoptions.append(adoption)
        return entry

    def add_bytes(self, name: str, data: bytes) -> FileEntry:
        """Store a small file from memory."""
        return put_stream(self._pipeline, name, io.BytesIO(data), self._task)

    def add_stream(self, name: str, stream: BinaryIO) -> FileEntry:
        """Store what a stream gives until its end."""
        return put_stream(self._pipeline, name, stream, self._task)

    def add_tensors(self, name: str, tensors: Sequence[Tensor], *, metadata: dict[str, str] | None = None) -> FileEntry:
        """Store a safetensors file of `tensors` in this order, one in memory at a time."""
        return put_tensors(self._pipeline, name, tensors, metadata or {}, self._task, self.base)

    def commit(self, manifest: Manifest, *, message: str) -> Commit:
        """Publish the manifest and move the ref; raises Conflict if the ref moved since `begin`."""
        data = encode_manifest(manifest)
        oid = object_id(data)
        if oid not in self.store.index.manifests(str(oid)):
            self._pipeline.put_manifest(oid, data)
        written = self._pipeline.finish()
        objects = set(objects_of(oid, manifest))
        fresh, ref, expected = set(written.packs), self.ref, self.expected
        if ref is None:
            secure(self.store, objects | self.store.index.bases(objects), fresh=fresh)
        else:
            update = partial(update_ref, self.store, ref, oid, expected=expected, message=message)
            make_reachable(self.store, objects, fresh, update, expected=expected)
        remember(self.store, self._seen)
        return Commit(
            oid,
            self.ref,
            manifest.size,
            written.stored,
            written.reused,
            written.as_delta,
            ref is not None and expected == oid,
            written.adopted,
            tuple(self._adoptions),
        )


@contextmanager
def begin(
    store: Store,
    *,
    purpose: str,
    ref: RefName | None = None,
    progress: Progress | None = None,
    total: int | None = None,
) -> Iterator[Transaction]:
    """Open a transaction; `ref` is remembered as it is now. Leaving the block without a commit leaves nothing visible.

    With `progress`, one bar labelled `purpose` counts plain bytes up to `total`.
    """
    current = read_ref(store, ref) if ref else None
    with ExitStack() as stack:
        stack.enter_context(hold(store, purpose, [], writes=True))
        task = stack.enter_context((progress or Silent()).task(purpose, total=total))
        pipeline = stack.enter_context(open_pipeline(store))
        yield Transaction(store, ref, current.id if current else None, pipeline, task)

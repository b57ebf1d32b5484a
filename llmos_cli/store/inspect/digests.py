"""SHA-256 of whole files, as hubs and OCI registries name them; each is computed once and noted in the index.

A digest is noted under the ids of the file's chunks, not under its name, and every chunk is proven by its id while it
is read: so a note holds for whatever file has these chunks, and for no other bytes.
"""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.manifest import Chunk, FileEntry
from llmos_cli.progress import Progress, Task
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import read_object_into

_FACT: Final = "sha256"
_BYTES: Final = 32
_AHEAD: Final = 3  # chunks that are read while one is hashed
_WORKERS: Final = min(os.cpu_count() or 1, 16)


def sha256_files(store: Store, files: Sequence[FileEntry], progress: Progress) -> dict[str, str]:
    """The hex digest of each file by its path; raises Damaged for a chunk that cannot be read."""
    keys = {entry.path: _key(entry) for entry in files}
    noted = store.index.facts(_FACT, set(keys.values()))
    known = {key: value.hex() for key, value in noted.items() if len(value) == _BYTES}
    missing = {keys[entry.path]: entry for entry in files if keys[entry.path] not in known}
    if missing:
        with progress.task("hashing", total=sum(entry.size for entry in missing.values())) as task:
            for key, digest in _hash_all(store, missing, task):
                store.index.add_facts(_FACT, [(key, digest)])
                known[key] = digest.hex()
    return {path: known[key] for path, key in keys.items()}


def _key(entry: FileEntry) -> ObjectId:
    return object_id(b"".join(chunk.id for chunk in entry.chunks))


def _hash_all(store: Store, files: Mapping[ObjectId, FileEntry], task: Task) -> Iterator[tuple[ObjectId, bytes]]:
    """Files side by side, each by one thread, since SHA-256 has an order; what is hashed next is read meanwhile."""
    stop = threading.Event()
    with ThreadPoolExecutor(_WORKERS, "read") as readers, ThreadPoolExecutor(_WORKERS, "hash") as hashers:
        pending = {key: hashers.submit(_hash, store, entry, readers, task, stop) for key, entry in files.items()}
        try:
            for key, future in pending.items():
                yield key, future.result()
        finally:
            stop.set()
            hashers.shutdown(cancel_futures=True)


def _hash(store: Store, entry: FileEntry, readers: ThreadPoolExecutor, task: Task, stop: threading.Event) -> bytes:
    digest = hashlib.sha256(usedforsecurity=False)
    waiting: deque[Future[bytearray]] = deque()
    for chunk in entry.chunks:
        if stop.is_set():
            break
        waiting.append(readers.submit(_read, store, chunk))
        if len(waiting) > _AHEAD:
            _feed(digest, waiting.popleft().result(), task)
    for future in waiting:
        _feed(digest, future.result(), task)
    return digest.digest()


def _feed(digest: "hashlib._Hash", data: bytearray, task: Task) -> None:
    digest.update(data)
    task.advance(len(data))


def _read(store: Store, chunk: Chunk) -> bytearray:
    plain = bytearray(chunk.size)
    read_object_into(store, chunk.id, memoryview(plain), verify_id=True)
    return plain

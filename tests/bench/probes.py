"""What the store's benchmark measures inside a process: work without start-up and without a disk in between."""

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos_cli.formats import codec, limits
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.names import RefName
from llmos_cli.formats.safetensors import read_table
from llmos_cli.progress import Silent
from llmos_cli.store.intake.add import execute_add, plan_add
from llmos_cli.store.local import open_store
from llmos_cli.store.packs.index import Location
from llmos_cli.store.packs.objects import read_manifest, read_object_into
from llmos_cli.store.refs.resolve import resolve

FILE = "model.safetensors"


def seconds(run: Callable[[], object], rounds: int) -> float:
    """The median of several runs after one that does not count."""
    run()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def add_again(store: Path, model: Path, name: str) -> float:
    """Seconds of adding a file that is stored already, in an open store."""
    with open_store(store) as opened:
        return seconds(lambda: execute_add(opened, plan_add([model]), RefName(name, "latest"), Silent()), 9)


def hash_speed(model: Path) -> float:
    """Bytes a second of reading and hashing a cached file on every core, chunk by chunk."""
    size = model.stat().st_size

    def chunk(start: int) -> None:
        with model.open("rb", buffering=0) as file:
            object_id(os.pread(file.fileno(), limits.CHUNK_BYTES, start))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return size / seconds(lambda: list(pool.map(chunk, range(0, size, limits.CHUNK_BYTES))), 3)


@dataclass(frozen=True)
class Chain:
    """Seconds of reading 4 MiB, stored as planes and as a delta at the end of the deepest chain there is."""

    plain: float
    delta: float
    depth: int


def chain(store: Path, name: str, base: str) -> Chain:
    with open_store(store) as opened:

        def of(ref: str) -> list[Location]:
            files = read_manifest(opened, resolve(opened, ref).id).files
            chunks = [chunk for file in files for chunk in file.chunks if chunk.size == limits.CHUNK_BYTES]
            return [opened.index.locate(chunk.id)[0] for chunk in chunks]

        out = memoryview(bytearray(limits.CHUNK_BYTES))

        def read(ids: list[ObjectId]) -> float:
            return statistics.median(seconds(lambda oid=oid: read_object_into(opened, oid, out), 5) for oid in ids)

        deltas = [location.entry for location in of(name) if location.entry.depth]
        depth = max(entry.depth for entry in deltas)
        planes = [location.entry.id for location in of(base) if location.entry.codec == codec.PLANES]
        deepest = [entry.id for entry in deltas if entry.depth == depth]
        read(deepest[:20])  # until whatever is compiled on the way is
        return Chain(read(planes[:20]), read(deepest[:20]), depth)


def plain_bytes(store: Path, refs: list[str]) -> int:
    with open_store(store) as opened:
        return sum(read_manifest(opened, resolve(opened, ref).id).size for ref in refs)


def changed_bytes(before: Path, after: Path) -> int:
    """Of the tensors that differ between two models."""
    changed = 0
    with (before / FILE).open("rb") as old, (after / FILE).open("rb") as new:

        def read(start: int, end: int) -> bytes:
            return os.pread(new.fileno(), end - start, start)

        for tensor in read_table(read, (after / FILE).stat().st_size, FILE):
            size = tensor.end - tensor.start
            if read(tensor.start, tensor.end) != os.pread(old.fileno(), size, tensor.start):
                changed += size
    return changed


@dataclass(frozen=True)
class Load:
    """Seconds until every tensor is there, and until every page of them has been read once."""

    there: float
    read: float


def load_stored(store: Path, name: str) -> Load:
    """All tensors of a stored model into torch."""
    from llmos_cli.models.weights import load_state_dict

    with open_store(store) as opened:
        manifest = read_manifest(opened, resolve(opened, name).id)
        return _loaded(lambda: load_state_dict(opened, manifest))


def load_plain(model: Path) -> Load:
    """The same from the plain file, as safetensors does it."""
    from safetensors.torch import load_file

    return _loaded(lambda: load_file(model / FILE))


def load_one(store: Path, name: str) -> tuple[float, int, int]:
    """Seconds of reading the largest tensor alone, its bytes, and the bytes that this takes from the disk."""
    from llmos_cli.models.weights import read_tensor
    from llmos_cli.store.inspect.tensors import tensor_table
    from llmos_cli.store.packs.objects import open_file

    with open_store(store) as opened:
        table = tensor_table(opened, read_manifest(opened, resolve(opened, name).id))
        entry, info = max(table.values(), key=lambda item: item[1].end - item[1].start)
        before = _read_so_far()
        started = time.perf_counter()
        read_tensor(open_file(opened, entry), info)
        return time.perf_counter() - started, info.end - info.start, _read_so_far() - before


def _read_so_far() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def _loaded(load: Callable[[], dict[str, Any]]) -> Load:
    import torch  # not at the top: what the processes of a benchmark take is counted from what it takes itself

    started = time.perf_counter()
    state = load()
    there = time.perf_counter() - started
    for tensor in state.values():
        tensor.view(-1).view(torch.uint8)[::4096].sum()
    return Load(there, time.perf_counter() - started)

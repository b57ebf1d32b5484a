"""What do the store's verbs cost on a store of a million chunks, 5,000 manifests and 2,000 refs?

python -m tests.bench.scale [--chunks 1000000] [--manifests 5000] [--refs 2000] [--packs 5000] [--rounds 5] [--dir DIR]

Each verb is a process of its own, start-up included. With --dir the store is kept there and used again.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import Process
from pathlib import Path

from llmos_cli.formats import codec
from llmos_cli.formats.frame import CHUNK, MANIFEST, encode_header, new_frame
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest, encode_manifest
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry, encode_entry, entry_name
from llmos_cli.store.handle import Store
from llmos_cli.store.local import init_store, open_store
from llmos_cli.store.packs.packs import PackWriter
from tests.bench.measure import print_machine

CHUNKS_PER_FILE = 20
SHARED_CHUNKS = 20  # what a manifest has in common with the one before it
TAGS_PER_NAME = 10
LIMITS = {
    "ls": (0.3, 0),
    "show REF": (0.3, 0),
    "tag REF NEW": (0.3, 0),
    "gc --dry-run": (20, 800e6),
    "fsck --quick": (30, 0),
    "fsck --reindex": (120, 0),
}


@dataclass(frozen=True)
class Size:
    chunks: int
    manifests: int
    refs: int
    packs: int


@dataclass(frozen=True)
class Cost:
    """Wall and processor seconds and the peak of resident memory of one process."""

    wall: float
    cpu: float
    memory: int


def build(root: Path, size: Size) -> None:
    """Write the packs as that many transactions would have, and the refs' moves as plain files: nobody waits for a
    disk to keep what is thrown away."""
    init_store(root)
    started = time.perf_counter()
    with open_store(root) as store:
        manifests = _write_packs(store, size)
        _write_refs(store, manifests, size.refs)
    print(f"built in {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _write_packs(store: Store, size: Size) -> list[ObjectId]:
    generator = random.Random(0)
    per_pack = max(1, size.chunks // size.packs)
    per_manifest = size.chunks // size.manifests
    manifests: list[ObjectId] = []
    shared: list[Chunk] = []
    writer = PackWriter(store.tmp)
    for number in range(size.manifests):
        own: list[Chunk] = []
        for _ in range(per_manifest):
            plain = generator.randbytes(generator.randrange(16, 200))
            own.append(Chunk(_append(writer, CHUNK, plain), len(plain)))
            if len(writer.entries) >= per_pack:
                writer.publish(store)
                writer = PackWriter(store.tmp)
        chunks = shared + own
        files = tuple(
            FileEntry(f"part-{at // CHUNKS_PER_FILE:05}", tuple(chunks[at : at + CHUNKS_PER_FILE]))
            for at in range(0, len(chunks), CHUNKS_PER_FILE)
        )
        manifest = Manifest("files", files, meta={"number": number})
        manifests.append(_append(writer, MANIFEST, encode_manifest(manifest)))
        shared = own[:SHARED_CHUNKS]
        if number % 500 == 0:
            print(f"{number} manifests", file=sys.stderr)
    writer.publish(store)
    return manifests


def _append(writer: PackWriter, kind: int, plain: bytes) -> ObjectId:
    oid = object_id(plain)
    encoded = codec.encode(memoryview(plain), codec.OPAQUE)
    frame = new_frame(kind, oid, len(plain), encoded)
    writer.append(frame, encode_header(frame), encoded.parts)
    return oid


def _write_refs(store: Store, manifests: Sequence[ObjectId], refs: int) -> None:
    """Every manifest is the value of some ref once: the first half of the refs has moved never, the rest often."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    values: list[list[ObjectId]] = [[oid] for oid in manifests[:refs]]
    for number, oid in enumerate(manifests[refs:]):
        values[refs // 2 + number % (refs - refs // 2)].append(oid)
    for number, moves in enumerate(values):
        ref = RefName(f"model-{number // TAGS_PER_NAME:05}", f"v{number % TAGS_PER_NAME}")
        folder = store.refs / ref.name / ref.tag
        folder.mkdir(parents=True)
        previous: ObjectId | None = None
        for at, oid in enumerate(moves, 1):
            entry = RefEntry(ref, at, oid, previous, now, "somebody@somewhere", "made for the benchmark")
            (folder / entry_name(at)).write_bytes(encode_entry(entry))
            previous = oid


def cost(command: Sequence[str], allowed: tuple[int, ...] = (0,)) -> Cost:
    """Run a command to its end. This process must be small: a child's peak of memory starts with its parent's."""
    started = time.perf_counter()
    child = os.posix_spawn(
        command[0],
        command,
        {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},  # as installed
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, used = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status) not in allowed:
        raise SystemExit(f"{' '.join(command)} failed: {os.waitstatus_to_exitcode(status)}")
    return Cost(time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def measure(root: Path, size: Size, rounds: int, only: str | None) -> None:
    llmos = [str(Path(sys.executable).with_name("llmos")), "-q", "--store", str(root)]
    verbs = {
        "--version": (rounds, ["--version"]),
        "ls": (rounds, ["ls"]),
        "show REF": (rounds, ["show", f"model-{size.refs // 2 // TAGS_PER_NAME:05}:v1"]),
        "tag REF NEW": (rounds, ["tag", "model-00000:v1"]),
        "du": (min(rounds, 3), ["du"]),
        "gc --dry-run": (min(rounds, 3), ["gc", "--dry-run"]),
        "fsck --quick": (min(rounds, 3), ["fsck", "--quick"]),
        "fsck --quick --reindex": (1, ["fsck", "--quick", "--reindex"]),
        "fsck --reindex": (1, ["fsck", "--reindex"]),
    }
    print(f"\n{'':24}{'median':>10}{'cpu':>10}{'peak RSS':>10}   limit")
    for name, (times, words) in verbs.items():
        if only and not name.startswith(only):
            continue
        taken = []
        for number in range(times):
            more = [f"new{os.getpid()}-{number}"] if words[0] == "tag" else []
            taken.append(cost([*llmos, *words, *more]))
        wall, cpu = statistics.median(item.wall for item in taken), statistics.median(item.cpu for item in taken)
        memory = max(item.memory for item in taken)
        seconds, most = LIMITS.get(name, (0, 0))
        limit = f"{seconds:g} s" if seconds else ""
        if seconds:
            limit += f", {most / 1e6:.0f} MB" if most else ""
            limit += "" if wall <= seconds and (not most or memory <= most) else "   MISSED"
        print(f"{name:24}{wall:9.3f}s{cpu:9.3f}s{memory / 1e6:7.0f} MB   {limit}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--manifests", type=int, default=5_000)
    parser.add_argument("--refs", type=int, default=2_000)
    parser.add_argument("--packs", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="measure only the verbs that start with this")
    parser.add_argument("--dir", type=Path, help="keep the store here, and use the one that is here")
    options = parser.parse_args()
    size = Size(options.chunks, options.manifests, options.refs, options.packs)
    print_machine()
    with tempfile.TemporaryDirectory(prefix="llmos-scale-") as scratch:
        root = options.dir or Path(scratch) / "store"
        if not (root / "FORMAT").exists():
            builder = Process(target=build, args=(root, size))
            builder.start()
            builder.join()
            if builder.exitcode:
                raise SystemExit(builder.exitcode)
        print(f"{size.chunks:,} chunks, {size.manifests:,} manifests, {size.refs:,} refs, {size.packs:,} packs")
        measure(root, size, options.rounds, options.only)


if __name__ == "__main__":
    main()

"""Giving files back byte for byte: a plan that refuses to overwrite, then parallel decoding straight into place."""

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmos_cli.errors import NoSpace, Unsafe, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest
from llmos_cli.formats.names import check_paths
from llmos_cli.progress import Progress, Task
from llmos_cli.store.disk.durable import Destination, flush
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import read_object_into

_FLUSH_BYTES: Final = 32 * limits.MiB
_WORKERS: Final = min(os.cpu_count() or 1, 16)
# What a folder of these names holds is obeyed by whoever runs git or llmos below it; no manifest has a say in that.
_COMMANDING: Final = {".git", ".llmos"}
_buffers = threading.local()


@dataclass(frozen=True)
class CheckoutPlan:
    target: Path
    files: tuple[FileEntry, ...]
    total_bytes: int


@dataclass(frozen=True)
class CheckoutResult:
    files: int
    bytes: int


def plan_checkout(manifest: Manifest, target: Path, *, force: bool) -> CheckoutPlan:
    """Decide what a checkout would write; raises Unsafe, naming the first file, if something is in the way.

    With `force`, files are replaced; a folder, link or device in a file's place is refused even then.
    """
    check_paths(entry.path for entry in manifest.files)
    for entry in manifest.files:
        if not _COMMANDING.isdisjoint(part.casefold() for part in entry.path.split("/")):
            raise Unsafe(
                f"{entry.path!r} would be settings or hooks of git or llmos in {target}: not written",
                hint="see what else is in it: llmos show REF --files",
            )
    if target.exists() or target.is_symlink():
        with Destination(target) as destination:
            for entry in manifest.files:
                kind = destination.kind(entry.path)
                if kind == "other":
                    raise Unsafe(f"{target / entry.path} exists and is not a regular file")
                if kind and not force:
                    raise Unsafe(f"{target / entry.path} exists", hint="replace files there: --force")
    return CheckoutPlan(target, manifest.files, manifest.size)


def execute_checkout(store: Store, plan: CheckoutPlan, progress: Progress) -> CheckoutResult:
    """Write the planned files; each appears whole or not at all."""
    with (
        progress.task("checking out", total=plan.total_bytes) as task,
        Destination(plan.target) as destination,
        ThreadPoolExecutor(_WORKERS, "decode") as workers,
    ):
        _check_space(plan)
        for entry in plan.files:
            with destination.replace(entry.path) as fd:
                _write_file(store, entry, fd, workers, task)
        destination.sync()
    return CheckoutResult(len(plan.files), plan.total_bytes)


def _write_file(store: Store, entry: FileEntry, fd: int, workers: ThreadPoolExecutor, task: Task) -> None:
    if not entry.chunks:
        return
    os.truncate(fd, entry.size)
    pending: list[Future[None]] = []
    flushes: list[Future[None]] = []
    start, flushed = 0, 0
    with ThreadPoolExecutor(1, "flush") as flusher:  # the disk works while the next chunks are decoded
        try:
            for chunk in entry.chunks:
                pending.append(workers.submit(_write_chunk, store, chunk, fd, start))
                start += chunk.size
                while len(pending) > 4 * _WORKERS:
                    pending.pop(0).result()
                if start - flushed >= _FLUSH_BYTES:
                    flushes.append(flusher.submit(flush, fd))
                    flushed = start
                task.advance(chunk.size)
            for future in pending + flushes:
                future.result()
        finally:  # nobody may write to the descriptor once it is closed: its number will be another file's
            for future in pending:
                future.cancel()
            wait(pending)


def _write_chunk(store: Store, chunk: Chunk, fd: int, start: int) -> None:
    buffer: bytearray | None = getattr(_buffers, "buffer", None)
    if buffer is None:
        buffer = _buffers.buffer = bytearray(limits.CHUNK_BYTES)
    out = memoryview(buffer)[: chunk.size]
    read_object_into(store, chunk.id, out)
    done = 0
    try:
        while done < len(out):
            done += os.pwrite(fd, out[done:], start + done)
    except OSError as exc:
        raise from_os_error(exc, "writing the checkout") from exc


def _check_space(plan: CheckoutPlan) -> None:
    free = os.statvfs(plan.target)
    if free.f_blocks and plan.total_bytes > free.f_bavail * free.f_frsize:  # some file systems do not say
        raise NoSpace(
            f"{plan.target} has {free.f_bavail * free.f_frsize} bytes free, the files need {plan.total_bytes}"
        )

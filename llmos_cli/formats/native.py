"""Chunks to byte planes and back, by compiled code where this machine has it (kernels.py), by numpy where it has not.

numpy splits words at a fourth of the speed and groups them at a tenth. So what this machine compiled is used from the
first chunk on; it is compiled, which takes seconds, once numpy has had as much to do. Both do the same: the trial of
the kernels is computed by numpy before they are kept.
"""

import threading
from collections.abc import Sequence
from typing import Final

from llmos_cli.formats import limits
from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.kernels import Kernels, compile_kernels, load_kernels, scratch_bytes, trial_words

WIDTHS: Final = (1, 2, 4, 8)
_COMPILE_FROM: Final = 128 * limits.MiB  # what numpy groups in a few seconds
_SPLIT_COST: Final = 1 / 16  # of grouping as much


def split(plain: memoryview, width: int, rotated: bool, room: memoryview) -> list[memoryview]:
    """The planes of a run of whole words, as views of `room`, which is as long; a single plane is `plain` itself."""
    if width == 1:
        return [plain]
    kernels = _ready.get(width, len(plain) * _SPLIT_COST) if rotated else None
    if kernels is None:
        from llmos_cli.formats import planes

        return planes.split(plain, width, rotated, room)
    kernels.split(plain, room)
    return _views(room, len(plain), width)


def merge(parts: Sequence[Buffer], rotated: bool, out: memoryview) -> None:
    """The inverse of `split`, written into `out`."""
    _check(parts, out)
    if len(parts) == 1:
        out[:] = parts[0]
        return
    kernels = _ready.get(len(parts), len(out) * _SPLIT_COST) if rotated else None
    if kernels is None:
        from llmos_cli.formats import planes

        planes.merge(parts, rotated, out)
    else:
        kernels.merge(parts, out)


def subtract(
    plain: memoryview, base: Buffer, width: int, grouped: bool, room: memoryview
) -> tuple[list[memoryview], list[int]]:
    """The planes of the differences of a run of whole words to those of a base, as views of `room`, which is as long as
    `plain`, and the index after each group's last word (none if not grouped)."""
    kernels = _ready.get(width, len(plain)) if grouped else None
    if kernels is None:
        from llmos_cli.formats import delta

        return delta.subtract(plain, _like(base, len(plain), width), width, grouped, room)
    ends = kernels.subtract(plain, _like(base, len(plain), width), room)
    return _views(room, len(plain), width), ends


def add(parts: Sequence[Buffer], base: Buffer, grouped: bool, out: memoryview) -> None:
    """The inverse of `subtract`, written into `out`, which must not overlap the base."""
    _check(parts, out)
    kernels = _ready.get(len(parts), len(out)) if grouped else None
    if kernels is None:
        from llmos_cli.formats import delta

        delta.add(parts, _like(base, len(out), len(parts)), grouped, out)
    else:
        kernels.add(parts, _like(base, len(out), len(parts)), out)


def step(before: Buffer, plane: Buffer) -> memoryview:
    """A plane XOR the one before it: from plane to step and back."""
    from llmos_cli.formats import planes

    return planes.step(before, plane)


def _like(base: Buffer, size: int, width: int) -> Buffer:
    """The whole words of a base as `size` bytes: cut, or continued with zeros."""
    known = min(len(base) // width * width, size)
    if known == size:
        return memoryview(base)[:size]
    padded = memoryview(scratch_bytes("base", size))[:size]
    padded[:known] = memoryview(base)[:known]
    padded[known:] = bytes(size - known)
    return padded


def _views(room: memoryview, size: int, width: int) -> list[memoryview]:
    count = size // width
    return [room[plane * count : (plane + 1) * count] for plane in range(width)]


def _check(parts: Sequence[Buffer], out: memoryview) -> None:
    if any(len(part) * len(parts) != len(out) for part in parts):
        raise ValueError("a plane has a byte of every word")


class _Ready:
    """The kernels of a width, or None: where there are none yet, and where they cannot be had."""

    def __init__(self) -> None:
        self._kernels: dict[int, Kernels | None] = {}
        self._final: set[int] = set()  # nothing more will be tried
        self._making = threading.Lock()
        self._cost = 0.0

    def get(self, width: int, cost: float) -> Kernels | None:
        """`cost` is what numpy would have to do, as bytes to group."""
        self._cost += cost
        if width in self._final or (width in self._kernels and self._cost < _COMPILE_FROM):
            return self._kernels[width]
        known = width in self._kernels
        if not self._making.acquire(blocking=not known):  # for a compilation nobody waits: numpy goes on meanwhile
            return self._kernels[width]
        try:
            compiling = self._cost >= _COMPILE_FROM
            if width not in self._kernels or (compiling and width not in self._final):
                self._kernels[width] = found = find_kernels(width, compiling=compiling)
                if found or compiling:
                    self._final.add(width)
        finally:
            self._making.release()
        return self._kernels[width]


_ready = _Ready()


def find_kernels(width: int, *, compiling: bool = True) -> Kernels | None:
    """Kernels that do what numpy does: as this machine keeps them or, if `compiling`, made anew."""
    for make in (load_kernels, _compiled) if compiling else (load_kernels,):
        try:
            kernels = make(width)
        except Exception:  # noqa: BLE001 - whatever keeps them from working, numpy does not need it
            continue
        if kernels is not None:
            return kernels
    return None


def _compiled(width: int) -> Kernels | None:
    return compile_kernels(width, numpy_trial(width))


def numpy_trial(width: int) -> tuple[Buffer, ...]:
    """What the trial of kernels gives by numpy."""
    from llmos_cli.formats import delta, planes

    words, base = trial_words(width)
    grouped, split = (memoryview(bytearray(len(words))) for _ in range(2))
    _, ends = delta.subtract(memoryview(words), base, width, True, grouped)
    planes.split(memoryview(words), width, True, split)
    return grouped, str(ends).encode(), words, split, words

"""The loops that group the words of a delta, compiled: written for numba, loaded without it.

Importing numba and loading what it keeps in a cache of its own costs most of a second of processor time, as much as
adding a small model. So numba compiles once for a machine; the object code is kept beside this module (where that
cannot be, below the user's cache folder) and llvmlite, which numba rests on, loads it in a tenth of that. Nothing read
back is believed before its checksum; delta.py compares every kernel with numpy before it uses it.

Kernels index by what they count in the base themselves, never by a payload: as long as nobody changes the base
meanwhile, every access is within its array.
"""

import contextlib
import ctypes
import json
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmos_cli.formats.ids import Buffer, checksum
from llmos_cli.formats.planes import WORD_TYPES, Array, scratch

LANES: Final = 4  # parts of a chunk that a kernel works on by turns, so that it need not wait for its own counters
BLOCK: Final = 2048  # words of a lane that fit in the nearest cache
TABLE: Final = 256 * LANES
_NAMES: Final = ("count", "scatter", "gather")
_CHECK = struct.Struct("<Q")
_UNUSED: Final = ("numba_gil_ensure", "numba_gil_release", "NRT_MemInfo_call_dtor")  # only errors would lead there

_alive: list[Any] = []  # whatever owns code that is in use


@dataclass(frozen=True)
class Kernels:
    """`count(base, table)`: where the words of each key begin in each lane, as 256 numbers a lane.
    `scatter(words, base, table, planes)`: the differences, grouped, as planes one after the other; afterwards `table`
    says where each key ends. `gather(planes, base, table, words)`: the inverse. All nogil."""

    count: Callable[[Array, Array], None]
    scatter: Callable[[Array, Array, Array, Array], None]
    gather: Callable[[Sequence[Buffer], Array, Array, Array], None]


def load_kernels(width: int) -> Kernels | None:
    """The kernels for words of `width` bytes as this machine compiled them before; None if it has not."""
    import llvmlite.binding as llvm

    for path in _places(width):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        check, body = data[: _CHECK.size], data[_CHECK.size :]
        if len(check) == _CHECK.size and _CHECK.unpack(check)[0] == checksum(body):
            head, _, code = body.partition(b"\n")
            return _linked(llvm, width, json.loads(head), code)
    return None


def compile_kernels(width: int) -> Kernels:
    """Compile the kernels and keep them for the next process. Takes seconds; raises whatever ails numba."""
    import llvmlite.binding as llvm

    functions = _compiled(width)
    machine = _machine(llvm)
    codes = [machine.emit_object(llvm.parse_assembly(function.inspect_llvm())) for function in functions]
    head = [(function.native_name, len(code)) for function, code in zip(functions, codes, strict=True)]
    body = json.dumps(head).encode() + b"\n" + b"".join(codes)
    for path in _places(width):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_CHECK.pack(checksum(body)) + body)
            break
    return _linked(llvm, width, head, b"".join(codes))


def _places(width: int) -> list[Path]:
    """Where the code for this processor and this source is kept."""
    import llvmlite
    import llvmlite.binding as llvm

    here = Path(__file__)
    what = f"{llvmlite.__version__} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    name = f"delta{8 * width}-{checksum(here.read_bytes(), what.encode()):016x}.kernels"
    folders = [here.parent / "__pycache__"]
    with contextlib.suppress(RuntimeError):  # nobody's home
        folders.append(Path.home() / ".cache" / "llmos")
    return [folder / name for folder in folders]


def _machine(llvm: Any) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3)


def _linked(llvm: Any, width: int, head: Sequence[tuple[str, int]], code: bytes) -> Kernels:
    """The kernels of object code, as functions of arrays."""
    if "numba" not in sys.modules:
        nothing = ctypes.CFUNCTYPE(None)(lambda: None)
        _alive.append(nothing)
        for name in _UNUSED:
            llvm.add_symbol(name, ctypes.cast(nothing, ctypes.c_void_p).value)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(llvm))
    _alive.append(engine)
    at = 0
    for _, size in head:
        engine.add_object_file(llvm.ObjectFileRef.from_data(code[at : at + size]))
        at += size
    engine.finalize_object()
    count, scatter, gather = (_function(engine.get_function_address(name)) for name, _ in head)
    kind = WORD_TYPES[width]

    def room(name: str, dtype: Any, size: int) -> int:
        return _address(scratch(name, np.dtype(dtype), size))

    def count_words(base: Array, table: Array) -> None:
        seen, keys = room("seen", np.uint32, 1 << 16), room("keys", np.uint8, LANES * BLOCK)
        count(_address(base), len(base), _address(table), keys, seen)

    def scatter_words(words: Array, base: Array, table: Array, planes: Array) -> None:
        changes, keys = room("changes", kind, LANES * BLOCK), room("keys", np.uint8, LANES * BLOCK)
        grouped = room("delta", kind, len(words))
        places = _address(words), _address(base), len(words), _address(table)
        scatter(*places, grouped, keys, changes, _address(planes))

    def gather_words(planes: Sequence[Buffer], base: Array, table: Array, words: Array) -> None:
        changes, keys = room("changes", kind, LANES * BLOCK), room("keys", np.uint8, LANES * BLOCK)
        grouped = room("delta", kind, len(words))
        narrow = [np.frombuffer(plane, np.uint8) for plane in planes]
        each = (ctypes.c_void_p * width)(*map(_address, narrow))
        gather(
            ctypes.addressof(each), _address(base), len(words), _address(table), grouped, keys, changes, _address(words)
        )

    return Kernels(count_words, scatter_words, gather_words)


def _function(address: int) -> Callable[..., None]:
    """A C function of pointers and lengths; the GIL is released while it runs."""
    call = ctypes.CFUNCTYPE(None)(address)

    def function(*numbers: int) -> None:
        call(*map(ctypes.c_int64, numbers))

    return function


def _address(array: Array) -> int:
    return array.ctypes.data


def _compiled(width: int) -> list[Any]:
    """The kernels as numba's C functions."""
    from numba import carray, cfunc, config, types

    if config.DISABLE_JIT:
        raise RuntimeError("numba is told not to compile")
    kind: Any = WORD_TYPES[width]
    u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
    zero, one, eight, top, exponent = (kind(bits) for bits in (0, 1, 8, 8 * width - 1, 8 * width - 9))
    lanes, block = LANES, BLOCK  # what a kernel names is compiled into it

    # Unsigned indices need no check for negative ones, and constants of the word's type keep the loops in vectors.
    def count(base_at: Any, words: Any, table_at: Any, keys_at: Any, seen_at: Any) -> None:
        base, table = carray(base_at, (words,)), carray(table_at, (256 * lanes,))
        keys, seen = carray(keys_at, (lanes * block,)), carray(seen_at, (1 << 16,))
        quarter = words // lanes
        table[:] = u32(0)
        for lane in range(lanes):
            part = base[lane * quarter :] if lane == lanes - 1 else base[lane * quarter : (lane + 1) * quarter]
            counts = table[256 * lane : 256 * lane + 256]
            seen[:] = u32(0)  # two keys at once: half as many counters to wait for
            for at in range(0, len(part), block):
                size = min(block, len(part) - at)
                for i in range(u64(size)):
                    keys[i] = u8(part[u64(at) + i] >> exponent)
                for i in range(u64(size // 2)):
                    seen[u16(keys[u64(2) * i]) | (u16(keys[u64(2) * i + u64(1)]) << u16(8))] += u32(1)
                if size % 2:
                    counts[keys[size - 1]] += u32(1)
            for first in range(256):
                row = seen[256 * first : 256 * first + 256]
                total = u32(0)
                for second in range(u64(256)):
                    counts[second] += row[second]
                    total += row[second]
                counts[first] += total
        place = u32(0)
        for key in range(256):
            for lane in range(lanes):
                found = table[256 * lane + key]
                table[256 * lane + key] = place
                place += found

    def scatter(
        words_at: Any, base_at: Any, number: Any, table_at: Any, room_at: Any, keys_at: Any, changes_at: Any, to: Any
    ) -> None:
        words, base, room = carray(words_at, (number,)), carray(base_at, (number,)), carray(room_at, (number,))
        table, planes = carray(table_at, (256 * lanes,)), carray(to, (width * number,))
        keys, changes = carray(keys_at, (lanes * block,)), carray(changes_at, (lanes * block,))
        quarter = number // lanes
        for at in range(0, quarter, block):
            size = min(block, quarter - at)
            for lane in range(lanes):
                start = lane * quarter + at
                new, old = words[start : start + size], base[start : start + size]
                lane_keys, lane_changes = keys[lane * block :], changes[lane * block :]
                for i in range(u64(size)):
                    change = kind(new[i] - old[i])
                    lane_changes[i] = kind(change << one) ^ kind(zero - kind(change >> top))
                    lane_keys[i] = u8(old[i] >> exponent)
            for i in range(u64(size)):
                for lane in range(lanes):
                    j = u64(lane * block) + i
                    key = u64(lane * 256) + u64(keys[j])
                    place = table[key]
                    table[key] = place + u32(1)
                    room[place] = changes[j]
        for i in range(u64(lanes * quarter), u64(number)):
            key = u64((lanes - 1) * 256) + u64(u8(base[i] >> exponent))
            place = table[key]
            table[key] = place + u32(1)
            change = kind(words[i] - base[i])
            room[place] = kind(change << one) ^ kind(zero - kind(change >> top))
        for which in range(width):
            shift = kind(8 * (width - 1 - which))
            plane = planes[which * number : (which + 1) * number]
            for i in range(u64(number)):
                plane[i] = u8(room[i] >> shift)

    def gather(
        planes: Any, base_at: Any, number: Any, table_at: Any, room_at: Any, keys_at: Any, changes_at: Any, to: Any
    ) -> None:
        base, room, out = carray(base_at, (number,)), carray(room_at, (number,)), carray(to, (number,))
        table = carray(table_at, (256 * lanes,))
        keys, changes = carray(keys_at, (lanes * block,)), carray(changes_at, (lanes * block,))
        for which in range(width):
            plane = carray(planes[which], (number,))
            for i in range(u64(number)):
                room[i] = kind(room[i] << eight) | kind(plane[i]) if which else kind(plane[i])
        quarter = number // lanes
        for at in range(0, quarter, block):
            size = min(block, quarter - at)
            for lane in range(lanes):
                old, lane_keys = base[lane * quarter + at : lane * quarter + at + size], keys[lane * block :]
                for i in range(u64(size)):
                    lane_keys[i] = u8(old[i] >> exponent)
            for i in range(u64(size)):
                for lane in range(lanes):
                    j = u64(lane * block) + i
                    key = u64(lane * 256) + u64(keys[j])
                    place = table[key]
                    table[key] = place + u32(1)
                    changes[j] = room[place]
            for lane in range(lanes):
                start = lane * quarter + at
                new, old = out[start : start + size], base[start : start + size]
                lane_changes = changes[lane * block :]
                for i in range(u64(size)):
                    change = lane_changes[i]
                    new[i] = kind(old[i] + kind(kind(change >> one) ^ kind(zero - kind(change & one))))
        for i in range(u64(lanes * quarter), u64(number)):
            key = u64((lanes - 1) * 256) + u64(u8(base[i] >> exponent))
            place = table[key]
            table[key] = place + u32(1)
            change = room[place]
            out[i] = kind(base[i] + kind(kind(change >> one) ^ kind(zero - kind(change & one))))

    word = types.CPointer(types.Integer.from_bitwidth(8 * width, signed=False))
    byte, long, number = types.CPointer(types.uint8), types.CPointer(types.uint32), types.int64
    arguments = {
        "count": (word, number, long, byte, long),
        "scatter": (word, word, number, long, word, byte, word, byte),
        "gather": (types.CPointer(byte), word, number, long, word, byte, word, word),
    }
    functions = {"count": count, "scatter": scatter, "gather": gather}
    return [cfunc(types.void(*arguments[name]), error_model="numpy")(functions[name]) for name in _NAMES]

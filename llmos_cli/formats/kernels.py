"""Compiled loops over the words of a chunk, loaded without numba and run without numpy.

Importing numba and loading what it keeps in a cache of its own costs most of a second of processor time, as much as
adding a small model; numpy alone takes a tenth. So numba compiles once for a machine (loops.py); the object code is
kept beside this module (where that cannot be, below the user's cache folder) and llvmlite, which numba rests on,
loads it in less time than numpy needs. Nothing read back is believed before its checksum, and a trial must give what it
gave when its results were compared with numpy's.
"""

import contextlib
import ctypes
import json
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llmos_cli.formats.ids import Buffer, checksum

LANES: Final = 4
BLOCK: Final = 2048
TABLE_BYTES: Final = 4 * 256 * LANES
KEYS: Final = 256
_CHECK = struct.Struct("<Q")
_UNUSED: Final = ("numba_gil_ensure", "numba_gil_release", "NRT_MemInfo_call_dtor")  # only errors would lead there
_TRIAL_WORDS: Final = 3 * LANES * BLOCK // 2 + LANES - 1

_alive: list[Any] = []  # whatever owns code that is in use
_scratch = threading.local()


@dataclass(frozen=True)
class Kernels:
    """The loops for words of `width` bytes, on buffers whose sizes the caller has checked. All release the GIL."""

    width: int
    subtract: Callable[[Buffer, Buffer, Buffer], list[int]]
    """(words, base, planes): the grouped differences, and where each of the 256 groups ends."""
    add: Callable[[Sequence[Buffer], Buffer, Buffer], None]
    """(planes, base, words): the inverse."""
    split: Callable[[Buffer, Buffer], None]
    """(words, planes): the words turned left by one."""
    merge: Callable[[Sequence[Buffer], Buffer], None]
    """(planes, words): the inverse."""


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
            table = json.loads(head)
            kernels = _linked(llvm, width, table["functions"], code)
            return kernels if checksum(*trial(kernels)) == table["trial"] else None
    return None


def compile_kernels(width: int, results: Sequence[Buffer]) -> Kernels | None:
    """Compile the kernels and keep them for the next process, unless the trial does not give `results`.

    Takes seconds; raises whatever ails numba.
    """
    import llvmlite.binding as llvm

    from llmos_cli.formats.loops import compile_loops

    machine = _machine(llvm)
    loops = [
        (name, machine.emit_object(llvm.parse_assembly(code))) for name, code in compile_loops(width, LANES, BLOCK)
    ]
    functions = [(name, len(code)) for name, code in loops]
    code = b"".join(code for _, code in loops)
    kernels = _linked(llvm, width, functions, code)
    if checksum(*trial(kernels)) != checksum(*results):
        return None
    body = json.dumps({"functions": functions, "trial": checksum(*results)}).encode() + b"\n" + code
    for path in _places(width):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_CHECK.pack(checksum(body)) + body)
            break
    return kernels


def trial_words(width: int) -> tuple[bytes, bytes]:
    """Words and base words of the trial: the digits of a power of three, which look random and need no library."""
    size = _TRIAL_WORDS * width
    digits = (3 ** (11 * size)).to_bytes(3 * size, "little")
    return digits[:size], digits[size : 2 * size]


def trial(kernels: Kernels) -> tuple[Buffer, ...]:
    """What the kernels make of the words of the trial: planes of differences and their groups' ends, the words again,
    planes of the words, the words again."""
    words, base = trial_words(kernels.width)
    size = len(words)
    grouped, added, planes, merged = (bytearray(size) for _ in range(4))
    ends = kernels.subtract(words, base, grouped)
    kernels.add(_parts(grouped, kernels.width), base, added)
    kernels.split(words, planes)
    kernels.merge(_parts(planes, kernels.width), merged)
    return grouped, str(ends).encode(), added, planes, merged


def scratch_bytes(name: str, size: int) -> bytearray:
    """Memory of this thread, kept from call to call and at least `size` long: fresh pages cost as much as a pass."""
    kept: bytearray | None = getattr(_scratch, name, None)
    if kept is None or len(kept) < size:
        kept = bytearray(size)
        setattr(_scratch, name, kept)
    return kept


def _parts(planes: bytearray, width: int) -> list[memoryview]:
    size = len(planes) // width
    return [memoryview(planes)[plane * size : (plane + 1) * size] for plane in range(width)]


def _places(width: int) -> list[Path]:
    """Where the code for this processor and this source is kept."""
    import llvmlite
    import llvmlite.binding as llvm

    here = Path(__file__)
    what = f"{llvmlite.__version__} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    sources = (path.read_bytes() for path in (here, here.with_name("loops.py")))
    name = f"words{8 * width}-{checksum(*sources, what.encode()):016x}.kernels"
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
    """The kernels of object code, as functions of buffers."""
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
    count, scatter, gather, split, merge = (_function(engine.get_function_address(name)) for name, _ in head)

    def counted(base: Buffer, number: int) -> bytearray:
        table = bytearray(TABLE_BYTES)
        count(base, number, table, scratch_bytes("keys", LANES * BLOCK), scratch_bytes("seen", 4 << 16))
        return table

    def rooms(size: int) -> tuple[Buffer, Buffer, Buffer]:
        keys, changes = scratch_bytes("keys", LANES * BLOCK), scratch_bytes("changes", LANES * BLOCK * width)
        return scratch_bytes("grouped", size), keys, changes

    def subtract(words: Buffer, base: Buffer, planes: Buffer) -> list[int]:
        number = len(words) // width
        table = counted(base, number)
        scatter(words, base, number, table, *rooms(len(words)), planes)
        return memoryview(table).cast("I")[-KEYS:].tolist()  # where the last lane has stopped

    def add(planes: Sequence[Buffer], base: Buffer, words: Buffer) -> None:
        number = len(words) // width
        gather(planes, base, number, counted(base, number), *rooms(len(words)), words)

    return Kernels(
        width,
        subtract,
        add,
        lambda words, planes: split(words, len(words) // width, planes),
        lambda planes, words: merge(planes, len(words) // width, words),
    )


def _function(address: int) -> Callable[..., None]:
    """A C function of pointers and lengths: of buffers it gets the address, of several buffers that of a table of their
    addresses. The GIL is released while it runs."""
    call = ctypes.CFUNCTYPE(None)(address)

    def function(*arguments: Buffer | Sequence[Buffer] | int) -> None:
        with contextlib.ExitStack() as held:
            call(*(ctypes.c_int64(_number(argument, held)) for argument in arguments))

    return function


def _number(argument: Any, held: contextlib.ExitStack) -> int:
    if isinstance(argument, int):
        return argument
    if isinstance(argument, list | tuple):
        table = (ctypes.c_void_p * len(argument))(*(held.enter_context(_address(part)) for part in argument))
        held.callback(lambda _: None, table)  # alive until the call is over
        return ctypes.addressof(table)
    return held.enter_context(_address(argument))


class _View(ctypes.Structure):
    """A Py_buffer, as the stable ABI of Python has it since 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


@contextlib.contextmanager
def _address(buffer: Buffer) -> Iterator[int]:
    """Where the bytes of a buffer lie, read-only ones too, which ctypes itself does not tell."""
    view = _View()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(view), 0)
    try:
        yield view.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))

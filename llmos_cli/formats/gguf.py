"""Where the tensors of a GGUF file lie, checked before anything is believed. Knows sizes, not how to dequantize.

Format: github.com/ggml-org/ggml, docs/gguf.md; versions 2 and 3, little-endian. A file whose header contradicts itself
or its own length is refused as unsafe: other readers have been made to leak memory by such files (an offset beyond the
end, a length near 2^64), and a store should not pass them on. Nothing is allocated that the file does not hold.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Final

from llmos_cli.errors import Damaged, Unsafe
from llmos_cli.formats import limits
from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.safetensors import TensorInfo, check_tensor_name

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)

# ggml's number of a type: its name, elements a block, bytes a block (ggml/include/ggml.h, ggml/src/ggml-common.h)
TYPES: Final = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip

_STRING, _ARRAY, _U32_TYPE = 8, 9, 4
_SCALAR_BYTES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ALIGNMENT_KEY: Final = "general.alignment"
_DEFAULT_ALIGNMENT: Final = 32
_WINDOW_BYTES: Final = 1 * limits.MiB
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

Read = Callable[[int, int], Buffer]


@dataclass(frozen=True)
class _Entry:
    """A line of the tensor table; `size` is None for a type that is newer than TYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int | None


def read_table(read: Read, size: int, what: str) -> tuple[TensorInfo, ...] | None:
    """The tensors of a file of `size` bytes in file order; None if it is no GGUF file, or of a version not known here.

    Raises Unsafe, naming `what`, for a big-endian file, one that is cut short, and any header that does not hold:
    counts, lengths and offsets beyond the file, duplicate keys or names, overlapping tensors, an odd alignment. A
    tensor of a type that is not known reaches to the next one. Shapes are in numpy's order, the longest stride first.
    """
    cursor = _Cursor(read, size, what)
    if size < len(MAGIC) + _U32.size or cursor.take(len(MAGIC)) != MAGIC:
        return None
    version = cursor.u32()
    if version and version & 0xFFFF == 0:
        raise Unsafe(f"{what} is a big-endian GGUF file", hint="convert it: gguf-convert-endian FILE little")
    if version not in VERSIONS:
        return None
    tensor_count = cursor.count(limits.GGUF_TENSORS, 24, "tensors")
    key_count = cursor.count(limits.GGUF_KEYS, 13, "keys")
    alignment = _read_keys(cursor, key_count)
    entries = _read_entries(cursor, tensor_count)
    begin = -(-cursor.at // alignment) * alignment
    return _place(entries, begin, alignment, size, what)


class _Cursor:
    """Reads forward through a window, and never further than the file or the limit of a header allow."""

    def __init__(self, read: Read, size: int, what: str) -> None:
        self.at = 0
        self.what = what
        self._read = read
        self._size = size
        self._stop = min(size, limits.GGUF_HEADER_BYTES)
        self._window = b""
        self._window_start = 0
        self._strings = 0

    def refuse(self, why: str) -> Unsafe:
        return Unsafe(f"{self.what} is not a sound GGUF file: {why}", hint="get the file again from its source")

    def take(self, count: int) -> bytes:
        first = self._ensure(count)
        self.at += count
        return self._window[first : first + count]

    def u32(self) -> int:
        first = self._ensure(_U32.size)
        self.at += _U32.size
        value: int = _U32.unpack_from(self._window, first)[0]
        return value

    def u64(self) -> int:
        first = self._ensure(_U64.size)
        self.at += _U64.size
        value: int = _U64.unpack_from(self._window, first)[0]
        return value

    def skip(self, count: int) -> None:
        self._check(count)
        self.at += count

    def count(self, limit: int, least: int, of_what: str) -> int:
        """A count of things of at least `least` bytes each: no more than the file can hold."""
        count = self.u64()
        if count > limit or count * least > self._size - self.at:
            raise self.refuse(f"it declares {count} {of_what}")
        return count

    def text(self) -> str:
        length = self.u64()
        if length > limits.GGUF_NAME_BYTES:
            raise self.refuse(f"a name has {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as exc:
            raise self.refuse("a name is not UTF-8") from exc

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self.skip(self.u64())
        elif kind == _ARRAY and depth < limits.GGUF_DEPTH:
            self._skip_array(depth)
        else:
            raise self.refuse(f"a value has the unknown type {kind}")

    def _skip_array(self, depth: int) -> None:
        kind = self.u32()
        if kind in _SCALAR_BYTES:
            width = _SCALAR_BYTES[kind]
            self.skip(width * self.count(limits.GGUF_HEADER_BYTES, width, "values in an array"))
            return
        count = self.count(limits.GGUF_STRINGS - self._strings, _U64.size, "strings or arrays in an array")
        self._strings += count
        for _ in range(count):
            self.skip_value(kind, depth + 1)

    def _check(self, count: int) -> None:
        if count > self._stop - self.at:
            if self._stop == self._size:
                raise self.refuse("its header is longer than the file")
            raise self.refuse(f"its header is longer than {limits.GGUF_HEADER_BYTES} bytes")

    def _ensure(self, count: int) -> int:
        """Where in the window the next `count` bytes start."""
        first = self.at - self._window_start
        if first + count <= len(self._window):
            return first
        self._check(count)
        end = min(self._stop, self.at + max(count, _WINDOW_BYTES))
        self._window, self._window_start = bytes(self._read(self.at, end)), self.at
        if len(self._window) != end - self.at:
            raise Damaged(f"{self.what} was cut short while it was read")
        return 0


def _read_keys(cursor: _Cursor, count: int) -> int:
    """Pass over the keys and values; gives the alignment they declare."""
    alignment = _DEFAULT_ALIGNMENT
    keys: set[str] = set()
    for _ in range(count):
        key = cursor.text()
        if not key or key in keys:
            raise cursor.refuse(f"the key {key[:200]!r} stands twice" if key else "a key has no name")
        keys.add(key)
        kind = cursor.u32()
        if key != _ALIGNMENT_KEY:
            cursor.skip_value(kind)
            continue
        alignment = cursor.u32() if kind == _U32_TYPE else 0
        if alignment == 0 or alignment & (alignment - 1):
            raise cursor.refuse("its alignment is not a power of two")
    return alignment


def _read_entries(cursor: _Cursor, count: int) -> list[_Entry]:
    entries: list[_Entry] = []
    names: set[str] = set()
    for _ in range(count):
        name = check_tensor_name(cursor.text(), cursor.what)
        if name in names:
            raise cursor.refuse(f"the tensor {name[:200]!r} stands twice")
        names.add(name)
        rank = cursor.u32()
        if rank > limits.GGUF_RANK:
            raise cursor.refuse(f"tensor {name[:200]!r} has {rank} dimensions")
        extents = [cursor.u64() for _ in range(rank)]
        number, offset = cursor.u32(), cursor.u64()
        dtype, size = f"GGML_{number}", None  # a newer type: it reaches to the next tensor
        if number in TYPES:
            dtype, block, block_bytes = TYPES[number]
            row = extents[0] if extents else 1
            size = row // block * block_bytes * prod(extents[1:])
            if row % block or size >= 1 << 63:
                raise cursor.refuse(f"tensor {name[:200]!r} has a shape that {dtype} cannot have")
        entries.append(_Entry(name, dtype, tuple(reversed(extents)), offset, size))
    return entries


def _place(entries: list[_Entry], begin: int, alignment: int, size: int, what: str) -> tuple[TensorInfo, ...]:
    """Offsets in the data to places in the file."""
    ordered = sorted(entries, key=lambda entry: (entry.offset, entry.size or 0, entry.name))
    tensors: list[TensorInfo] = []
    last = begin
    for number, entry in enumerate(ordered):
        start = begin + entry.offset
        following = begin + ordered[number + 1].offset if number + 1 < len(ordered) else max(size, start)
        end = following if entry.size is None else start + entry.size
        if entry.offset % alignment or start < last or end > size:
            why = "passes the end of the file" if end > size else "is not aligned or overlaps another"
            raise Unsafe(
                f"{what} is not a sound GGUF file: tensor {entry.name[:200]!r} {why}",
                hint="get the file again from its source",
            )
        tensors.append(TensorInfo(entry.name, entry.dtype, entry.shape, start, end))
        last = end
    return tuple(tensors)

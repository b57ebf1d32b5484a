"""TensorFlow's checkpoints: where the tensors of a tensor bundle lie. Pure; no TensorFlow.

`PREFIX.index` is a sorted table in LevelDB's layout: blocks of entries that share the beginnings of their keys, a block
that lists the blocks, and a footer. The key "" holds a BundleHeaderProto, every other key a variable's name with its
BundleEntryProto: dtype, shape, and where its bytes lie in `PREFIX.data-SSSSS-of-NNNNN`. Little-endian throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Final

from llmos_cli.errors import Damaged, UsageError

FOOTER_BYTES: Final = 48
MAGIC: Final = 0xDB4775248B80FB57
_TRAILER: Final = 5  # compression and checksum, after each block
_MOST_ENTRIES: Final = 1_000_000
# DataType numbers of tensorflow/core/framework/types.proto -> name as safetensors has it, bytes
DTYPES: Final = {1: ("F32", 4), 2: ("F64", 8), 3: ("I32", 4), 9: ("I64", 8), 14: ("BF16", 2), 19: ("F16", 2)}
_OTHER: Final = "other"


@dataclass(frozen=True)
class Variable:
    """A tensor of a bundle: `size` bytes from `offset` of shard `shard`. A dtype that is not of numbers is "other"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


@dataclass(frozen=True)
class Bundle:
    shards: int
    variables: tuple[Variable, ...]


def read_bundle(data: bytes, where: str) -> Bundle:
    """Read a `.index` file; raises Damaged naming `where`."""
    try:
        return _read(data, where)
    except (IndexError, ValueError, UnicodeDecodeError) as exc:
        raise Damaged(f"{where} is not the index of a TensorFlow checkpoint: {exc}") from exc


def _read(data: bytes, where: str) -> Bundle:
    footer = data[-FOOTER_BYTES:]
    if len(footer) < FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != MAGIC:
        raise ValueError("it does not end in the mark of a table")
    _, _, at = _handle(footer, 0)
    offset, size, _ = _handle(footer, at)
    shards, found = 0, []
    for _, handle in _entries(_block(data, offset, size)):
        start, length, _ = _handle(handle, 0)
        for key, value in _entries(_block(data, start, length)):
            if not key:
                shards = _header(value)
            else:
                found.append(_variable(key.decode(), value, where))
            if len(found) > _MOST_ENTRIES:
                raise ValueError("it has too many entries")
    if shards < 1:
        raise ValueError("it has no header")
    for item in found:
        if item.shard >= shards:
            raise ValueError(f"{item.name} lies in shard {item.shard} of {shards}")
    return Bundle(shards, tuple(found))


def _block(data: bytes, offset: int, size: int) -> bytes:
    if offset + size + _TRAILER > len(data):
        raise ValueError("a block lies outside the file")
    if data[offset + size]:
        raise ValueError("it is compressed")
    return data[offset : offset + size]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise ValueError("a block has no end")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        size, at = _varint(block, at)
        if shared > len(key) or at + own + size > end:
            raise ValueError("an entry lies outside its block")
        key = key[:shared] + block[at : at + own]
        at += own
        yield key, block[at : at + size]
        at += size


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return offset, size, at


def _header(value: bytes) -> int:
    fields = dict(_fields(value))
    if fields.get(2, 0) != 0:
        raise ValueError("it is big-endian")
    shards = fields.get(1, 0)
    return shards if isinstance(shards, int) else 0


def _variable(name: str, value: bytes, where: str) -> Variable:
    numbers: dict[int, int] = {}
    shape: tuple[int, ...] = ()
    for field, item in _fields(value):
        if field == 2 and isinstance(item, bytes):
            shape = tuple(_dimension(dim) for key, dim in _fields(item) if key == 2 and isinstance(dim, bytes))
        elif field == 7:
            raise UsageError(f"{where} holds {name} in slices, which are not read", hint="save it in one piece")
        elif isinstance(item, int):
            numbers[field] = item
    dtype, width = DTYPES.get(numbers.get(1, 0), (_OTHER, 0))
    size = numbers.get(5, 0)
    if width and prod(shape) * width != size:
        raise ValueError(f"{name} has {size} bytes, which is not its shape")
    return Variable(name, dtype, shape, numbers.get(3, 0), numbers.get(4, 0), size)


def _dimension(data: bytes) -> int:
    size = dict(_fields(data)).get(1, 0)
    if not isinstance(size, int) or size >= 1 << 63:
        raise ValueError("a dimension is not a number")
    return size


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message, as numbers or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
                yield tag >> 3, value
            case 1:
                yield tag >> 3, int.from_bytes(data[at : at + 8], "little")
                at += 8
            case 2:
                size, at = _varint(data, at)
                if at + size > len(data):
                    raise ValueError("a field lies outside its message")
                yield tag >> 3, data[at : at + size]
                at += size
            case 5:
                yield tag >> 3, int.from_bytes(data[at : at + 4], "little")
                at += 4
            case kind:
                raise ValueError(f"a field has the unknown kind {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number has no end")

"""Where the tensors of a safetensors file lie, checked before anything is believed. Reads headers only, needs no torch.

Format: 8 bytes little-endian header length N, N bytes of JSON, then one buffer (github.com/safetensors/safetensors,
README "Format"). Stricter than the reference parser where that is known to be loose: duplicate keys, unknown fields,
tensor names that look like paths, more tensors or dimensions than the declared limits.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Damaged, Unsafe
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.codec import OPAQUE, Words
from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.names import check_path

DTYPE_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_FLOATS: Final = {"F16", "BF16", "F32", "F64"}
_METADATA: Final = "__metadata__"
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its dtype by the format's name, its shape, and its absolute byte range in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def words(self) -> Words:
        return words_of(self.dtype)


def words_of(dtype: str) -> Words:
    """How a codec should read a tensor's bytes; packed blocks of other formats ("Q4_K") are bytes to it."""
    bits = DTYPE_BITS.get(dtype, 8)
    return Words(bits // 8, dtype in _FLOATS) if bits >= 8 and bits & (bits - 1) == 0 else OPAQUE


def read_table(read: Callable[[int, int], Buffer], size: int, what: str) -> tuple[TensorInfo, ...]:
    """The tensors of a file of `size` bytes in file order, read through `read(start, end)`.

    Raises Damaged (or Unsafe for a name), naming `what`, unless the header fits in the file, is plain JSON without
    duplicate keys, and the tensors cover the buffer exactly: no hole, no overlap, nothing after the last.
    """
    if size < _LENGTH.size:
        raise Damaged(f"{what} is cut short: {size} bytes cannot be a safetensors file")
    prefix = bytes(read(0, _LENGTH.size))
    if len(prefix) != _LENGTH.size:
        raise Damaged(f"{what} was cut short while it was read")
    (length,) = _LENGTH.unpack(prefix)
    if length > limits.SAFETENSORS_HEADER_BYTES:
        raise Damaged(f"{what} has a header of {length} bytes, over the format's limit")
    begin = _LENGTH.size + length
    if begin > size:
        raise Damaged(f"{what} is cut short: its header of {length} bytes is longer than the file")
    header = canonical.loads(bytes(read(_LENGTH.size, begin)), f"the header of {what}")
    if not isinstance(header, dict):
        raise Damaged(f"the header of {what} is not a table")
    if len(header) > limits.SAFETENSORS_TENSORS:
        raise Damaged(f"{what} has {len(header)} tensors, over the limit of {limits.SAFETENSORS_TENSORS}")
    metadata = header.pop(_METADATA, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Damaged(f"the metadata of {what} is not a table of strings")
    tensors = sorted(
        (_tensor(name, value, begin, what) for name, value in header.items()), key=lambda t: (t.start, t.end, t.name)
    )
    at = begin
    for tensor in tensors:
        if tensor.start != at:
            kind = "overlap" if tensor.start < at else "leave a hole"
            raise Damaged(f"{what} is malformed: tensors {kind} at {tensor.name!r}")
        at = tensor.end
    if at > size:
        raise Damaged(f"{what} is cut short: its tensors need {at} bytes, the file has {size}")
    if at < size:
        raise Damaged(f"{what} has {size - at} bytes after its last tensor")
    return tuple(tensors)


def encode_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header (length included) of a file that holds (name, dtype, shape) in this order, data 8-byte aligned."""
    table: dict[str, canonical.Json] = {_METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        if name in table or name == _METADATA:
            raise ValueError(f"tensor {name!r} stands twice or has a reserved name")
        end = at + tensor_bytes(dtype, shape, name)
        table[name] = {"data_offsets": [at, end], "dtype": dtype, "shape": list(shape)}
        at = end
    text = canonical.encode(table)
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def tensor_bytes(dtype: str, shape: Sequence[int], name: str) -> int:
    """Bytes of a tensor; raises Damaged for an unknown dtype, a bad shape or a size that is not whole bytes."""
    if dtype not in DTYPE_BITS:
        raise Damaged(f"tensor {name[:200]!r} has the unknown dtype {dtype[:40]!r}")
    if len(shape) > limits.SAFETENSORS_RANK:
        raise Damaged(f"tensor {name[:200]!r} has {len(shape)} dimensions")
    bits = DTYPE_BITS[dtype]
    for extent in shape:
        if type(extent) is not int or extent < 0:
            raise Damaged(f"tensor {name[:200]!r} has a malformed shape")
        bits *= extent
        if bits >= 1 << 63:
            raise Damaged(f"tensor {name[:200]!r} has a shape that overflows")
    if bits % 8:
        raise Damaged(f"tensor {name[:200]!r} does not end on a whole byte")
    return bits // 8


def read_shard_index(data: bytes, what: str) -> dict[str, str]:
    """Tensor name -> file name of a `*.safetensors.index.json`; every file must lie in the same folder.

    Raises Damaged for a malformed index and Unsafe for one that names anything but `*.safetensors` beside it.
    """
    index = canonical.loads(data, what)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise Damaged(f"{what} has no weight_map")
    result: dict[str, str] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise Unsafe(f"{what} names {str(file)[:200]!r}; only .safetensors files beside it are allowed")
        result[check_tensor_name(name, what)] = check_path(file)
    return result


def check_tensor_name(name: str, what: str) -> str:
    """A tensor's name must be printable and must not look like a path; raises Unsafe."""
    if not is_tensor_name(name):
        raise Unsafe(f"{what} has a tensor with the unsafe name {name[:200]!r}")
    return name


def is_tensor_name(name: str) -> bool:
    return bool(name) and name.isprintable() and "\\" not in name and name[0] != "/" and ".." not in name.split("/")


def _tensor(name: str, value: canonical.Json, begin: int, what: str) -> TensorInfo:
    check_tensor_name(name, what)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise Damaged(f"{what} is malformed: tensor {name[:200]!r} does not have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise Damaged(f"{what} is malformed: tensor {name[:200]!r} has a field of the wrong type")
    if len(offsets) != 2 or not all(type(o) is int and 0 <= o < 1 << 62 for o in offsets):
        raise Damaged(f"{what} is malformed: tensor {name[:200]!r} has malformed offsets")
    first, last = offsets
    assert isinstance(first, int)
    assert isinstance(last, int)
    extents = tuple(extent for extent in shape if isinstance(extent, int))
    try:
        expected = tensor_bytes(dtype, extents, name)
    except Damaged as exc:
        raise Damaged(f"{what} is malformed: {exc.message}") from exc
    if len(extents) != len(shape) or last - first != expected:
        raise Damaged(f"{what} is malformed: tensor {name[:200]!r} does not fit its offsets")
    return TensorInfo(name, dtype, extents, begin + first, begin + last)

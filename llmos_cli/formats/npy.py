"""Where the array of a .npy file lies, and those of a .npz file, which is a zip archive of them. Needs no numpy.

Format: numpy, "A simple file format for NumPy arrays" (NEP 1), versions 1 to 3. The header is Python source; here it is
matched, not evaluated. Arrays of objects (pickles), of records and of text are not tensors; what is not as numpy writes
it is left out, and never an error.
"""

import re
import struct
from collections.abc import Callable
from math import prod
from typing import Final

from llmos_cli.formats import limits
from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.safetensors import DTYPE_BITS, TensorInfo, is_tensor_name
from llmos_cli.formats.zipped import stored_entries

MAGIC: Final = b"\x93NUMPY"
ARRAY: Final = "array"  # the name of the one array of a .npy file

_HEADER = re.compile(
    rb"\{'descr': '[<|]([a-zA-Z])([0-9]{1,2})(?:\[[0-9a-zA-Z]{1,10}\])?', 'fortran_order': (?:True|False), "
    rb"'shape': \(((?:[0-9]{1,18}L?(?:, *|(?=\))))*)\),? *\} *\n?"
)
_DTYPES: Final = {
    "f2": "F16", "f4": "F32", "f8": "F64", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64",
    "u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64", "b1": "BOOL", "c8": "C64", "M8": "I64", "m8": "I64",
    "V1": "U8", "V2": "BF16",  # numpy has no name for them: float8 and bfloat16 arrays are written as void
}  # fmt: skip

Read = Callable[[int, int], Buffer]


def find_array(read: Read, size: int) -> tuple[TensorInfo, ...] | None:
    """The one array of a .npy file."""
    array = _array(ARRAY, read, 0, size)
    return None if array is None else (array,)


def find_arrays(read: Read, size: int) -> tuple[TensorInfo, ...] | None:
    """The arrays of a .npz file that are stored without compression, in file order."""
    arrays: dict[str, TensorInfo] = {}
    for entry in stored_entries(read, size):
        name = entry.name.removesuffix(".npy")
        if name not in arrays and (array := _array(name, read, entry.start, entry.end)) is not None:
            arrays[name] = array
    return tuple(arrays.values()) or None


def _array(name: str, read: Read, start: int, end: int) -> TensorInfo | None:
    """The array whose header starts at `start` and whose last byte is the one before `end`."""
    prefix = bytes(read(start, min(end, start + 12)))
    if len(prefix) < 12 or prefix[:6] != MAGIC or prefix[6] not in (1, 2, 3) or not is_tensor_name(name):
        return None
    form = struct.Struct("<H" if prefix[6] == 1 else "<I")
    begin = start + 8 + form.size
    length: int = form.unpack_from(prefix, 8)[0]
    if length > limits.NPY_HEADER_BYTES or begin + length > end:
        return None
    header = _HEADER.fullmatch(bytes(read(begin, begin + length)))
    if header is None:
        return None
    dtype = _DTYPES.get((header[1] + header[2]).decode())
    shape = tuple(int(extent) for extent in re.findall(rb"[0-9]+", header[3]))
    if dtype is None or len(shape) > limits.SAFETENSORS_RANK:
        return None
    first = begin + length
    fits = prod(shape) * DTYPE_BITS[dtype] == 8 * (end - first)
    return TensorInfo(name, dtype, shape, first, end) if fits else None

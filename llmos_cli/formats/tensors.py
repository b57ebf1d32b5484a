"""Where the tensors of a file lie, whatever its format: safetensors, GGUF, torch zip, .npy, .npz.

A file is taken for what its name **and** its first bytes say; for anything else, and for what no reader can place, the
answer is None and the file is a run of bytes like any other. Only two formats are strict: a broken .safetensors or
.gguf file is refused, since whoever reads it next may trust it.
"""

from collections.abc import Callable
from typing import Final

from llmos_cli.formats import gguf, npy, safetensors, zipped
from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.safetensors import TensorInfo

__all__ = ["TensorInfo", "find_tensors"]

_TORCH: Final = (".pt", ".pth", ".bin", ".ckpt")
_MAGIC_BYTES: Final = 6


def find_tensors(name: str, read: Callable[[int, int], Buffer], size: int, where: str) -> tuple[TensorInfo, ...] | None:
    """The tensors of a file of `size` bytes called `name`, in file order, none overlapping another; None if it has no
    layout that is known here. `read(start, end)` gives its bytes, `where` names it in errors.

    Raises Damaged or Unsafe for a malformed .safetensors or .gguf file.
    """
    suffix = "".join(name.rpartition(".")[1:])
    if suffix == ".safetensors":
        return safetensors.read_table(read, size, where)
    magic = bytes(read(0, min(size, _MAGIC_BYTES))) if suffix in (".gguf", ".npy", ".npz", *_TORCH) else b""
    if suffix == ".gguf":
        return gguf.read_table(read, size, where) if magic.startswith(gguf.MAGIC) else None
    if suffix == ".npy":
        return npy.find_array(read, size) if magic.startswith(npy.MAGIC) else None
    if not magic.startswith(zipped.MAGIC):
        return None
    if suffix == ".npz":
        return npy.find_arrays(read, size)
    from llmos_cli.formats.torchzip import find_storages  # brings pickletools, which few commands need

    return find_storages(read, size)

"""Where the storages of a torch file (`torch.save`: .pt, .pth, .bin, .ckpt) lie. Needs no torch, executes no pickle.

Such a file is a zip archive with one uncompressed entry a storage, `NAME/data/NUMBER`. Anything that is not as torch
writes it is left out: the answer is then None, never an error. The format torch wrote before 1.6 is not known here.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Final

from llmos_cli.formats import limits
from llmos_cli.formats.ids import Buffer
from llmos_cli.formats.pickled import BYTES, Storage, read_storages
from llmos_cli.formats.safetensors import TensorInfo, is_tensor_name
from llmos_cli.formats.zipped import Entry, stored_entries

_PICKLE: Final = re.compile(r"[^/]+/data\.pkl")
_STORAGE: Final = re.compile(r"data/([0-9]{1,10})")


def find_storages(read: Callable[[int, int], Buffer], size: int) -> tuple[TensorInfo, ...] | None:
    """The storages of a torch file in file order, each under the name of the tensor that fills it, or its entry's.

    A storage whose type the pickle does not tell is given as bytes.
    """
    entries = stored_entries(read, size)
    pickle = next((entry for entry in entries if _PICKLE.fullmatch(entry.name)), None)
    if pickle is None:
        return None
    root = pickle.name.removesuffix("data.pkl")
    inside: dict[str, Entry] = {}
    for entry in entries:
        if entry.name.startswith(root):
            inside.setdefault(entry.name.removeprefix(root), entry)
    order = inside.get("byteorder")
    if order and (order.size > 16 or bytes(read(order.start, order.end)) != b"little"):
        return None
    told = read_storages(bytes(read(pickle.start, pickle.end))) if pickle.size <= limits.PICKLE_BYTES else {}
    uses = Counter(storage.name for storage in told.values())
    tensors = []
    for name, entry in inside.items():
        if match := _STORAGE.fullmatch(name):
            storage = told.get(match[1])
            if storage is None or storage.size != entry.size:
                storage = Storage(match[1], BYTES, (entry.size,))
            known = uses[storage.name] == 1 and is_tensor_name(storage.name) and not _STORAGE.fullmatch(storage.name)
            title = storage.name if known else name
            tensors.append(TensorInfo(title, storage.dtype, storage.shape, entry.start, entry.end))
    return tuple(tensors) or None

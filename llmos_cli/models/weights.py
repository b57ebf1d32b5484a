"""State dicts <-> tensors in the store, without a checkout and without temporary files.

Reading goes from verified chunks straight into the tensors' own memory, on several threads; writing hands out views of
the tensors' memory. Bits are never converted here. Knows nothing of architectures.
"""

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmos_cli.errors import Damaged, LlmosError
from llmos_cli.formats.limits import CHUNK_BYTES
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.safetensors import TensorInfo
from llmos_cli.progress import Progress, Silent
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import FileReader, open_file
from llmos_cli.store.transaction import Tensor

TORCH_DTYPES: Final = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_READ_BYTES: Final = 8 * CHUNK_BYTES
_READERS: Final = 8


def load_state_dict(
    store: Store, manifest: Manifest, folder: str = "", *, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files directly in `folder`, in the dtype it is stored in, in memory of its own.

    Raises NotFound for a manifest without tensors, LlmosError for a dtype that torch lacks, Damaged for bad bytes.
    """
    table = tensor_table(store, manifest, folder)
    readers = {entry.path: open_file(store, entry) for entry in {e.path: e for e, _ in table.values()}.values()}
    state: dict[str, torch.Tensor] = {}
    jobs: list[tuple[FileReader, int, memoryview]] = []
    for name, (entry, info) in sorted(table.items(), key=lambda item: (item[1][0].path, item[1][1].start)):
        state[name] = tensor = _empty(info)
        view = _bytes(tensor)
        jobs += [
            (readers[entry.path], info.start + at, view[at : at + _READ_BYTES])
            for at in range(0, len(view), _READ_BYTES)
        ]
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), thread_name_prefix="llmos-weights") as pool:
        total = sum(len(view) for _, _, view in jobs)
        with (progress or Silent()).task("loading weights", total=total) as task:
            for size in pool.map(_read, jobs):
                task.advance(size)
    return state


def _read(job: tuple[FileReader, int, memoryview]) -> int:
    reader, start, view = job
    reader.readinto(start, view)
    return len(view)


def read_tensor(reader: FileReader, info: TensorInfo) -> torch.Tensor:
    """One tensor through an open file, in the dtype it is stored in."""
    tensor = _empty(info)
    if tensor.numel():
        reader.readinto(info.start, _bytes(tensor))
    return tensor


def state_tensors(state: Mapping[str, torch.Tensor]) -> list[Tensor]:
    """What a transaction writes for `state`, sorted by name.

    A contiguous CPU tensor is handed out as a view of its own memory, so it must not change until it is written.
    """
    return [tensor_source(name, state[name]) for name in sorted(state)]


def tensor_source(name: str, tensor: torch.Tensor) -> Tensor:
    """What a transaction writes for one tensor."""
    if tensor.dtype not in _NAMES:
        raise LlmosError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold")
    return Tensor(name, _NAMES[tensor.dtype], tuple(tensor.shape), lambda: tensor_bytes(tensor))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor: a view of its own memory if it is contiguous and on the CPU."""
    return _bytes(tensor.detach().cpu().contiguous())


def drop_tied(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's state dict as `save_pretrained` would write it: tied duplicates left out, names as on disk."""
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        if target in state and source in state and _same_memory(state[target], state[source]):
            del state[target]
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    return dict(revert_weight_conversion(model, state))


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _empty(info: TensorInfo) -> torch.Tensor:
    if info.dtype not in TORCH_DTYPES:
        raise LlmosError(f"tensor {info.name!r} has dtype {info.dtype}, which torch does not have")
    dtype = TORCH_DTYPES[info.dtype]
    if math.prod(info.shape) * dtype.itemsize != info.end - info.start:
        raise Damaged(f"tensor {info.name!r} does not fit its bytes")
    return torch.empty(info.shape, dtype=dtype)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; the view keeps it alive."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data

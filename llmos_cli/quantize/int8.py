"""Int8 weights, one scale a row, tensor by tensor from the store into the store.

Memory: the largest tensor once as int8 and a block of rows (or, where the class keeps [in, out], the tensor once as
it is stored); never the whole model. The result is a function of the source alone.
"""

import json
from collections.abc import Sequence
from typing import Final

import torch

from llmos_cli.errors import Damaged
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.limits import MiB
from llmos_cli.formats.manifest import FileEntry, Manifest, Recipe
from llmos_cli.formats.safetensors import TensorInfo
from llmos_cli.models.config import CONFIG_FILE, read_config
from llmos_cli.models.quantized import quantize_rows
from llmos_cli.models.weights import TORCH_DTYPES, read_tensor, tensor_bytes
from llmos_cli.progress import Progress, Task
from llmos_cli.quantize.plan import Quantized, QuantizePlan, plan_int8
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import FileReader, open_file
from llmos_cli.store.transaction import Tensor, Transaction

WEIGHTS_FILE: Final = "model.safetensors"
_BLOCK_BYTES: Final = MiB  # fits a core's cache
# Whatever else holds weights stays behind: beside int8 ones it would be a second, larger model.
_WEIGHT_FILES: Final = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5",
    ".msgpack", ".onnx", ".npz",
)  # fmt: skip


def make_int8(tx: Transaction, source: Manifest, recipe: Recipe, *, progress: Progress) -> Manifest:
    """Add the int8 form of the model `source` to the transaction; what it returns is yet to be committed.

    Raises Damaged naming the tensor for a weight that is NaN or infinite.
    """
    store = tx.store
    plan = plan_int8(store, source)
    with progress.task("quantizing", total=plan.bytes_before) as task:
        weights = tx.add_tensors(WEIGHTS_FILE, _tensors(store, plan, task))
    config = tx.add_bytes(CONFIG_FILE, _config(store, source, plan))
    meta: dict[str, Json] = {
        "scheme": "int8",
        "bits_per_weight": round(plan.bits_per_weight, 3),
        "quantized": len(plan.quantized),
        "parameters": plan.parameters,
        "kept": dict(plan.reasons),
    }
    return Manifest("model", (*_companions(source), config, weights), meta, recipe)


def _config(store: Store, manifest: Manifest, plan: QuantizePlan) -> bytes:
    values = read_config(store, manifest) | {"quantization_config": plan.scheme.config()}
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _companions(manifest: Manifest) -> list[FileEntry]:
    """The files that travel with the weights: tokenizer, generation defaults, texts."""
    return [
        entry
        for entry in manifest.files
        if entry.path != CONFIG_FILE
        and not entry.path.startswith("training/")
        and not entry.path.endswith(_WEIGHT_FILES)
    ]


def _tensors(store: Store, plan: QuantizePlan, task: Task) -> Sequence[Tensor]:
    readers: dict[str, FileReader] = {}

    def reader(entry: FileEntry) -> FileReader:
        return readers.setdefault(entry.path, open_file(store, entry))

    tensors = [_kept(reader(entry), info, task) for entry, info in plan.kept.values()]
    for item in plan.quantized.values():
        tensors += _Source(reader(item.entry), item, task).tensors()
    return tensors


def _kept(reader: FileReader, info: TensorInfo, task: Task) -> Tensor:
    def data() -> memoryview:
        tensor = _finite(read_tensor(reader, info), info.name)
        task.advance(info.end - info.start)
        return tensor_bytes(tensor)

    return Tensor(info.name, info.dtype, info.shape, data)


class _Source:
    """One weight and its scales, to be asked for in this order: what the weight leaves behind are the scales only."""

    def __init__(self, reader: FileReader, item: Quantized, task: Task) -> None:
        self._reader = reader
        self._item = item
        self._task = task
        self._scale = torch.empty(0)

    def tensors(self) -> list[Tensor]:
        item = self._item
        weight = Tensor(item.info.name, "I8", (item.rows, item.columns), self._weight_bytes)
        return [weight, *(Tensor(name, "F32", (item.rows, 1), self._scale_bytes) for name in item.scale_names)]

    def _weight_bytes(self) -> memoryview:
        weight, self._scale = self._quantize()
        self._task.advance(self._item.info.end - self._item.info.start)
        return tensor_bytes(weight)

    def _scale_bytes(self) -> memoryview:
        return tensor_bytes(self._scale)

    def _quantize(self) -> tuple[torch.Tensor, torch.Tensor]:
        item = self._item
        weight = torch.empty(item.rows, item.columns, dtype=torch.int8)
        scale = torch.empty(item.rows, 1, dtype=torch.float32)
        whole = read_tensor(self._reader, item.info).t() if item.transposed else None
        step = max(1, _BLOCK_BYTES // (item.columns * TORCH_DTYPES[item.info.dtype].itemsize))
        for first in range(0, item.rows, step):
            last = min(first + step, item.rows)
            block = self._rows(first, last) if whole is None else whole[first:last]
            weight[first:last], scale[first:last] = quantize_rows(block)
        _finite(scale, item.info.name)
        return weight, scale

    def _rows(self, first: int, last: int) -> torch.Tensor:
        info = self._item.info
        row = (info.end - info.start) // self._item.rows
        part = TensorInfo(
            info.name, info.dtype, (last - first, *info.shape[1:]), info.start + first * row, info.start + last * row
        )
        return read_tensor(self._reader, part)


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 2 and not bool(torch.isfinite(tensor).all()):
        raise Damaged(
            f"tensor {name!r} holds a value that is not a finite number",
            hint="the model diverged or was damaged before it was added; use an earlier checkpoint",
        )
    return tensor

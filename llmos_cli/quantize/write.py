"""Quantized weights, tensor by tensor from the store into the store.

Memory: the largest tensor once in its new form and a block of rows (or, where the class keeps [in, out], the tensor
once as it is stored); never the whole model. What is made is a function of the source, the form and, where values are
calibrated, of them.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

import torch

from llmos_cli.errors import Damaged
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.limits import MiB
from llmos_cli.formats.manifest import FileEntry, Manifest, Recipe
from llmos_cli.formats.safetensors import TensorInfo
from llmos_cli.models.config import CONFIG_FILE, read_config
from llmos_cli.models.quantized import PACKED, SHAPE, WEIGHT, pack_nibbles, quantize_rows, quantize_rows_fp8
from llmos_cli.models.schemes import Form
from llmos_cli.models.weights import TORCH_DTYPES, read_tensor, tensor_bytes
from llmos_cli.progress import Progress, Task
from llmos_cli.quantize import grid
from llmos_cli.quantize.grid import Grid
from llmos_cli.quantize.plan import Quantized, QuantizePlan
from llmos_cli.quantize.prune import prune
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import FileReader, open_file
from llmos_cli.store.transaction import Tensor, Transaction

WEIGHTS_FILE: Final = "model.safetensors"
_DTYPES: Final = {"int": torch.int8, "float": torch.float8_e4m3fn}
_TO_ROWS: Final = {"int": quantize_rows, "float": quantize_rows_fp8}
_BLOCK_BYTES: Final = MiB  # fits a core's cache
# Whatever else holds weights stays behind: beside int8 ones it would be a second, larger model.
_WEIGHT_FILES: Final = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5",
    ".msgpack", ".onnx", ".npz",
)  # fmt: skip


Rounding = Callable[[torch.Tensor, int, torch.dtype], Grid]
"""From rows of a weight, a group's size and the dtype of scales to values of four bits."""
ROUNDINGS: Final[dict[str, Rounding]] = {"rtn": grid.rtn, "search": grid.search, "hqq": grid.hqq}


class Calibrated(Protocol):
    """What was found for a stored tensor by the inputs of layers, if it was."""

    def grid(self, name: str) -> Grid | None:
        """Its values."""

    def factor(self, name: str) -> torch.Tensor | None:
        """What the columns of a matrix are multiplied by, or the weights of a norm divided by."""


class Nothing:
    """Nothing was."""

    def grid(self, name: str) -> Grid | None:
        return None

    def factor(self, name: str) -> torch.Tensor | None:
        return None


def write_quantized(
    tx: Transaction,
    source: Manifest,
    recipe: Recipe,
    plan: QuantizePlan,
    *,
    asked: Form,
    rounding: Rounding = grid.rtn,
    calibrated: Calibrated,
    sparsity: str | None = None,
    progress: Progress,
) -> Manifest:
    """Add the quantized form of the model `source` to the transaction; what it returns is yet to be committed.

    Raises Damaged naming the tensor for a weight that is NaN or infinite.
    """
    store = tx.store
    with progress.task("quantizing", total=plan.bytes_before) as task, _threads() as pool:
        weights = tx.add_tensors(WEIGHTS_FILE, _tensors(store, plan, rounding, calibrated, sparsity, pool, task))
    config = tx.add_bytes(CONFIG_FILE, _config(store, source, plan))
    meta: dict[str, Json] = {
        "scheme": asked.name,
        "bits_per_weight": round(plan.bits_per_weight, 3),
        "quantized": len(plan.quantized),
        "parameters": plan.parameters,
        "kept": dict(plan.reasons),
    }
    if asked.group:
        meta["group"] = asked.group
    forms = Counter(item.form.label for item in plan.quantized.values())
    if len(forms) > 1:
        meta["forms"] = dict(sorted(forms.items()))  # how many tensors of each; config.json names them
    if sparsity is not None:
        meta["sparsity"] = sparsity
    return Manifest("model", (*_companions(source), config, weights), meta, recipe)


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use, for a block of rows each: blocks are too small to be divided."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(before, thread_name_prefix="llmos-quantize") as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


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


def _tensors(
    store: Store,
    plan: QuantizePlan,
    rounding: Rounding,
    calibrated: Calibrated,
    sparsity: str | None,
    pool: ThreadPoolExecutor,
    task: Task,
) -> Sequence[Tensor]:
    readers: dict[str, FileReader] = {}

    def reader(entry: FileEntry) -> FileReader:
        return readers.setdefault(entry.path, open_file(store, entry))

    tensors = [_kept(reader(entry), info, calibrated, task) for entry, info in plan.kept.values()]
    for item in plan.quantized.values():
        tensors += _Source(
            reader(item.entry), item, rounding, calibrated, sparsity if item.inner else None, pool, task
        ).tensors()
    return tensors


def _kept(reader: FileReader, info: TensorInfo, calibrated: Calibrated, task: Task) -> Tensor:
    def data() -> memoryview:
        tensor = _finite(read_tensor(reader, info), info.name)
        factor = calibrated.factor(info.name)
        if factor is not None:
            tensor = (tensor.float() / factor).to(tensor.dtype)
        task.advance(info.end - info.start)
        return tensor_bytes(tensor)

    return Tensor(info.name, info.dtype, info.shape, data)


class _Source:
    """One weight and its scales, to be asked for in this order: what the weight leaves behind are the scales only."""

    def __init__(
        self,
        reader: FileReader,
        item: Quantized,
        rounding: Rounding,
        calibrated: Calibrated,
        sparsity: str | None,
        pool: ThreadPoolExecutor,
        task: Task,
    ) -> None:
        self._reader = reader
        self._item = item
        self._rounding, self._calibrated = rounding, calibrated
        self._sparsity = sparsity
        self._pool, self._task = pool, task
        self._scale = torch.empty(0)

    def tensors(self) -> list[Tensor]:
        item, form = self._item, self._item.form
        if not form.packed:
            kind = "I8" if form.kind == "int" else "F8_E4M3"
            weight = [Tensor(item.info.name, kind, (item.rows, item.columns), self._weight_bytes)]
        else:
            stem = item.info.name.removesuffix(WEIGHT)
            shape = torch.tensor([item.rows, item.columns])
            words = item.columns * form.bits // 32
            weight = [
                Tensor(stem + PACKED, "I32", (item.rows, words), self._weight_bytes),
                Tensor(stem + SHAPE, "I64", (2,), lambda: tensor_bytes(shape)),
            ]
        scales = (item.rows, item.columns // form.group if form.group else 1)
        return weight + [Tensor(name, item.scale_dtype, scales, self._scale_bytes) for name in item.scale_names]

    def _weight_bytes(self) -> memoryview:
        weight, self._scale = self._quantize()
        self._task.advance(self._item.info.end - self._item.info.start)
        return tensor_bytes(weight)

    def _scale_bytes(self) -> memoryview:
        return tensor_bytes(self._scale)

    def _quantize(self) -> tuple[torch.Tensor, torch.Tensor]:
        item, form = self._item, self._item.form
        if form.packed and (known := self._calibrated.grid(item.info.name)):
            return pack_nibbles(known.values), _finite(known.scale, item.info.name)
        groups, kept = (item.columns // form.group if form.group else 1), TORCH_DTYPES[item.scale_dtype]
        stored = (torch.int32, form.bits * item.columns // 32) if form.packed else (_DTYPES[form.kind], item.columns)
        weight = torch.empty(item.rows, stored[1], dtype=stored[0])
        scale = torch.empty(item.rows, groups, dtype=kept)
        whole = read_tensor(self._reader, item.info).t() if item.transposed else None
        factor = self._calibrated.factor(item.info.name)
        step = max(1, _BLOCK_BYTES // (item.columns * TORCH_DTYPES[item.info.dtype].itemsize))

        @torch.inference_mode()  # a property of the thread
        def one(first: int) -> None:
            last = min(first + step, item.rows)
            block = self._rows(first, last) if whole is None else whole[first:last]
            if factor is not None:
                block = block.float() * factor
            if self._sparsity is not None:
                block = prune(block, self._sparsity)
            if form.packed:
                found = self._rounding(block, form.group, kept)
                weight[first:last], scale[first:last] = pack_nibbles(found.values), found.scale
            else:
                weight[first:last], scale[first:last] = _TO_ROWS[form.kind](block)

        for _ in self._pool.map(one, range(0, item.rows, step)):
            pass
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

"""What a run would need and what there is: the memory of a process, the room for checkpoints, the cheapest layout that
fits. Nothing is loaded and torch is not imported: sizes come from config.json and from where tensors lie.

Weights, gradients and optimizer state are counted; what a block keeps for its backward pass follows a rule for
transformers. Three runs on a CPU peaked at 1.00, 1.01 and 1.05 of what this says.
"""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Final

from llmos_cli.errors import UsageError
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.limits import MiB
from llmos_cli.store.disk.features import probe_machine
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.local import Store
from llmos_cli.train.config import TrainConfig
from llmos_cli.train.inputs import dataset_number, model_config
from llmos_cli.train.plan import Plan

_FLOAT: Final = 4  # weights are trained in fp32, whatever the arithmetic
_MOMENTS: Final = 2  # AdamW's, a parameter
_LIBRARIES: Final = 450 * MiB  # python, torch and transformers at rest, on a CPU; measured
_WRITER: Final = 100 * MiB  # what a checkpoint that is being compressed holds; measured
_HIDDEN_KEPT: Final = 13  # vectors of the hidden size that a block keeps for each token, in fp32
_INNER_KEPT: Final = 4  # and of its inner size
_LOGITS_KEPT: Final = 3  # logits, their log-softmax, its gradient
_HALF: Final = 0.6  # of what is kept, when the arithmetic is bf16
_SPARE: Final = 0.9  # of what is free; a machine that swaps trains at no speed


@dataclass(frozen=True)
class Device:
    """Where to compute; `memory` is what is free there."""

    name: str
    memory: int


@dataclass(frozen=True)
class Resources:
    """`devices` are cards; without any, the processor computes, and `memory` is all there is."""

    devices: tuple[Device, ...]
    cores: int
    memory: int
    disk: int


@dataclass(frozen=True)
class Shape:
    """A model's size, as far as memory goes."""

    parameters: int
    hidden: int
    inner: int
    layers: int
    vocab: int


@dataclass(frozen=True)
class Need:
    """Bytes of one process. `copy` is the checkpoint's, in main memory; the rest is where the model computes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    copy: int
    libraries: int

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def total(self) -> int:
        return self.device + self.copy + self.libraries


@dataclass(frozen=True)
class Layout:
    """A way to compute the same steps: what one process holds, and what to add to the command for it."""

    processes: int
    accumulate: int
    precision: str
    need: Need
    fits: bool

    @property
    def options(self) -> str:
        """As one would type it."""
        words = [f"--procs {self.processes}"] if self.processes > 1 else []
        words += [f"--accumulate {self.accumulate}"] if self.accumulate > 1 else []
        words += [f"--precision {self.precision}"] if self.precision != "fp32" else []
        return " ".join(words)


@dataclass(frozen=True)
class Prospect:
    """What was found, what the run needs as it is asked for, and the cheapest layout that fits (None: none does)."""

    resources: Resources
    shape: Shape
    asked: Layout
    proposed: Layout | None
    checkpoint: int  # bytes of one, before the store makes it smaller


def find_resources(store: Store) -> Resources:
    """Cards, processor, memory and disk, as free now."""
    machine = probe_machine()
    return Resources(_cards(), machine.usable_cores, machine.available, shutil.disk_usage(store.root).free)


def foresee(store: Store, plan: Plan, resources: Resources) -> Prospect:
    """What a planned run takes and how it could fit; raises UsageError if its config.json does not say its sizes."""
    shape = shape_of(store, plan)
    seq_len = dataset_number(plan.data, "seq_len", plan.data_label)
    layouts = list(_layouts(shape, plan.config, seq_len, resources))
    return Prospect(
        resources,
        shape,
        layouts[0],
        next((layout for layout in layouts if layout.fits), None),
        (1 + _MOMENTS) * _FLOAT * shape.parameters,
    )


def estimate(shape: Shape, rows: int, seq_len: int, *, precision: str, processes: int = 1) -> Need:
    """What each of so many processes holds when it computes `rows` at a time."""
    # While gradients flow back through a block, they take as much again for that one.
    block = (_HIDDEN_KEPT * shape.hidden + _INNER_KEPT * shape.inner) * _FLOAT
    kept = (shape.layers + 1) * block * (_HALF if precision == "bf16" else 1.0)
    weights = _FLOAT * shape.parameters
    return Need(
        weights=weights,
        gradients=weights if processes == 1 else 2 * weights,  # theirs and the sum on its way
        optimizer=_MOMENTS * weights,
        activations=int(rows * seq_len * (kept + _LOGITS_KEPT * shape.vocab * _FLOAT)),
        copy=(1 + _MOMENTS) * weights + _WRITER,
        libraries=_LIBRARIES,
    )


def shape_of(store: Store, plan: Plan) -> Shape:
    """The size of the model that a plan trains; counted in the store if it lies there, else by its configuration."""
    source = plan.resume.manifest if plan.resume else plan.model
    if source is not None:
        table = model_config(store, source, "the model")
        stored = sum(prod(info.shape) for _, info in tensor_table(store, source).values())
        return replace(_shape(table, "the model"), parameters=stored)
    if plan.config.config is not None:
        table = {"vocab_size": dataset_number(plan.data, "vocab_size", "the dataset"), **plan.config.config}
        return _shape(table, "--config")
    depth = plan.config.depth or 1
    hidden = 64 * depth
    encoder = plan.data.meta.get("task") in ("mlm", "classify", "pair")
    own: dict[str, Json] = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden if encoder else -(-hidden * 8 // 3 // 64) * 64,
        "num_hidden_layers": depth,
        "vocab_size": dataset_number(plan.data, "vocab_size", "the dataset"),
        "tie_word_embeddings": True,
    }
    if encoder:
        own["max_position_embeddings"] = dataset_number(plan.data, "seq_len", "the dataset")
    return _shape(own if encoder else own | {"gated": True}, "the model")


def _shape(table: Mapping[str, Json], what: str) -> Shape:
    """Sizes by the names that families of transformers give them; the parameters by the rule for such blocks."""
    hidden = _number(table, what, "hidden_size", "n_embd", "d_model")
    layers = _number(table, what, "num_hidden_layers", "n_layer", "num_layers")
    inner = _number(table, what, "intermediate_size", "n_inner", "d_ff", default=4 * hidden)
    vocab = _number(table, what, "vocab_size")
    heads = _number(table, what, "num_attention_heads", "n_head", default=1)
    groups = _number(table, what, "num_key_value_heads", default=heads)
    wide = _number(table, what, "head_dim", default=max(1, hidden // heads))
    gated = "gated" in table if "model_type" not in table else "rms_norm_eps" in table
    block = 2 * hidden * wide * (heads + groups) + (3 if gated else 2) * hidden * inner + 2 * hidden
    if gated:
        rest = hidden if table.get("tie_word_embeddings") else hidden + vocab * hidden
    else:  # places are learned, and a masked model transforms before it predicts
        places = _number(table, what, "max_position_embeddings", "n_positions", default=1)
        rest = places * hidden + (hidden * hidden if table.get("model_type") != "gpt2" else 0)
    return Shape(layers * block + vocab * hidden + rest, hidden, inner, layers, vocab)


def _number(table: Mapping[str, Json], what: str, *names: str, default: int | None = None) -> int:
    for name in names:
        value = table.get(name)
        if type(value) is int and value > 0:
            return value
    if default is None:
        raise UsageError(f"config.json of {what} does not say its {names[0]}")
    return default


def _layouts(shape: Shape, config: TrainConfig, seq_len: int, resources: Resources) -> Iterator[Layout]:
    """From what was asked for to what takes the most: smaller parts, bf16 on cards, then several cards."""
    precisions = dict.fromkeys((config.precision, "bf16") if resources.devices else (config.precision,))
    for processes in range(1, max(1, len(resources.devices)) + 1):
        if config.batch % processes:
            continue
        own = config.batch // processes
        for precision in precisions:
            for parts in range(config.accumulate if processes == 1 else 1, own + 1):
                if own % parts == 0:
                    need = estimate(shape, own // parts, seq_len, precision=precision, processes=processes)
                    yield Layout(processes, parts, precision, need, _fits(need, processes, resources))


def _fits(need: Need, processes: int, resources: Resources) -> bool:
    if not resources.devices:
        return need.total <= _SPARE * resources.memory
    card = min(device.memory for device in resources.devices[:processes])
    host = need.copy + processes * need.libraries  # the first process alone saves
    return need.device <= _SPARE * card and host <= _SPARE * resources.memory


def _cards() -> tuple[Device, ...]:
    """NVIDIA's, by their own tool: asking torch would take seconds and memory."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ()
    found = [line.rpartition(",") for line in lines]
    return tuple(Device(name.strip(), int(free) * MiB) for name, _, free in found if free.strip().isdigit())

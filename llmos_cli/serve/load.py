"""An engine straight out of the store: no checkout, and the time each part took."""

import time
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from llmos_cli.errors import UsageError
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.device import pick_device
from llmos_cli.models.heads import head_of
from llmos_cli.models.load import load_config, load_model
from llmos_cli.models.quantized import Int4Linear, Int8Linear
from llmos_cli.models.tokenizers import load_tokenizer
from llmos_cli.progress import Progress
from llmos_cli.serve.engine import Engine
from llmos_cli.serve.reader import Reader
from llmos_cli.serve.runner.lean import LeanRunner, unfit
from llmos_cli.serve.runner.linears import Kernels, choose
from llmos_cli.store.local import Store

CACHE_BYTES: Final = 2 << 30  # for keys and values of all texts


@dataclass(frozen=True)
class Loaded:
    """What answers, the manifest it came from, where it computes and how, and the seconds that each part took."""

    engine: Engine | Reader
    manifest: Manifest
    device: str
    kernels: dict[str, str]
    seconds: dict[str, float]


def load_writer(store: Store, manifest: Manifest, progress: Progress) -> Engine:
    """An engine that makes texts; raises UsageError for a model that only reads them."""
    loaded = load_engine(store, manifest, progress)
    if isinstance(loaded.engine, Reader):
        raise UsageError(
            "this model reads texts and does not write them", hint="llmos serve REF answers what it can say of texts"
        )
    return loaded.engine


def load_engine(
    store: Store, manifest: Manifest, progress: Progress, *, kernel: str | None = None, dtype: str | None = None
) -> Loaded:
    """Load weights and tokenizer, and find out how to compute with them where `kernel` and `dtype` do not say."""
    clock = _Clock()
    tokenizer = load_tokenizer(store, manifest)
    clock.lap("tokenizer")
    device = pick_device()
    head = head_of(load_config(store, manifest))
    if head in ("classify", "masked"):
        model = load_model(store, manifest, device=device, head=head, progress=progress)
        reader = Reader(model, tokenizer, classifies=head == "classify")
        clock.lap("model")
        return Loaded(reader, manifest, str(device), {"runner": "transformers"}, clock.laps)
    model = load_model(store, manifest, device=device, progress=progress)
    clock.lap("model")
    reason = unfit(model)
    if reason is not None:
        return Loaded(Engine(model, tokenizer), manifest, str(device), {"runner": "transformers"}, clock.laps)
    kernels = pick_kernels(model) if device.type == "cpu" else Kernels(_name(_dtype(model)))
    if dtype is not None:
        kernels = replace(kernels, dtype=dtype)
    if kernel is not None:
        kernels = replace(kernels, int8=kernel, int4=kernel)
    clock.lap("kernels")
    engine = Engine(model, tokenizer, runner=LeanRunner(model, kernels, budget=CACHE_BYTES))
    clock.lap("build")
    return Loaded(engine, manifest, str(device), kernels.names(), clock.laps)


def pick_kernels(model: Any) -> Kernels:
    """What is fastest on this processor for the layers that this model has most of."""
    forms, shapes = set(), set()
    for module in model.modules():
        form = {nn.Linear: "dense", Int8Linear: "int8", Int4Linear: "int4"}.get(type(module))
        if form:
            forms.add(form)
            shapes.add((module.out_features, module.in_features))
    layers = [shape for shape in shapes if shape[0] != model.config.vocab_size] or list(shapes)
    return choose(max(layers, key=lambda shape: shape[0] * shape[1]), forms=forms, dtype=_dtype(model))


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = model.get_input_embeddings()(torch.zeros(1, dtype=torch.long, device=model.device)).dtype
    return dtype


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

"""Models out of the store: configuration, weights and generation defaults put together by transformers, in memory.

The parameters are exactly the stored bits in the stored dtype, unless another dtype is asked for; anything missing,
left over or of another shape is an error, never a random value. No network, no code from model files, no output.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from llmos_cli.errors import Damaged, LlmosError, UsageError
from llmos_cli.formats import canonical
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models import config as configs
from llmos_cli.models.adapters import (
    add_adapter,
    base_of,
    check_peft,
    is_adapter,
    load_adapter_state,
    merge_adapter,
    read_adapter_config,
)
from llmos_cli.models.heads import Head, check_head, model_class
from llmos_cli.models.quantized import SCALE, prepare_quantized
from llmos_cli.models.quiet import quiet
from llmos_cli.models.schemes import read_scheme
from llmos_cli.models.weights import load_state_dict
from llmos_cli.progress import Progress, Silent
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file

load_config = configs.load_config
llama_config = configs.llama_config

_GENERATION_FILE = "generation_config.json"
_REPORT = "LOAD REPORT"  # transformers' table of keys that do not fit, which are errors here
_NAMED = 5  # keys an error lists before it counts the rest


def load_model(
    store: Store,
    manifest: Manifest,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    head: Head = "causal",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """The stored model, plain or int8, in eval mode on `device`.

    `dtype` converts floating parameters (not int8 weights and their scales); without it they stay as stored, except
    that modules which transformers declares to need float32 are widened to it. The caller's random state is untouched.
    """
    progress = progress or Silent()
    config = configs.load_config(store, manifest)
    check_head(config, head)
    if is_adapter(manifest):
        model = merge_adapter(load_adapter(store, manifest, head=head, dtype=dtype, progress=progress)).eval()
    else:
        state = load_state_dict(store, manifest, progress=progress)
        model = build_model(config, state, dtype=dtype, head=head, progress=progress)
    entry = manifest.file(_GENERATION_FILE)
    if entry is not None:
        model.generation_config = _generation_config(read_file(store, entry))
    return model.to(device)


def load_adapter(
    store: Store,
    manifest: Manifest,
    *,
    head: Head,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Any:
    """A stored adapter beside its base's weights, in peft's wrapper, as it was when it was saved."""
    check_peft()
    config = configs.load_config(store, manifest)
    base = adapt_model(store, base_of(manifest), config, head=head, seed=0, dtype=dtype, progress=progress)
    wrapper = add_adapter(base.model, read_adapter_config(store, manifest), seed=0)
    load_adapter_state(wrapper, load_state_dict(store, manifest, progress=progress))
    return wrapper


@dataclass(frozen=True)
class Adapted:
    """A model with a head that the stored one did not have; `new` names the weights that were drawn, `left` those that
    have no place in it."""

    model: PreTrainedModel
    new: tuple[str, ...]
    left: tuple[str, ...]


def adapt_model(
    store: Store,
    manifest: Manifest,
    config: PretrainedConfig,
    *,
    head: Head,
    seed: int,
    dtype: torch.dtype | None = torch.float32,
    progress: Progress | None = None,
) -> Adapted:
    """The stored model's body under a head of `config`, which is drawn by `seed` where it was not stored.

    Raises Damaged if a weight of the body itself is missing or has another shape.
    """
    state = load_state_dict(store, manifest, progress=progress)
    model, info = _put_together(config, state, dtype=dtype, head=head, seed=seed, progress=progress)
    shapes = {name for name, *_ in info["mismatched_keys"]}
    new, left = {*info["missing_keys"], *shapes}, set(info["unexpected_keys"])
    body = f"{model.base_model_prefix}."
    # A pooler is part of a head: models for tokens have none.
    torn = [name for name in new if name.startswith(body) and not name.startswith(f"{body}pooler.")]
    if torn:
        raise Damaged(f"the weights do not fit {configs.CONFIG_FILE}: missing {_list(torn)}")
    return Adapted(model.eval(), tuple(sorted(new)), tuple(sorted(left)))


def build_model(
    config: PretrainedConfig,
    state: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    head: Head = "causal",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A model of `config` that takes the tensors of `state` as its own memory; raises Damaged if they do not fit."""
    model, info = _put_together(config, state, dtype=dtype, head=head, seed=0, progress=progress)
    _check_fit(info)
    return model.eval()


def _put_together(
    config: PretrainedConfig,
    state: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None,
    head: Head,
    seed: int,
    progress: Progress | None,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model, and transformers' account of the keys that did not fit; those are drawn by `seed`."""
    cls = model_class(config, head)
    quantization = getattr(config, "quantization_config", None)
    scheme = None if quantization is None else read_scheme(quantization)

    def prepare(model: PreTrainedModel) -> None:
        if scheme is not None:
            prepare_quantized(model, scheme.config())
        if dtype is None:
            _adopt_dtypes(model, state)

    config = copy.deepcopy(config)
    if scheme is not None:
        # transformers would hand the model to its own quantizer, which needs another package and decompresses it.
        del config.quantization_config
    prepared = _with_last_step(cls, prepare)
    try:
        with quiet() as messages, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model, info = prepared.from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                dtype=dtype or _main_dtype(state),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
            )
    except configs.BAD_CONFIG as exc:
        raise Damaged(f"{configs.CONFIG_FILE} and the weights make no model: {configs.one_line(exc)}") from exc
    model.__class__ = cls
    if scheme is not None:
        model.config.quantization_config = quantization
        model.requires_grad_(False)
    for message in messages:
        if _REPORT not in message:
            (progress or Silent()).warn(message)
    return model, info


def new_model(config: PretrainedConfig, *, seed: int, head: Head = "causal") -> PreTrainedModel:
    """A model with random float32 weights, a function of `config` and `seed`; the caller's random state is kept."""
    cls = model_class(config, head)
    config = copy.deepcopy(config)
    config.dtype = torch.float32
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return cls(config).float()
    except configs.BAD_CONFIG as exc:
        raise UsageError(f"this configuration makes no model: {configs.one_line(exc)}") from exc


def meta_model(config: PretrainedConfig, head: Head = "causal") -> PreTrainedModel:
    """The model's modules and shapes without memory for its weights."""
    cls = model_class(config, head)
    try:
        with quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            return cls(config)
    except configs.BAD_CONFIG as exc:
        raise Damaged(f"{configs.CONFIG_FILE} makes no model: {configs.one_line(exc)}") from exc


def _with_last_step(cls: type[PreTrainedModel], step: Callable[[PreTrainedModel], None]) -> type[PreTrainedModel]:
    """`cls` with a constructor that ends in `step`: the one place where from_pretrained lets modules be replaced."""

    def __init__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it becomes a method
        cls.__init__(self, *args, **kwargs)
        step(self)

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


def _adopt_dtypes(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> None:
    """Give each parameter of a meta model the dtype it is stored in, since transformers casts to the parameter's."""
    prefix = f"{model.base_model_prefix}."
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        stored = state.get(name, state.get(name.removeprefix(prefix)))
        if stored is None or stored.dtype == parameter.dtype:
            continue
        if not (stored.dtype.is_floating_point and parameter.dtype.is_floating_point) or stored.dtype.itemsize < 2:
            raise LlmosError(f"tensor {name!r} is stored as {stored.dtype}, which this model cannot compute with")
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.register_parameter(name.rpartition(".")[2], torch.nn.Parameter(parameter.to(stored.dtype)))


def _main_dtype(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype of most floating weights; scales of quantized weights do not count."""
    sizes: Counter[torch.dtype] = Counter()
    for name, tensor in state.items():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 2 and not name.endswith(SCALE):
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _check_fit(info: Mapping[str, Any]) -> None:
    problems = []
    if info["missing_keys"]:
        problems.append(f"missing {_list(info['missing_keys'])}")
    if info["unexpected_keys"]:
        problems.append(f"unexpected {_list(info['unexpected_keys'])}")
    if info["mismatched_keys"]:
        shapes = [f"{name} {list(stored)} instead of {list(model)}" for name, stored, model in info["mismatched_keys"]]
        problems.append(f"of another shape {_list(shapes)}")
    if problems:
        raise Damaged(
            f"the weights do not fit {configs.CONFIG_FILE}: {'; '.join(problems)}",
            hint="llmos show REF lists the tensors; add the model again from a complete folder",
        )


def _list(names: Any) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more


def _generation_config(data: bytes) -> GenerationConfig:
    values = canonical.loads(data, _GENERATION_FILE)
    if not isinstance(values, dict):
        raise Damaged(f"{_GENERATION_FILE} is not a table")
    try:
        with quiet():
            return GenerationConfig.from_dict(values)
    except configs.BAD_CONFIG as exc:
        raise Damaged(f"{_GENERATION_FILE} is not valid: {configs.one_line(exc)}") from exc

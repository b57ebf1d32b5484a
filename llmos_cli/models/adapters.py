"""LoRA adapters: a few small matrices beside a base model's weights, by peft.

An adapter's manifest holds, besides its own files in peft's layout, all of the base's in the folder `base/`: the same
objects, so they cost nothing, and whatever keeps, moves or checks the adapter does it with the base.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Final

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats import canonical
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.models.config import CONFIG_FILE
from llmos_cli.models.quiet import quiet
from llmos_cli.models.tokenizers import tokenizer_entries
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
BASE_FOLDER: Final = "base/"
ADAPTER_OF: Final = "adapter_of"  # in a manifest's meta: the base's id


def is_adapter(manifest: Manifest) -> bool:
    """Whether a manifest is an adapter of ours, or a checkpoint of one."""
    return manifest.file(ADAPTER_CONFIG) is not None and manifest.file(BASE_FOLDER + CONFIG_FILE) is not None


def base_entries(base: Manifest) -> list[FileEntry]:
    """The base's files as an adapter's manifest holds them; its tokenizer is the adapter's own."""
    own = {entry.path for entry in tokenizer_entries(base)}
    return [
        replace(entry, path=BASE_FOLDER + entry.path)
        for entry in base.files
        if "/" not in entry.path and entry.path not in own
    ]


def base_of(adapter: Manifest) -> Manifest:
    """The base model that an adapter's manifest holds."""
    files = [
        replace(entry, path=entry.path.removeprefix(BASE_FOLDER))
        for entry in adapter.files
        if entry.path.startswith(BASE_FOLDER)
    ]
    return Manifest("model", tuple(files), {}, None)


def check_peft() -> None:
    """Raise UsageError where peft is not installed."""
    if find_spec("peft") is None:
        raise UsageError("adapters need the package peft", hint="pip install 'llmos[lora]'")


def describe_adapter(
    model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str], new: Sequence[str]
) -> dict[str, Any]:
    """adapter_config.json of a new adapter: `targets` by the last part of their names (none: every linear layer of the
    body); the modules that hold `new` weights are trained whole. Raises UsageError for a target that is not there."""
    layers = {
        name.rpartition(".")[2]
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }
    unknown = sorted(set(targets) - layers)
    if unknown:
        raise UsageError(
            f"{type(model).__name__} has no linear layer named {unknown[0]!r}",
            hint=f"it has {', '.join(sorted(layers))}",
        )
    whole = sorted({_owner(model, name) for name in new})
    return {
        "base_model_name_or_path": BASE_FOLDER.rstrip("/"),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": whole or None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(targets or layers),
        "task_type": None,
    }


def add_adapter(model: PreTrainedModel, table: Mapping[str, Any], *, seed: int) -> Any:
    """Put a new adapter, drawn by `seed`, beside the weights of `model`, which alone is then trained; returns peft's
    wrapper, which knows what of `model` is the adapter."""
    check_peft()
    import peft

    try:
        config = peft.LoraConfig(**{key: value for key, value in table.items() if key != "peft_type"})
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return peft.get_peft_model(model, config)
    except (TypeError, ValueError, AttributeError, KeyError) as exc:
        raise Damaged(f"{ADAPTER_CONFIG} does not fit the model: {' '.join(str(exc).split())[:300]}") from exc


def adapter_state(wrapper: Any) -> dict[str, torch.Tensor]:
    """The adapter's own tensors, under the names that peft gives them in a file. (Asked whether embeddings are among
    them, peft would look the base up on a hub; they never are.)"""
    import peft

    state: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(wrapper, save_embedding_layers=False)
    return state


def load_adapter_state(wrapper: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Put a stored adapter's tensors in place, bit for bit; raises Damaged unless they are all there and no others."""
    import peft

    held = adapter_state(wrapper)
    if held.keys() != state.keys() or any(held[name].shape != state[name].shape for name in held):
        raise Damaged(f"{ADAPTER_WEIGHTS} does not fit {ADAPTER_CONFIG}")
    with quiet():
        peft.set_peft_model_state_dict(wrapper, dict(state))


def merge_adapter(wrapper: Any) -> PreTrainedModel:
    """The model with the adapter added to its weights."""
    with quiet():
        merged: PreTrainedModel = wrapper.merge_and_unload()
    return merged


def read_adapter_config(store: Store, manifest: Manifest) -> dict[str, Any]:
    """adapter_config.json of a stored adapter; only what `describe_adapter` writes is read."""
    entry = manifest.file(ADAPTER_CONFIG)
    table = canonical.loads(read_file(store, entry), ADAPTER_CONFIG) if entry else None
    known = ("base_model_name_or_path", "lora_alpha", "lora_dropout", "modules_to_save", "r", "target_modules")
    if not isinstance(table, dict) or table.get("peft_type") != "LORA" or not set(known) <= set(table):
        raise Damaged(f"{ADAPTER_CONFIG} is not that of a LoRA adapter")
    return {key: table[key] for key in known}


def encode_adapter_config(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()


def _owner(model: PreTrainedModel, weight: str) -> str:
    """The module that peft is to train whole for a weight: the child of the model, or of its body, that holds it."""
    parts = weight.split(".")
    return parts[1] if parts[0] == model.base_model_prefix and len(parts) > 2 else parts[0]

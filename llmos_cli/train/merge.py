"""Base and adapter become one model: a commit with two parents, of which only the changed tensors are new."""

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from llmos_cli import __version__
from llmos_cli.errors import NotFound, UsageError
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ObjectId, object_id, parse_id
from llmos_cli.formats.manifest import Manifest, Recipe, encode_manifest
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Progress
from llmos_cli.store.intake.bases import open_base
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.recipes import find_made
from llmos_cli.store.transaction import Commit, begin

if TYPE_CHECKING:
    import torch

_CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Merged:
    """`changed` of `tensors` tensors differ from the base's."""

    commit: Commit
    base: ObjectId
    changed: int
    tensors: int
    made_before: bool


def merge(store: Store, adapter: ObjectId, ref: RefName, *, progress: Progress) -> Merged:
    """Point `ref` to the model that an adapter makes of its base, in the base's dtypes.

    Raises UsageError for what is no adapter, NotFound if the base's manifest is not in the store.
    """
    manifest = read_manifest(store, adapter)
    base_id = manifest.meta.get("adapter_of")
    if manifest.kind not in ("adapter", "checkpoint") or not isinstance(base_id, str):
        raise UsageError(f"@{adapter.short} is no adapter", hint="llmos train NAME --model REF --lora 8 makes one")
    base = parse_id(base_id)
    if not store.index.has(base):
        raise NotFound(f"the base @{base.short} is not in this store", hint="pull it, or train the adapter here")
    recipe = Recipe(
        "merge",
        params={},
        inputs={"model": base, "adapter": adapter},
        tools={"llmos": __version__} | {name: version(name) for name in ("peft", "torch", "transformers")},
    )
    made = find_made(store, recipe)
    with begin(store, purpose="merge", ref=ref) as tx:
        if made is not None:
            found = read_manifest(store, made)
        else:
            from llmos_cli.models.tokenizers import tokenizer_entries
            from llmos_cli.models.weights import state_tensors

            tx.base = open_base(store, base)
            state, changed, architecture = _merged(store, manifest, read_manifest(store, base), progress)
            files = [entry for name in _CONFIGS if (entry := manifest.file(name))] + tokenizer_entries(manifest)
            files.append(tx.add_tensors("model.safetensors", state_tensors(state), metadata={"format": "pt"}))
            meta: dict[str, Json] = {
                "architecture": architecture,
                "changed": changed,
                "parameters": sum(tensor.numel() for tensor in state.values()),
                "tensors": len(state),
            }
            meta |= {key: manifest.meta[key] for key in ("task",) if key in manifest.meta}
            found = Manifest("model", tuple(files), meta, recipe)
        commit = tx.commit(found, message=f"merge: @{adapter.short} into @{base.short}")
    assert commit.id == object_id(encode_manifest(found))
    facts = [found.meta[key] for key in ("changed", "tensors")]
    changed, tensors = (value if isinstance(value, int) else 0 for value in facts)
    return Merged(commit, base, changed, tensors, made is not None)


def _merged(
    store: Store, adapter: Manifest, base: Manifest, progress: Progress
) -> "tuple[dict[str, torch.Tensor], int, str]":
    """The merged state, how much of it is not the base's, and the class of the model."""
    from llmos_cli.models.config import load_config
    from llmos_cli.models.heads import head_of
    from llmos_cli.models.load import load_model
    from llmos_cli.models.quiet import quiet
    from llmos_cli.models.weights import drop_tied, load_state_dict

    with quiet():
        model = load_model(store, adapter, head=head_of(load_config(store, adapter)), progress=progress)
    state = {name: tensor.detach() for name, tensor in drop_tied(model).items()}
    before = load_state_dict(store, base)
    same = sum(
        name in before and before[name].dtype == tensor.dtype and bool((before[name] == tensor).all())
        for name, tensor in state.items()
        if name in before and before[name].shape == tensor.shape
    )
    return state, len(state) - same, type(model).__name__

"""Quantizing as a derivation: the same model and scheme give the same object, and a repeat finds it.

Imports no torch until there is something to compute, so that a repeat returns at once.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

from llmos_cli import __version__
from llmos_cli.errors import Damaged
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, Recipe
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Progress
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.recipes import find_made
from llmos_cli.store.transaction import begin

SCHEME: Final = "int8"


@dataclass(frozen=True)
class QuantizeResult:
    """`bytes_*` are those of the tensors; `kept` says by layer why it was not quantized."""

    id: ObjectId
    made_before: bool
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    kept: dict[str, str]


def quantize_int8(store: Store, source: ObjectId, ref: RefName | None, *, progress: Progress) -> QuantizeResult:
    """Make (or find) the int8 form of the model `source` and move `ref` to it.

    Raises UsageError for what is no model or is quantized already, Damaged for damaged weights; nothing changes then.
    """
    recipe = Recipe(
        "quantize",
        params={"scheme": SCHEME},
        inputs={"model": source},
        # The arithmetic is elementwise, so a build of torch (after the "+") does not matter.
        tools={"llmos": __version__, "torch": version("torch").partition("+")[0]},
    )
    manifest = read_manifest(store, source)
    with begin(store, purpose="quantize", ref=ref) as tx:
        made = find_made(store, recipe)
        if made is not None:
            result = read_manifest(store, made)
        else:
            from llmos_cli.quantize.int8 import make_int8

            result = make_int8(tx, manifest, recipe, progress=progress)
        commit = tx.commit(result, message=f"quantize: {SCHEME}, {result.meta['bits_per_weight']} bits a weight")
    kept, bits = result.meta["kept"], result.meta["bits_per_weight"]
    if not isinstance(kept, dict) or not isinstance(bits, int | float):
        raise Damaged(f"the quantized model @{commit.id.short} has malformed facts")
    return QuantizeResult(
        commit.id,
        made is not None,
        _tensor_bytes(store, manifest),
        _tensor_bytes(store, result),
        float(bits),
        {name: str(reason) for name, reason in kept.items()},
    )


def _tensor_bytes(store: Store, manifest: Manifest) -> int:
    return sum(info.end - info.start for _, info in tensor_table(store, manifest).values())

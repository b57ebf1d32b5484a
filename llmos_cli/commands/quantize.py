"""`llmos quantize`: a smaller model out of a big one."""

import difflib
from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.errors import UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import count, percent, plural, size

if TYPE_CHECKING:
    from llmos_cli.quantize.run import QuantizeResult
    from llmos_cli.ui.output import Output

SCHEMES = ("int8",)
SHOWN_KEPT = 8


def quantize(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="The model or checkpoint.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The ref to move, NAME or NAME:TAG.", show_default=False)],
    *,
    scheme: Annotated[
        str, typer.Option("--scheme", help="How weights are stored: int8 (8 bits, one scale a row).")
    ] = "int8",
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="REF", help="The dataset to compare on.  [default: the one it was trained on]"),
    ] = None,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Compare on this many evenly spaced rows.")] = 128,
) -> None:
    """Make a model smaller and say what that costs in quality.

    Linear layers and the input embedding become int8; what stays is listed with the reason. Perplexity is measured
    before and after. The same model again is found in the store at once.

    Examples:
      llmos quantize tiny tiny-int8 --scheme int8
      llmos quantize base base:int8 --data web --max-rows 32
      llmos quantize tiny tiny-int8 --json
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.quantize.quality import dataset_of, evaluate
    from llmos_cli.quantize.run import quantize_int8
    from llmos_cli.store.leases import hold
    from llmos_cli.store.packs.objects import read_manifest
    from llmos_cli.store.refs.lineage import ref_labels
    from llmos_cli.store.refs.resolve import Resolved, resolve

    here = session(ctx)
    out = here.out
    target = parse_ref(name)
    if scheme not in SCHEMES:
        near = difflib.get_close_matches(scheme, SCHEMES, 1, 0.3)
        raise UsageError(f"unknown scheme {scheme!r}", hint=f"use --scheme {(near or SCHEMES)[0]}")
    with here.open_store() as store:
        source = resolve(store, ref)
        with hold(store, "quantize", [source.id]):
            dataset = resolve(store, data) if data else None
            if dataset is None:
                found = dataset_of(store, read_manifest(store, source.id))
                labels = ref_labels(store).get(found, ()) if found else ()
                dataset = resolve(store, labels[0]) if labels else Resolved(found, None) if found else None
            before = after = None
            if dataset:
                before = evaluate(store, source.id, dataset.id, max_rows=max_rows, progress=out.progress)
            result = quantize_int8(store, source.id, target, progress=out.progress)
            if dataset:
                after = evaluate(store, result.id, dataset.id, max_rows=max_rows, progress=out.progress)
    out.result(
        {
            "id": str(result.id),
            "ref": str(target),
            "kind": "model",
            "scheme": scheme,
            "source": str(source.id),
            "bytes_before": result.bytes_before,
            "bytes_after": result.bytes_after,
            "bits_per_weight": result.bits_per_weight,
            "kept": result.kept,
            "perplexity_before": before.perplexity if before else None,
            "perplexity_after": after.perplexity if after else None,
            "data": str(dataset.id) if dataset else None,
            "rows": after.rows if after else None,
            "made_before": result.made_before,
        }
    )
    out.line(f"{source.label} -> {target} @{result.id.short}")
    out.line(
        f"  weights     {size(result.bytes_before)} -> {size(result.bytes_after)} "
        f"({percent(result.bytes_after, result.bytes_before)}), {result.bits_per_weight:.2f} bits a weight"
    )
    if dataset and before and after:
        change = 100 * (after.perplexity / before.perplexity - 1)
        out.line(
            f"  perplexity  {before.perplexity:.4f} -> {after.perplexity:.4f} ({change:+z.2f} %) "
            f"on {dataset.label}, {count(after.rows)} of {count(after.rows_total)} rows"
        )
    _show_kept(out, result)
    if not dataset:
        out.say("perplexity was not measured: the dataset this model was trained on is not known or not in this store")
        out.hint(f"measure it: llmos quantize {source.label} {target} --data DATASET")
    if result.made_before:
        out.say("this model was quantized before; the stored one was taken")


def _show_kept(out: "Output", result: "QuantizeResult") -> None:
    for layer, reason in list(result.kept.items())[:SHOWN_KEPT]:
        out.line(f"  kept        {layer}: {reason}")
    if len(result.kept) > SHOWN_KEPT:
        out.line(f"  kept        {plural(len(result.kept) - SHOWN_KEPT, 'more layer')}: llmos show @{result.id.short}")

"""`llmos quantize`: a smaller model out of a big one."""

import difflib
from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.errors import UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import parse_size, percent, plural, size

if TYPE_CHECKING:
    from llmos_cli.quantize.run import QuantizeResult
    from llmos_cli.ui.output import Output

SHOWN_KEPT = 8


def quantize(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="The model or checkpoint.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The ref to move, NAME or NAME:TAG.", show_default=False)],
    *,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme", metavar="int8|int4|w8a8|fp8", help="How weights are stored; see below.  [default: int8]"
        ),
    ] = None,
    target_for: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="PROGRAM",
            help="transformers, vllm, llama.cpp, cpu or h100: a form that it has a kernel for.",
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option("--group", metavar="32|64|128", help="Of int4: weights of a row with one scale.  [default: 32]"),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="How values are found: gptq, awq, search, hqq or rtn for int4, smooth or rtn for w8a8; see below.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="REF", help="To calibrate and compare on.  [default: what the model was trained on]"
        ),
    ] = None,
    calibrate_on: Annotated[
        str | None,
        typer.Option("--calibrate-on", metavar="REF", help="To calibrate on, if not --data.", show_default=False),
    ] = None,
    calibration_rows: Annotated[
        int, typer.Option("--calibration-rows", metavar="N", min=1, help="Calibrate on this many evenly spaced rows.")
    ] = 128,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits", metavar="X", min=1.0, help="Of int4: this size, in bits a weight, from layers of 4 and 8 bits."
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option("--sparsity", metavar="SHARE|2:4", help="Set the smallest weights to zero.", show_default=False),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", metavar="SIZE", help="Refuse to take more memory.", show_default=False),
    ] = None,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Compare on this many evenly spaced rows.")] = 128,
) -> None:
    """Make a model smaller and say what that costs in quality.

    int8: 8 bits, a scale a row; the embedding too. int4: 4 bits in groups, the embedding and the head in 8. w8a8: 8
    bits, and 8 bits of what goes into a layer. fp8: the same with floats. What does not take the form is listed with
    the reason. Perplexity is measured before and after. The same model again is found in the store at once; a
    calibration that was stopped goes on where it was.

    With a dataset, values are fitted to what the layers really get: gptq lets them make up for each other's errors, awq
    enlarges the features that matter, smooth tames those that stick out. Without one, search takes the scales of the
    least error, hqq cares less for outliers, rtn rounds.

    Examples:
      llmos quantize tiny tiny-int8 --scheme int8
      llmos quantize base base:int4 --scheme int4 --data web
      llmos quantize base base:int4 --scheme int4 --method search --group 64 --json
      llmos quantize base base:small --bits 4.8 --for transformers
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.quantize.against import hold_against
    from llmos_cli.quantize.quality import dataset_of
    from llmos_cli.quantize.run import METHODS, SCHEMES, make_request
    from llmos_cli.quantize.run import quantize as run
    from llmos_cli.quantize.targets import TARGETS, scheme_for
    from llmos_cli.store.leases import hold
    from llmos_cli.store.packs.objects import read_manifest
    from llmos_cli.store.refs.lineage import ref_labels
    from llmos_cli.store.refs.resolve import Resolved, resolve
    from llmos_cli.train.evaluate import evaluate_task

    here = session(ctx)
    out = here.out
    target = parse_ref(name)
    methods = sorted({one for known in METHODS.values() for one in known})
    for what, word, known in (("scheme", scheme, SCHEMES), ("method", method, methods)):
        if word is not None and word not in known:
            near = difflib.get_close_matches(word, known, 1, 0.3)
            raise UsageError(f"unknown {what} {word!r}", hint=f"use --{what} {(near or known)[0]}")
    if target_for is not None:
        if target_for not in TARGETS:
            near = difflib.get_close_matches(target_for, TARGETS, 1, 0.3)
            raise UsageError(f"nothing is known of {target_for!r}", hint=f"use --for {(near or sorted(TARGETS))[0]}")
        scheme = scheme_for(target_for, scheme or ("int4" if bits is not None else None))
    scheme = scheme or ("int4" if bits is not None else "int8")
    most = parse_size(max_memory) if max_memory else None
    with here.open_store() as store:
        source = resolve(store, ref)
        with hold(store, "quantize", [source.id]):
            dataset = resolve(store, data) if data else None
            if dataset is None:
                found = dataset_of(store, read_manifest(store, source.id))
                labels = ref_labels(store).get(found, ()) if found else ()
                dataset = resolve(store, labels[0]) if labels else Resolved(found, None) if found else None
            task = read_manifest(store, dataset.id).meta.get("task") if dataset else None
            of_task = task in ("mlm", "classify", "pair", "seq2seq")
            calibration = resolve(store, calibrate_on) if calibrate_on else None if of_task else dataset
            request = make_request(
                scheme,
                group=group,
                method=method,
                data=calibration.id if calibration else None,
                rows=calibration_rows,
                bits=bits,
                sparsity=sparsity,
                plain_ends=target_for is not None and TARGETS[target_for].plain_ends,
            )
            compared_on = dataset.id if dataset and not of_task else None
            result = run(
                store,
                source.id,
                request,
                target,
                compared_on=compared_on,
                max_memory=most,
                started=lambda needed: out.say(f"this takes about {size(needed)} of memory"),
                progress=out.progress,
            )
            compared, scored = None, None
            if dataset and of_task:
                scored = [
                    evaluate_task(store, oid, dataset.id, max_rows=max_rows, progress=out.progress)
                    for oid in (source.id, result.id)
                ]
            elif dataset:
                compared = hold_against(
                    store, result.id, source.id, dataset.id, max_rows=max_rows, progress=out.progress
                )
    out.result(
        {
            "id": str(result.id),
            "ref": str(target),
            "kind": "model",
            "scheme": scheme,
            "method": result.method,
            "source": str(source.id),
            "bytes_before": result.bytes_before,
            "bytes_after": result.bytes_after,
            "bits_per_weight": result.bits_per_weight,
            "kept": result.kept,
            "perplexity_before": compared.perplexity_against if compared else None,
            "perplexity_after": compared.perplexity if compared else None,
            "kl_mean": compared.kl_mean if compared else None,
            "kl_999": compared.kl_999 if compared else None,
            "same_top": compared.same_top if compared else None,
            "metrics_before": dict(scored[0].metrics) if scored else None,
            "metrics_after": dict(scored[1].metrics) if scored else None,
            "report": str(compared.id) if compared else str(scored[1].id) if scored else None,
            "data": str(dataset.id) if dataset else None,
            "rows": compared.rows if compared else scored[1].rows if scored else None,
            "made_before": result.made_before,
        }
    )
    out.line(f"{source.label} -> {target} @{result.id.short}")
    out.line(
        f"  weights     {size(result.bytes_before)} -> {size(result.bytes_after)} "
        f"({percent(result.bytes_after, result.bytes_before)}), {result.bits_per_weight:.2f} bits a weight"
    )
    if dataset and compared:
        out.line(
            f"  perplexity  {compared.perplexity_against:.4f} -> {compared.perplexity:.4f} "
            f"({100 * (compared.ratio - 1):+z.2f} %) on {plural(compared.rows, 'row')} of {dataset.label}"
        )
        out.line(
            f"  next token  {100 * compared.same_top:.1f} % the same, KL divergence {compared.kl_mean:.3g} nats "
            f"(99.9 % below {compared.kl_999:.3g})"
        )
    if dataset and scored:
        for metric, before in scored[0].metrics.items():
            out.line(f"  {metric.replace('_', ' '):11s} {before:.4f} -> {scored[1].metrics[metric]:.4f}")
        out.line(f"  scored on   {plural(scored[1].rows, 'row')} of {dataset.label}")
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

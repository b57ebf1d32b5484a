"""`llmos eval`: how well a model predicts a dataset."""

from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.errors import LlmosError, UsageError
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.ui.session import session
from llmos_cli.ui.text import count

if TYPE_CHECKING:
    from llmos_cli.store.refs.resolve import Resolved
    from llmos_cli.train.evaluate import TaskReport
    from llmos_cli.ui.session import Session

COMPARED_ROWS = 128


def eval(  # noqa: A001 - the verb is called so
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="The model or checkpoint.", show_default=False)],
    *,
    data: Annotated[str, typer.Option("--data", metavar="REF", help="The dataset to score.", show_default=False)],
    max_rows: Annotated[
        int | None,
        typer.Option(
            "--max-rows", min=1, help="Score this many evenly spaced rows instead of all.", show_default=False
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Rows at a time; by default as many as suit.", show_default=False),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", metavar="train|valid|test", help="Which documents of the dataset to score.")
    ] = "train",
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="REF", help="Hold it against this model.", show_default=False),
    ] = None,
    max_ppl_ratio: Annotated[
        float | None,
        typer.Option(
            "--max-ppl-ratio", metavar="X", help="Fail (1) if perplexity is above X times that of --against.", min=0.0
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Where to keep the report.  [default: REF's name]-eval")
    ] = None,
) -> None:
    """Measure how well a model does a dataset's task and keep the report.

    Of tasks lm and chat that is perplexity: every token of a row but the first is predicted from those before it; lower
    is better. Of classify and pair: accuracy and macro F1 (of scores: correlation); of mlm: loss and accuracy of masked
    tokens; of seq2seq: exact match, and BLEU with the extra eval. The same question again is answered from the store.

    With --against, the next-token distributions of both models are compared, too: KL divergence, and how often both
    hold the same token most likely.

    Examples:
      llmos eval tiny --data web
      llmos eval tiny:step-200 --data web --max-rows 64
      llmos eval tiny --data web --split valid
      llmos eval moods --data reviews --split test
      llmos eval tiny-int8 --data web --name results:int8 --json
      llmos eval tiny-int4 --data web --against tiny --max-ppl-ratio 1.02
    """
    from llmos_cli.quantize.quality import evaluate
    from llmos_cli.remote.exchange.anywhere import resolve_streamed
    from llmos_cli.store.packs.objects import read_manifest
    from llmos_cli.store.refs.resolve import resolve
    from llmos_cli.train.evaluate import evaluate_task

    here = session(ctx)
    named = parse_ref(name) if name else None
    if max_ppl_ratio is not None and against is None:
        raise UsageError("--max-ppl-ratio needs a model to compare with", hint="name one: --against REF")
    if against is not None and split != "train":
        raise UsageError("--against compares on the train split", hint="leave out --split")
    if against is not None:
        _compare(here, ref, against, data, max_rows or COMPARED_ROWS, max_ppl_ratio, named)
        return
    with here.open_store() as store:
        model, dataset = resolve(store, ref), resolve_streamed(store, data)
        target = named or _default_name(model)
        if read_manifest(store, dataset.id).meta.get("task") in ("mlm", "classify", "pair", "seq2seq"):
            scored = evaluate_task(
                store,
                model.id,
                dataset.id,
                max_rows=max_rows,
                batch=batch,
                split=split,
                ref=target,
                progress=here.out.progress,
            )
            _show_task(here, model, dataset, target, split, scored)
            return
        found = evaluate(
            store,
            model.id,
            dataset.id,
            max_rows=max_rows,
            batch=batch,
            split=split,
            ref=target,
            progress=here.out.progress,
        )
    here.out.result(
        {
            "id": str(found.id),
            "ref": str(target),
            "kind": "report",
            "model": str(model.id),
            "data": str(dataset.id),
            "split": split,
            "perplexity": found.perplexity,
            "loss": found.loss,
            "bits_per_byte": found.bits_per_byte,
            "tokens": found.tokens,
            "rows": found.rows,
            "made_before": found.made_before,
        }
    )
    here.out.line(f"{model.label} on {dataset.label}")
    here.out.line(f"  perplexity  {found.perplexity:.4f}")
    here.out.line(f"  loss        {found.loss:.4f} nats a token")
    if found.bits_per_byte is not None:
        here.out.line(f"  text        {found.bits_per_byte:.4f} bits a byte")
    here.out.line(
        f"  scored      {count(found.tokens)} tokens in {count(found.rows)} of {count(found.rows_total)} rows"
    )
    here.out.line(f"  report      {target} @{found.id.short}")
    if found.made_before:
        here.out.say("this was measured before; the stored report answers")


def _show_task(
    here: "Session", model: "Resolved", dataset: "Resolved", target: RefName, split: str, found: "TaskReport"
) -> None:
    here.out.result(
        {
            "id": str(found.id),
            "ref": str(target),
            "kind": "report",
            "model": str(model.id),
            "data": str(dataset.id),
            "split": split,
            "task": found.task,
            **found.metrics,
            "rows": found.rows,
            "made_before": found.made_before,
        }
    )
    here.out.line(f"{model.label} on {dataset.label}, {found.task}")
    for name, value in found.metrics.items():
        here.out.line(f"  {name.replace('_', ' '):11s} {value:.4f}")
    what = "rows" if found.task == "mlm" else "examples"
    here.out.line(f"  scored      {count(found.rows)} of {count(found.rows_total)} {what}")
    here.out.line(f"  report      {target} @{found.id.short}")
    if found.made_before:
        here.out.say("this was measured before; the stored report answers")


def _compare(
    here: "Session", ref: str, against: str, data: str, max_rows: int, limit: float | None, named: RefName | None
) -> None:
    from llmos_cli.quantize.against import hold_against
    from llmos_cli.store.refs.resolve import resolve

    with here.open_store() as store:
        model, other, dataset = resolve(store, ref), resolve(store, against), resolve(store, data)
        target = named or _default_name(model)
        found = hold_against(
            store, model.id, other.id, dataset.id, max_rows=max_rows, ref=target, progress=here.out.progress
        )
    here.out.result(
        {
            "id": str(found.id),
            "ref": str(target),
            "kind": "report",
            "model": str(model.id),
            "against": str(other.id),
            "data": str(dataset.id),
            "perplexity": found.perplexity,
            "perplexity_against": found.perplexity_against,
            "ppl_ratio": found.ratio,
            "kl_mean": found.kl_mean,
            "kl_999": found.kl_999,
            "same_top": found.same_top,
            "tokens": found.tokens,
            "rows": found.rows,
            "made_before": found.made_before,
        }
    )
    here.out.line(f"{model.label} against {other.label} on {count(found.rows)} rows of {dataset.label}")
    here.out.line(
        f"  perplexity  {found.perplexity_against:.4f} -> {found.perplexity:.4f} ({100 * (found.ratio - 1):+z.2f} %)"
    )
    here.out.line(f"  KL          {found.kl_mean:.3g} nats, 99.9 % of tokens below {found.kl_999:.3g}")
    here.out.line(f"  next token  {100 * found.same_top:.1f} % the same")
    here.out.line(f"  report      {target} @{found.id.short}")
    if found.made_before:
        here.out.say("this was measured before; the stored report answers")
    if limit is not None and found.ratio > limit:
        raise LlmosError(
            f"the perplexity of {model.label} is {found.ratio:.4f} times that of {other.label}, above {limit:g}",
            hint="more bits, a smaller --group, or --method gptq cost less",
        )


def _default_name(model: "Resolved") -> RefName:
    """`tiny:step-200` is reported as `tiny-eval:step-200`, a bare id as `eval-<id>`."""
    return RefName(f"{model.ref.name}-eval", model.ref.tag) if model.ref else RefName(f"eval-{model.id.short}")

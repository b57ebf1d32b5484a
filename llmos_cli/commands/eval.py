"""`llmos eval`: how well a model predicts a dataset."""

from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.ui.session import session
from llmos_cli.ui.text import count

if TYPE_CHECKING:
    from llmos_cli.store.refs.resolve import Resolved


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
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Where to keep the report.  [default: REF's name]-eval")
    ] = None,
) -> None:
    """Measure a model's perplexity on a dataset and keep the report.

    Every token of a row but the first is predicted from those before it; a lower perplexity is better. The same
    question again is answered from the store.

    Examples:
      llmos eval tiny --data web
      llmos eval tiny:step-200 --data web --max-rows 64
      llmos eval tiny-int8 --data web --name results:int8 --json
    """
    from llmos_cli.quantize.quality import evaluate
    from llmos_cli.store.refs.resolve import resolve

    here = session(ctx)
    named = parse_ref(name) if name else None
    with here.open_store() as store:
        model, dataset = resolve(store, ref), resolve(store, data)
        target = named or _default_name(model)
        found = evaluate(
            store,
            model.id,
            dataset.id,
            max_rows=max_rows,
            batch=batch,
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


def _default_name(model: "Resolved") -> RefName:
    """`tiny:step-200` is reported as `tiny-eval:step-200`, a bare id as `eval-<id>`."""
    return RefName(f"{model.ref.name}-eval", model.ref.tag) if model.ref else RefName(f"eval-{model.id.short}")

"""`llmos merge`: base and adapter become one model."""

from typing import Annotated

import typer

from llmos_cli.ui.session import session
from llmos_cli.ui.text import count, size


def merge(
    ctx: typer.Context,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="What train --lora made.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The ref to move, NAME or NAME:TAG.", show_default=False)],
) -> None:
    """Make one model of an adapter and its base.

    The result is a model like any other, with base and adapter as its parents. Tensors that the adapter does not touch
    are those of the base and take no space; the others are stored as what differs from it.

    Examples:
      llmos train tuned --data notes --model tiny --lora 8
      llmos merge tuned tuned-whole
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.store.refs.resolve import resolve
    from llmos_cli.train.merge import merge as run

    here = session(ctx)
    target = parse_ref(name)
    with here.open_store() as store:
        found = resolve(store, adapter)
        merged = run(store, found.id, target, progress=here.out.progress)
    here.out.result(
        {
            "id": str(merged.commit.id),
            "ref": str(target),
            "kind": "model",
            "model": str(merged.base),
            "adapter": str(found.id),
            "changed": merged.changed,
            "tensors": merged.tensors,
            "stored": merged.commit.stored,
            "made_before": merged.made_before,
        }
    )
    here.out.line(
        f"model {target} @{merged.commit.id.short} is @{merged.base.short} with {found.label} in "
        f"{count(merged.changed)} of {count(merged.tensors)} tensors"
    )
    if merged.made_before:
        here.out.say("this was made before; nothing was computed")
    else:
        here.out.say(f"{size(merged.commit.stored)} stored")
    here.out.hint(f"llmos eval {target.name} --data DATASET")

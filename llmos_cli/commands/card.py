"""`llmos card`: a model described."""

from pathlib import Path
from typing import Annotated

import typer

from llmos_cli.ui.session import session


def card(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="The model or checkpoint.", show_default=False)],
    *,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="Write it there; a name in .html makes a page.", show_default=False),
    ] = None,
) -> None:
    """Describe a model: what it is, where from, how good.

    The card is made from manifests and reports: facts, everything that was measured with eval and quantize, a plot of
    size against quality where variants of one model were compared, the recipe of each step, and the data. Markdown, or
    HTML by the file's name.

    Examples:
      llmos card tiny-int8
      llmos card tiny-int8 --to card.html
    """
    from llmos_cli.export.card import card as make
    from llmos_cli.export.card import reports_of
    from llmos_cli.export.markup import to_html, to_markdown
    from llmos_cli.store.disk.durable import write_file
    from llmos_cli.store.refs.resolve import resolve

    here = session(ctx)
    path = here.cwd / to.expanduser() if to else None
    with here.open_store() as store:
        found = resolve(store, ref)
        reports = reports_of(store, found.id)
        blocks = make(store, found.id, found.label, reports)
    page = path is not None and path.suffix in (".html", ".htm")
    text = to_html(found.label, blocks) if page else to_markdown(blocks)
    if path is not None:
        write_file(path, text.encode())
    here.out.result(
        {
            "id": str(found.id),
            "format": "html" if page else "markdown",
            "file": str(path) if path else None,
            "reports": [str(report.id) for report in reports],
            "text": text,
        }
    )
    if path is not None:
        here.out.say(f"{found.label} is described in {path}")
    else:
        here.out.text(text)

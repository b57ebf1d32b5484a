"""Rows that change in their place on a terminal."""

import time
from collections.abc import Iterable

from llmos_cli.ui.watching import Rows


def show_in_place(looks: Iterable[Rows], *, every: float) -> None:
    """Show each look where the one before stood, until they end or somebody interrupts; `every` so many seconds."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        for rows in looks:
            table = Table.grid(padding=(0, 2))
            for name, value in rows:
                table.add_row(Text(name, style="dim"), Text(value))
            live.update(table, refresh=True)
            time.sleep(every)

"""How a command describes one thing: names and their values, one a line, the values in a column."""

import json
from collections.abc import Sequence
from typing import Any

from llmos_cli.ui.text import safe_line


def fact_lines(facts: Sequence[tuple[str, str]]) -> list[str]:
    """The lines; a name may begin with spaces to stand below the one before it."""
    width = max((len(safe_line(name)) for name, _ in facts), default=0)
    return [f"  {safe_line(name):<{width}}  {safe_line(value)}" for name, value in facts]


def json_text(value: Any) -> str:
    """A value as JSON for people to read; what is nested too deeply for that is not shown."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return "(nested too deeply)"

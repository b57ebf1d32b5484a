"""The page that `llmos --help` and a bare `llmos` show: commands by group, 80 columns, no help from rich.

It takes the table as plain values and knows nothing of typer.
"""

from collections.abc import Mapping, Sequence
from textwrap import wrap

WIDTH = 80
HEAD = """\
llmos: one content-addressed store from text to served model.

Usage: llmos [--store DIR] [--json] [-q|-v] COMMAND [ARGS]...
"""
OPTIONS: Sequence[tuple[str, str]] = (
    ("--store DIR", "The store; else $LLMOS_STORE, the nearest .llmos, ~/.llmos."),
    ("--json", "One JSON object on stdout instead of text."),
    ("-q, --quiet", "No messages and no progress, only results and errors."),
    ("-v, --verbose", "More about what happens; a traceback with every error."),
    ("--version", "Show the version and exit."),
    ("-h, --help", "Show this page; after a command, its own with examples."),
)
EXAMPLES: Sequence[tuple[str, str]] = (
    ("llmos init", "make a store in ./.llmos"),
    ("llmos add ~/models/llama base", "keep a Hugging Face model folder"),
    ("llmos serve base --port 8000", "answer OpenAI-style requests from it"),
)


def root_help(groups: Mapping[str, Mapping[str, str]], exit_codes: Mapping[int, str]) -> str:
    """The page; `groups` maps a heading to verbs and what they are for."""
    lines = [HEAD]
    for title, verbs in groups.items():
        lines += [f"{title.capitalize()}:", *_pairs(tuple(verbs.items()), 12), ""]
    lines += ["Options:", *_pairs(OPTIONS, 15), ""]
    lines += ["Examples:", *_pairs(EXAMPLES, 31), ""]
    codes = "; ".join(f"{code} {text}" for code, text in exit_codes.items())
    return "\n".join(lines) + "\n" + "\n".join(wrap(f"Exit codes: {codes}.", WIDTH, subsequent_indent="  "))


def _pairs(pairs: Sequence[tuple[str, str]], column: int) -> list[str]:
    indent = " " * (2 + column)
    lines = []
    for name, text in pairs:
        first, *rest = wrap(text, WIDTH - len(indent)) or [""]
        lines.append(f"  {name:<{column}}{first}".rstrip())
        lines += [indent + line for line in rest]
    return lines

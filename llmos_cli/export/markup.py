"""A page of headings, texts, tables and one kind of plot, as Markdown or as HTML. Pure functions."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_STYLE: Final = (
    "body{font:16px/1.5 sans-serif;max-width:48em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}pre{background:#f4f4f4;padding:.6em;overflow:auto}"
)
_MARKDOWN: Final = str.maketrans({char: f"\\{char}" for char in "\\`*_{}[]<>#|"} | {"\n": " "})
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 560, 280, 70, 20, 40


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Plot:
    """Points with names, over axes with titles."""

    x: str
    y: str
    points: tuple[tuple[str, float, float], ...]


Block = Heading | Text | Code | Table | Plot


def to_markdown(blocks: Iterable[Block]) -> str:
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """A page that needs nothing beside itself."""
    body = "\n".join(_html(block) for block in blocks)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head><body>\n{body}\n</body></html>\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text.translate(_MARKDOWN)}"
        case Text(text):
            return text.translate(_MARKDOWN)
        case Code(text):
            return f"```\n{text.replace('```', '')}\n```"
        case Table(head, rows):
            lines = [head, tuple("---" for _ in head), *rows]
            return "\n".join(
                f"| {' | '.join(cell if line is lines[1] else cell.translate(_MARKDOWN) for cell in line)} |"
                for line in lines
            )
        case Plot():
            return svg(block)


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table(head, rows):
            return f"<table>\n{_row('th', head)}\n" + "\n".join(_row("td", row) for row in rows) + "\n</table>"
        case Plot():
            return svg(block)


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def svg(plot: Plot) -> str:
    """The points as a picture in lines of text, none of them empty: Markdown would end there."""
    right, bottom = _WIDTH - 20, _HEIGHT - _BOTTOM
    across, up = _scale([x for _, x, _ in plot.points]), _scale([y for _, _, y in plot.points])

    def place(value: float, bounds: tuple[float, float], low: float, high: float) -> float:
        return low + (value - bounds[0]) / (bounds[1] - bounds[0]) * (high - low)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'font-family="sans-serif" font-size="12" role="img">',
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#888"/>',
        f'<text x="{right}" y="{_HEIGHT - 6}" text-anchor="end" fill="#555">{html.escape(plot.x)}</text>',
        f'<text x="4" y="{_TOP - 6}" fill="#555">{html.escape(plot.y)}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        x, y = (bounds[0] + share * (bounds[1] - bounds[0]) for bounds in (across, up))
        at = place(y, up, bottom, _TOP)
        lines.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end" fill="#555">{y:.4g}</text>')
        at = place(x, across, _LEFT, right)
        lines.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{x:.4g}</text>')
    for name, x_value, y_value in plot.points:
        left, top = place(x_value, across, _LEFT, right), place(y_value, up, bottom, _TOP)
        anchor, gap = ("end", -8) if left > (_LEFT + right) / 2 else ("start", 8)
        lines.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="#2563eb"/>')
        lines.append(f'<text x="{left + gap:.1f}" y="{top + 4:.1f}" text-anchor="{anchor}">{html.escape(name)}</text>')
    return "\n".join([*lines, "</svg>"])


def _scale(values: Sequence[float]) -> tuple[float, float]:
    """Bounds a little wider than the values."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin

"""The two streams of a command: data on stdout, everything else on stderr.

One `Output` serves a person and a script alike: with `json`, human lines vanish and `result` prints one line of JSON.
Escape sequences in what is shown are spelled out, also on a pipe, which may well end at a terminal (`| less -R`). As it
is passes generated text on a pipe, and whatever stands in JSON, which has escapes of its own.
Streams are looked up at each write, so a test or a caller may replace `sys.stdout`.
"""

import json as jsonlib
import math
import shutil
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmos_cli.progress import Progress
from llmos_cli.ui.console import Bars, Calm, Muted
from llmos_cli.ui.text import count, duration, percent, plural, safe, safe_line, size, table_lines, when

__all__ = ["Output", "count", "duration", "percent", "plural", "safe", "safe_line", "size", "when"]


@dataclass(frozen=True)
class Output:
    """`animate` says that stderr is a terminal on which bars may move; `columns` overrides the terminal's width."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    animate: bool = False
    columns: int | None = None

    @cached_property
    def progress(self) -> Progress:
        """What core functions report to."""
        if self.json or self.quiet:
            return Muted(self.warn)
        return Bars(self.warn) if self.animate else Calm(self._message, self.warn)

    def result(self, data: Mapping[str, Any]) -> None:
        """In JSON mode: one line of JSON, always the last one. Otherwise nothing."""
        if self.json:
            _write_out(jsonlib.dumps(_finite(data), default=str, allow_nan=False) + "\n", flush=True)

    def line(self, text: str = "") -> None:
        """A line of data for a person, and never more than one; nothing in JSON mode."""
        if not self.json:
            _write_out(safe_line(text) + "\n")

    def page(self, text: str) -> None:
        """Several lines, which are our own words; nothing in JSON mode."""
        if not self.json:
            _write_out(safe(text) + "\n")

    def text(self, text: str) -> None:
        """A piece of a stream (generated text), shown at once and without a line end; nothing in JSON mode."""
        if not self.json:
            _write_out(safe(text) if _is_terminal(sys.stdout) else text, flush=True)

    def table(
        self, columns: list[str], rows: Iterable[list[str]], right: Iterable[int] = (), spare: Iterable[int] = ()
    ) -> None:
        """A table for a person, fitted to the terminal's width (see `table_lines`); on a pipe nothing is cut."""
        if self.json:
            return
        width = self.width if _is_terminal(sys.stdout) else self.columns
        for text in table_lines(columns, list(rows), right=frozenset(right), spare=frozenset(spare), width=width):
            self.line(text)

    def say(self, text: str) -> None:
        """A message about what happens or comes next; not with -q or --json."""
        if not self.json and not self.quiet:
            self._message(text)

    def detail(self, text: str) -> None:
        """A message that only -v shows."""
        if self.verbose and not self.json:
            self._message(text)

    def hint(self, text: str) -> None:
        """What to type next; not with -q or --json."""
        self.say(f"hint: {text}")

    def warn(self, text: str) -> None:
        """Something that does not stop the work but should be known; shown in every mode."""
        if self.json:
            self._message(jsonlib.dumps({"warning": text}))
        else:
            self._message(f"warning: {text}")

    def error(
        self, code: str, message: str, *, hint: str | None, exit_code: int, trace: BaseException | None = None
    ) -> None:
        """The one error a command ends with; `trace` shows its traceback first."""
        lines = "".join(traceback.format_exception(trace)).rstrip().splitlines() if trace else []
        if self.json:
            error = {"code": code, "message": message, "hint": hint, "exit_code": exit_code}
            self._message(jsonlib.dumps({"error": error | ({"traceback": lines} if lines else {})}))
            return
        for line in lines:
            self._message(line)
        self._message(f"error: {message}")
        if hint:
            self._message(f"hint: {hint}")

    @property
    def width(self) -> int:
        return self.columns or shutil.get_terminal_size().columns

    @property
    def plain(self) -> bool:
        """Whether stdout can only show ASCII."""
        try:
            "├─└│".encode(getattr(sys.stdout, "encoding", None) or "ascii")
        except UnicodeEncodeError:
            return True
        return False

    def _message(self, text: str) -> None:
        shown = safe_line(text)
        progress = self.__dict__.get("progress")
        if isinstance(progress, Bars) and progress.write(shown):
            return
        if sys.stderr is not None:
            sys.stderr.write(shown + "\n")
            sys.stderr.flush()


def _finite(value: Any) -> Any:
    """`value` without infinities and NaN, which JSON lacks: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _write_out(text: str, *, flush: bool = False) -> None:
    if sys.stdout is None:
        return
    sys.stdout.write(text)
    if flush:
        sys.stdout.flush()


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()

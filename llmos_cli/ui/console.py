"""How long work shows: live bars on a terminal, a calm line every ten seconds elsewhere.

Everything goes to stderr. A task shorter than ten seconds says nothing where there is no terminal to animate.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Final

from llmos_cli.progress import Task
from llmos_cli.ui.text import count, duration, safe_line, size

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

CALM_SECONDS: Final = 10.0
REDRAW_SECONDS: Final = 0.1
NARROW_COLUMNS: Final = 60


class Muted:
    """No bars; warnings still reach the user."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn

    def task(self, label: str, *, total: int | None = None, unit: str = "B") -> AbstractContextManager[Task]:
        return _muted_task()

    def warn(self, message: str) -> None:
        self._warn(message)


class Calm:
    """Plain lines: one per `CALM_SECONDS` and task, and one at the end of a task that said something before."""

    def __init__(self, write: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self._write = write
        self._warn = warn

    @contextmanager
    def task(self, label: str, *, total: int | None = None, unit: str = "B") -> Iterator[Task]:
        task = _CalmTask(self._write, label, total, unit)
        yield task
        task.end()

    def warn(self, message: str) -> None:
        self._warn(message)


class Bars:
    """Live bars on a terminal's stderr; they leave no trace when their work is done."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._bars: RichBars | None = None
        self._open = 0
        self._lock = threading.Lock()

    @contextmanager
    def task(self, label: str, *, total: int | None = None, unit: str = "B") -> Iterator[Task]:
        with self._lock:
            if self._bars is None:
                self._bars = _rich_bars()
                self._bars.start()
            self._open += 1
            bars = self._bars
        task = _BarTask(bars, label, total, unit)
        try:
            yield task
        finally:
            task.end()
            with self._lock:
                self._open -= 1
                if self._open == 0:
                    bars.stop()
                    self._bars = None

    def warn(self, message: str) -> None:
        self._warn(message)

    def write(self, text: str) -> bool:
        """Write a line above the live bars; False when no bar is live and the caller writes by itself."""
        bars = self._bars
        if bars is None:
            return False
        bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        return True


class _MutedTask:
    def advance(self, amount: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@contextmanager
def _muted_task() -> Iterator[Task]:
    yield _MutedTask()


class _CalmTask:
    def __init__(self, write: Callable[[str], None], label: str, total: int | None, unit: str) -> None:
        self._write, self._label, self._total, self._unit = write, label, total, unit
        self._done = 0
        self._note = ""
        self._start = self._said = time.monotonic()
        self._spoke = False
        self._lock = threading.Lock()

    def advance(self, amount: int = 1) -> None:
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if now - self._said < CALM_SECONDS:
                return
            self._said = now
            self._spoke = True
        self._write(self._line(now))

    def note(self, text: str) -> None:
        self._note = text

    def end(self) -> None:
        if self._spoke:
            self._write(self._line(time.monotonic()) + ", done")

    def _line(self, now: float) -> str:
        parts = [_amount(self._done, self._total, self._unit)]
        if self._total:
            parts.append(f"{100 * self._done / self._total:.0f} %")
        parts.append(_rate(self._done / max(now - self._start, 1e-9), self._unit))
        if self._total and 0 < self._done < self._total:
            parts.append(f"{duration((now - self._start) * (self._total / self._done - 1))} left")
        if self._note:
            parts.append(safe_line(self._note))
        return f"{self._label}: {', '.join(parts)}"


class _BarTask:
    """Adds up between redraws: `advance` may be called for every chunk and every token."""

    def __init__(self, bars: "RichBars", label: str, total: int | None, unit: str) -> None:
        self._bars, self._total, self._unit = bars, total, unit
        self._done = 0
        self._start = time.monotonic()
        self._drawn = 0.0
        self._note = ""
        self._lock = threading.Lock()
        self._id: TaskID = bars.add_task(safe_line(label), total=total, status="")

    def advance(self, amount: int = 1) -> None:
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if now - self._drawn < REDRAW_SECONDS:
                return
            self._drawn = now
        self._draw(now)

    def note(self, text: str) -> None:
        self._note = safe_line(text)

    def end(self) -> None:
        self._bars.remove_task(self._id)

    def _draw(self, now: float) -> None:
        rate = _rate(self._done / max(now - self._start, 1e-9), self._unit)
        if self._bars.console.width < NARROW_COLUMNS:
            parts = [rate]
        else:
            parts = [_amount(self._done, self._total, self._unit), rate]
            if self._total and 0 < self._done < self._total:
                parts.append(f"{duration((now - self._start) * (self._total / self._done - 1))} left")
            if self._note:
                parts.append(self._note)
        self._bars.update(self._id, completed=self._done, status="  ".join(parts))


def _rich_bars() -> "RichBars":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskProgressColumn, TextColumn
    from rich.table import Column

    console = Console(stderr=True)
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
    if console.width >= NARROW_COLUMNS:
        columns.append(BarColumn(bar_width=20) if console.encoding.startswith("utf") else SpinnerColumn("line"))
    columns.append(TaskProgressColumn())
    columns.append(TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)))
    # stdout stays as it is: redirecting it would send piped data to stderr.
    return Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)


def _amount(done: int, total: int | None, unit: str) -> str:
    shown = size(done) if unit == "B" else count(done)
    if total is not None:
        shown += f" of {size(total) if unit == 'B' else count(total)}"
    return shown if unit == "B" else f"{shown} {unit}"


def _rate(per_second: float, unit: str) -> str:
    if unit == "B":
        return f"{size(per_second)}/s"
    return f"{per_second:,.0f} {unit}/s" if per_second >= 10 else f"{per_second:.2g} {unit}/s"

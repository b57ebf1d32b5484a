"""How long work shows itself, on a terminal and elsewhere."""

import io
import sys
import threading

import pytest

from llmos_cli.ui import console
from llmos_cli.ui.console import Bars, Calm, Muted
from llmos_cli.ui.output import Output


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    return clock


def test_short_work_says_nothing_without_a_terminal(clock: Clock) -> None:
    lines: list[str] = []
    with Calm(lines.append, lines.append).task("adding", total=100) as task:
        clock.now += 9
        task.advance(100)
    assert lines == []


def test_long_work_says_a_line_every_ten_seconds_and_one_at_its_end(clock: Clock) -> None:
    lines: list[str] = []
    with Calm(lines.append, lines.append).task("training", total=100, unit="steps") as task:
        for _ in range(30):
            clock.now += 1
            task.advance(2)
        task.note("loss 3.2")
    assert lines == [
        "training: 20 of 100 steps, 20 %, 2 steps/s, 40 s left",
        "training: 40 of 100 steps, 40 %, 2 steps/s, 30 s left",
        "training: 60 of 100 steps, 60 %, 2 steps/s, 20 s left",
        "training: 60 of 100 steps, 60 %, 2 steps/s, 20 s left, loss 3.2, done",
    ]


def test_work_without_a_total(clock: Clock) -> None:
    lines: list[str] = []
    with Calm(lines.append, lines.append).task("reading") as task:
        clock.now += 10
        task.advance(5_000_000)
    assert lines[0] == "reading: 5.00 MB, 500 kB/s"


def test_a_task_that_fails_does_not_say_that_it_is_done(clock: Clock) -> None:
    lines: list[str] = []

    def fail() -> None:
        with Calm(lines.append, lines.append).task("adding") as task:
            clock.now += 10
            task.advance(1)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert len(lines) == 1


def test_advance_from_many_threads_loses_nothing(clock: Clock) -> None:
    lines: list[str] = []
    with Calm(lines.append, lines.append).task("adding", total=8000, unit="chunks") as task:
        threads = [threading.Thread(target=lambda: [task.advance() for _ in range(1000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        clock.now += 10
        task.advance(0)
    assert lines[0].startswith("adding: 8,000 of 8,000 chunks")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_bars_are_drawn_on_stderr_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr, stdout = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Output(animate=True)
    with out.progress.task("adding [bold]x", total=100) as task:
        task.advance(50)
        task.note("note\x1b[2J")
        out.line("data")
        out.say("between [red]bars")
        with out.progress.task("inner", unit="steps") as inner:
            inner.advance(3)
    drawn = stderr.getvalue()
    assert stdout.getvalue() == "data\n"
    assert "adding [bold]x" in drawn
    assert "between [red]bars" in drawn
    assert "\x1b[2J" not in drawn
    assert drawn.endswith("\x1b[2K\x1b[?25h\r"), "the bar is wiped away and the cursor comes back"


def test_bars_fit_forty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    with Bars(lambda _: None).task("checking out", total=10**9) as task:
        task.advance(10**8)
    assert "━" not in stderr.getvalue()


def test_quiet_and_json_are_muted_but_warn(capsys: pytest.CaptureFixture[str]) -> None:
    for out in (Output(quiet=True, animate=True), Output(json=True, animate=True)):
        assert isinstance(out.progress, Muted)
        with out.progress.task("adding", total=1) as task:
            task.advance(1)
            task.note("x")
        out.progress.warn("careful")
        assert "careful" in capsys.readouterr().err


def test_without_a_terminal_progress_is_calm() -> None:
    assert isinstance(Output().progress, Calm)
    assert isinstance(Output(animate=True).progress, Bars)

"""Which stream says what, in which mode."""

import io
import json
import math
import sys
from pathlib import Path

import pytest

from llmos_cli.ui.output import Output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_data_goes_to_stdout_and_messages_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.line("data")
    out.say("message")
    out.warn("careful")
    out.hint("llmos ls")
    out.detail("not shown")
    out.result({"not": "shown"})
    assert capsys.readouterr() == ("data\n", "message\nwarning: careful\nhint: llmos ls\n")


def test_json_mode_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(json=True)
    out.line("not shown")
    out.text("not shown")
    out.table(["not"], [["shown"]])
    out.say("not shown")
    out.warn("careful")
    out.result({"path": Path("x"), "bad": [math.nan, math.inf, 1.5], "name": "ü"})
    shown = capsys.readouterr()
    assert shown.out == '{"path": "x", "bad": [null, null, 1.5], "name": "\\u00fc"}\n'
    assert shown.err == '{"warning": "careful"}\n'


def test_quiet_keeps_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(quiet=True)
    out.say("not shown")
    out.hint("not shown")
    out.warn("careful")
    out.error("busy", "somebody is here", hint="wait", exit_code=11)
    assert capsys.readouterr() == ("", "warning: careful\nerror: somebody is here\nhint: wait\n")


def test_verbose_adds_details(capsys: pytest.CaptureFixture[str]) -> None:
    Output(verbose=True).detail("more")
    assert capsys.readouterr().err == "more\n"


def test_an_error_in_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).error("busy", "two\nlines", hint=None, exit_code=11)
    error = json.loads(capsys.readouterr().err)["error"]
    assert error == {"code": "busy", "message": "two\nlines", "hint": None, "exit_code": 11}


def test_escape_sequences_reach_neither_terminal_nor_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, text in ((Terminal(), "a\\x1b[2J"), (io.StringIO(), "a\x1b[2J")):
        monkeypatch.setattr(sys, "stdout", stream)
        Output().line("a\x1b[2J")
        Output().text("a\x1b[2J")  # generated: whoever takes it from a pipe takes it as it is
        assert stream.getvalue() == f"a\\x1b[2J\n{text}"


def test_messages_never_hold_escape_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    Output().say("a\x1b[2J\nb")
    assert capsys.readouterr().err == "a\\x1b[2J\\nb\n"


def test_a_table_is_cut_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, longest in ((Terminal(), 40), (io.StringIO(), 103)):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", "40")
        Output().table(["a", "b"], [["x" * 100, "y"]])
        assert max(map(len, stream.getvalue().splitlines())) == longest


def test_closed_streams_are_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    out = Output()
    out.line("data")
    out.say("message")
    out.table(["a"], [["b"]])


def test_what_stdout_can_show_decides_about_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert Output().plain
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert not Output().plain

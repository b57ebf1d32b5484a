"""How a command line ends: signals, a closed pipe, a full disk behind stdout. Each in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# The real `main` with one more verb, which does what a test needs of a long command.
NAP = """
import sys, time, types
from llmos_cli import app

def nap(ctx: app.typer.Context, how: str = "sleep") -> None:
    '''Sleep, or write much.'''
    here = app.session(ctx)
    if how == "write":
        for number in range(100_000):
            here.out.line(f"line {number}")
        return
    try:
        here.out.line("ready")
        sys.stdout.flush()
        time.sleep(30)
    finally:
        if how == "stubborn":
            here.out.line("cleaning")
            sys.stdout.flush()
            time.sleep(30)

module = types.ModuleType("nap")
module.nap = nap
sys.modules["llmos_cli.commands.nap"] = module
app.VERBS = (*app.VERBS, "nap")
sys.exit(app.main(["nap", *sys.argv[1:]]))
"""


def start(*words: str, **streams: object) -> "subprocess.Popen[str]":
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen([sys.executable, "-c", NAP, *words], text=True, **streams)  # type: ignore[call-overload]


def test_ctrl_c_is_answered_at_once_and_exits_130() -> None:
    with start() as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "\nstopping (Ctrl-C again stops at once)\nerror: interrupted\n"


def test_the_second_ctrl_c_does_not_wait() -> None:
    with start("--how", "stubborn") as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "cleaning\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_sigterm_exits_143() -> None:
    with start() as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (143, "")


def test_a_reader_that_goes_away_ends_the_command_without_a_word() -> None:
    with start("--how", "write") as process:
        assert process.stdout
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.stderr
        err = process.stderr.read()
        process.wait(timeout=20)
    assert (process.returncode, err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [("--help",), ("--version",), ("--json", "ls")])
def test_a_full_disk_behind_stdout_is_an_error(words: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmos_cli", *words]
    environment = {**os.environ, "HOME": str(tmp_path)}
    if "ls" in words:
        subprocess.run([sys.executable, "-m", "llmos_cli", "init"], cwd=tmp_path, check=True, capture_output=True)
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ran.returncode == 15
    assert "no space left while writing output" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "Exception ignored" not in ran.stderr


def test_closed_standard_streams_do_not_become_pack_files(tmp_path: Path) -> None:
    shell = '"$0" -m llmos_cli init x >&- 2>&- <&- && "$0" -m llmos_cli --store x ls'
    ran = subprocess.run(
        ["sh", "-c", shell.replace("init x", "--store x init"), sys.executable],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0
    assert "is empty" in ran.stderr


def test_output_that_the_locale_cannot_show_is_spelled_out(tmp_path: Path) -> None:
    (tmp_path / "ü.txt").write_text("x")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)}
    for words in (["init"], ["add", "ü.txt", "name"], ["show", "name"]):
        ran = subprocess.run(
            [sys.executable, "-m", "llmos_cli", *words], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
    assert rb"\xfc.txt" in ran.stdout

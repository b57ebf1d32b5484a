"""`llmos(...)` runs one command line in this process, from parsing to exit code, in an empty folder."""

import contextlib
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.app import main


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of stdout, which must be the only one with --json."""
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def error(self) -> Any:
        return json.loads(self.err.splitlines()[-1])["error"]


Llmos = Callable[..., Ran]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty; a home without a store; no $LLMOS_STORE."""
    here = tmp_path / "here"
    home = tmp_path / "home"
    here.mkdir()
    home.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    for name in ("LLMOS_STORE", "LLMOS_SAFE_STORES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TZ", "UTC")
    return here


@pytest.fixture
def llmos(folder: Path, capfd: pytest.CaptureFixture[str]) -> Llmos:
    def run(*words: str | Path) -> Ran:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return run


@pytest.fixture
def store(llmos: Llmos, folder: Path) -> Path:
    """A store with notes:latest (two values), notes:v1 and model:latest."""
    assert llmos("init").code == 0
    (folder / "a.txt").write_text("first\n")
    (folder / "b.txt").write_text("second\n")
    assert llmos("add", "a.txt", "notes").code == 0
    assert llmos("tag", "notes", "notes:v1").code == 0
    assert llmos("add", "a.txt", "b.txt", "notes").code == 0
    return folder / ".llmos"


@pytest.fixture
def on_terminal(folder: Path) -> Callable[..., str]:
    """Run one command line in a process of its own whose stdout and stderr are a terminal of `columns` columns; gives
    what it wrote there, lines ended by one new line."""

    def run(columns: int, *words: str | Path) -> str:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        with subprocess.Popen(
            [sys.executable, "-m", "llmos_cli", *map(str, words)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment | {"TERM": "xterm-256color", "PYTHONUTF8": "1"},
        ):
            os.close(theirs)
            written = b""
            with contextlib.suppress(OSError):  # EIO: the other side has been closed
                while block := os.read(ours, 65536):
                    written += block
        os.close(ours)
        return written.decode().replace("\r\n", "\n")

    return run

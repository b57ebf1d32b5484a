"""Faults from outside the program: strace ends a command at its n-th system call of a kind, or lets that call fail.

The commands run in children of a process that has imported everything, so that one costs tenths of a second; strace
takes hold of a child before the command begins. strace counts the calls of each thread by itself: a fault meets the
first thread that gets to its n-th call and, if that does not end the command, every other that does.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

_SERVER: Final = """
import contextlib, ctypes, gc, importlib, json, os, sys
from pathlib import Path
from llmos_cli import app
from llmos_cli.formats import limits

limits.PACK_TARGET_BYTES = int(sys.argv[1])
app.build(("add", "checkout", "du", "fsck", "gc", "init", "rm", "show", "tag"))
import numpy, pyfastcdc, rich.console, sqlite3, typer.core
package = Path(app.__file__).parent
for module in sorted((package / "store").rglob("[!_]*.py")):
    importlib.import_module(".".join(("llmos_cli", *module.relative_to(package).with_suffix("").parts)))
import llmos_cli.remote.exchange.repair
gc.freeze()  # or a child's first collection would copy every page

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER: anybody of this user
    for stream, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(request[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    with open(request["gate"]) as gate:
        gate.read()
    code = app.main(request["argv"])
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)
"""
_CALL: Final = re.compile(r"(\d+) +(\w+)\(")


@dataclass(frozen=True)
class Ran:
    """How a command ended: its exit code (the negative signal that killed it), what it wrote, the calls that were
    watched (the most that any one thread made, by name), and whether the fault was met."""

    code: int
    out: str
    err: str
    calls: Counter[str]
    met: bool


class Tracer:
    """Runs command lines of `llmos`, one at a time, with faults."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path) -> None:
        self._server = server
        self._files = {name: folder / name for name in ("out", "err", "gate", "trace")}
        os.mkfifo(self._files["gate"])

    def run(self, *argv: str, watch: Sequence[str] = (), inject: str = "") -> Ran:
        """Run `llmos ARGV`. `watch` names the system calls to count, `inject` is what strace's option of this name
        takes: "fsync:error=EIO:when=2". Without both, strace stays out of it."""
        paths = {name: str(self._files[name]) for name in ("out", "err", "gate")}
        child = int(self._ask(json.dumps({"argv": argv, **paths})))
        self._files["trace"].write_text("")
        with _traced(child, self._files["trace"], watch, inject) if watch or inject else _untraced():
            with open(self._files["gate"], "w"):
                pass
            code = int(self._server_says())
        trace = self._files["trace"].read_text(errors="replace")
        each = Counter(match.groups() for line in trace.splitlines() if (match := _CALL.match(line)))
        calls: Counter[str] = Counter()
        for (_, name), number in each.items():
            calls[name] = max(calls[name], number)
        out, err = (self._files[name].read_text(errors="replace") for name in ("out", "err"))
        return Ran(code, out, err, calls, code < 0 or "(INJECTED)" in trace)

    def _ask(self, line: str) -> str:
        assert self._server.stdin
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()
        return self._server_says()

    def _server_says(self) -> str:
        assert self._server.stdout
        line = self._server.stdout.readline()
        assert line, "the process that runs the commands has died"
        return line


@contextmanager
def open_tracer(folder: Path, *, pack_bytes: int = 64 << 20) -> Iterator[Tracer]:
    """Start what the commands run in; packs are closed at `pack_bytes`. Skips the test where there is no strace."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    environment = {**os.environ, "HOME": str(folder), "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", _SERVER, str(pack_bytes)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
    ) as server:
        try:
            yield Tracer(server, folder)
        finally:
            server.kill()


def why_not() -> str:
    """Why system calls cannot be made to fail here; "" if they can."""
    if not shutil.which("strace"):
        return "strace is not installed (Debian: apt-get install strace)"
    probe = ["strace", "-qq", "-e", "inject=getpid:error=EIO", "true"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"strace cannot trace here: {tried.stderr.strip()[-200:]}" if tried.returncode else ""


@contextmanager
def _traced(pid: int, trace: Path, watch: Sequence[str], inject: str) -> Iterator[None]:
    names = {f"?{name}" for name in watch} | {name for name in inject.partition(":")[0].split(",") if name}
    command = ["strace", "-f", "-s", "0", "-o", str(trace), "-p", str(pid), "-e", f"trace={','.join(sorted(names))}"]
    if inject:
        command += ["-e", f"inject={inject}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr
        said = strace.stderr.readline()
        assert "attached" in said, said
        try:
            yield
            strace.communicate(timeout=60)
        except BaseException:
            strace.kill()
            raise


@contextmanager
def _untraced() -> Iterator[Any]:
    yield

"""Does a store that is killed a thousand times, with others at work in it, ever lose what it had acknowledged?

python -m tests.bench.soak [--kills 1000] [--workers 3] [--seed 1] [--dir DIR]

Workers are processes that run command lines of `llmos` (add, tag, rm, checkout, gc, repack, push to a folder) in one
store, without a pause. One after the other, at a random moment, is ended with SIGKILL while the others go on. Then the
store must open and every value that the killed worker had been told was kept must read back byte for byte; what it was
doing when it died may have happened or not. Every 100 kills all are killed at once and the store and the remote are
checked to the last byte. All workers also move one ref in common: every move that was acknowledged must be in its log.
The seed decides what is done; when, the machine decides. The exit code is 1 if anything was lost.
"""

import argparse
import contextlib
import dataclasses
import gc as collector
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmos_cli import app
from llmos_cli.formats import limits
from llmos_cli.formats.names import RefName
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.progress import Silent
from llmos_cli.store.fsck.fsck import check
from llmos_cli.store.handle import Store
from llmos_cli.store.local import init_store, open_store, save_config
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.packs import list_packs
from llmos_cli.store.refs.refs import read_ref, ref_history
from tests.bench.measure import print_machine

NAMES_EACH = 5
SHARED = RefName("shared")
FSCK_EVERY = 100
PACK_BYTES = 300_000  # so that a commit makes several packs, and a gc has many to decide on
RACES = {11: "another gc was at work", 13: "a gc at once took what was being added", 17: "another was faster"}
Content = dict[str, bytes]
Value = int | None  # the number of a content; None: there is no such ref


def content(number: int) -> Content:
    """What belongs to a number: some of it shared with other numbers, weights that differ a little, some its own."""
    generator = random.Random(number)
    files = {
        "shared": random.Random(number % 7).randbytes(40_000),
        "own": b"%d\n" % number + generator.randbytes(generator.randrange(60_000)),
    }
    if number % 3 == 0:
        words = np.random.default_rng(number % 2).normal(0, 0.02, 100_000).astype(np.float32)
        words[generator.randrange(90_000) :][:2000] += np.float32(0.001)
        files["model.safetensors"] = encode_header([("w", "F32", (len(words),))], {}) + words.tobytes()
    return files


def read(store: Store, name: str) -> Content | None:
    entry = read_ref(store, RefName(name))
    return {file.path: read_file(store, file) for file in read_manifest(store, entry.id).files} if entry else None


# ---------------------------------------------------------------------------------------------- the worker


class Worker:
    """Runs command lines for ever; says what it is about to do and what it was told."""

    def __init__(self, folder: Path, number: int, seed: int, known: dict[str, Value], pipe: int) -> None:
        self._store = folder / "store"
        self._remote = folder / "remote"
        self._own = folder / f"worker-{number}"
        self._number = number
        self._random = random.Random(seed)
        self._known = known
        self._pipe = pipe

    def run(self) -> None:
        shutil.rmtree(self._own, ignore_errors=True)
        self._own.mkdir()
        self._own.joinpath("out").touch()
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(self._own / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), stream)
        actions: dict[Callable[[], None], int] = {
            self._add: 40, self._tag: 10, self._remove: 10, self._gc: 14, self._checkout: 10, self._push: 10,
            self._move_shared: 6,
            self._repack: 6,
        }  # fmt: skip
        while True:
            self._random.choices(list(actions), weights=list(actions.values()))[0]()

    def _llmos(self, *words: str) -> int:
        os.truncate(1, 0)
        code = app.main(["--store", str(self._store), "--json", *words])
        if code not in (0, *RACES):
            self._fail(f"llmos {' '.join(words)}: exit {code}: {(self._own / 'err').read_text()[-2000:]}")
        self._say("ran", words[0], code)
        return code

    def _say(self, word: str, name: str, value: Value | str) -> None:
        os.write(self._pipe, f"{word} {name} {'-' if value is None else value}\n".encode())

    def _fail(self, why: str) -> None:
        os.write(self._pipe, f"failed {json.dumps(why)} -\n".encode())
        time.sleep(3600)

    def _change(self, name: str, value: Value, *words: str) -> None:
        self._say("begin", name, value)
        if self._llmos(*words) == 0:
            self._known[name] = value
            self._say("done", name, value)
        else:
            self._say("undone", name, value)

    def _source(self, number: int) -> str:
        folder = self._own / "source"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path, data in content(number).items():
            (folder / path).write_bytes(data)
        return str(folder)

    def _add(self) -> None:
        number = self._random.randrange(100_000)
        name = self._random.choice(list(self._known))
        self._change(name, number, "add", self._source(number), name)

    def _tag(self) -> None:
        there = [name for name, value in self._known.items() if value is not None]
        if there:
            source, name = self._random.choice(there), self._random.choice(list(self._known))
            self._change(name, self._known[source], "tag", source, name, "--force")

    def _remove(self) -> None:
        there = [name for name, value in self._known.items() if value is not None]
        if there:
            name = self._random.choice(there)
            self._change(name, None, "rm", name)

    def _gc(self) -> None:
        self._llmos("gc", *self._random.choice((("--grace", "0"), ("--grace", "0"), ("--grace", "0.0003"), ())))

    def _repack(self) -> None:
        self._llmos("gc", "--repack", "--grace", "0")

    def _checkout(self) -> None:
        there = [name for name, value in self._known.items() if value is not None]
        if there:
            name = self._random.choice(there)
            target = self._own / "checkout"
            shutil.rmtree(target, ignore_errors=True)
            self._llmos("checkout", name, str(target))
            value = self._known[name]
            assert value is not None
            if {path.name: path.read_bytes() for path in target.iterdir()} != content(value):
                self._fail(f"a checkout of {name} is not content {value}")

    def _push(self) -> None:
        there = [name for name, value in self._known.items() if value is not None]
        if there:
            name = self._random.choice(there)
            self._say("begin", f"remote/{name}", self._known[name])
            code = self._llmos("push", str(self._remote), name, "--force")
            self._say("undone" if code else "done", f"remote/{name}", self._known[name])

    def _move_shared(self) -> None:
        number = (self._number + 1) * 10_000_000 + self._random.randrange(10_000_000)
        if self._llmos("add", self._source(number), str(SHARED)) == 0:
            self._say("moved", "shared", json.loads((self._own / "out").read_text())["id"])


# ---------------------------------------------------------------------------------------------- the parent


@dataclass
class Running:
    """A worker as the parent sees it: what it said last, and the values it was told it had."""

    number: int
    pid: int
    pipe: int
    begun: dict[str, Value] = field(default_factory=dict)
    rest: bytes = b""


@dataclass
class Soak:
    folder: Path
    random: random.Random
    known: list[dict[str, Value]]
    remote: dict[str, set[Value]] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    running: dict[int, Running] = field(default_factory=dict)
    ran: Counter[str] = field(default_factory=Counter)
    races: Counter[int] = field(default_factory=Counter)
    kills: int = 0
    in_work: int = 0
    acknowledged: int = 0
    written: int = 0
    verified: int = 0
    lost: list[str] = field(default_factory=list)

    def start(self, number: int) -> None:
        pipe_out, pipe_in = os.pipe()
        seed = self.random.randrange(1 << 30)
        pid = os.fork()
        if pid == 0:
            os.close(pipe_out)
            try:
                Worker(self.folder, number, seed, dict(self.known[number]), pipe_in).run()
            except BaseException as exc:  # noqa: BLE001 - a child has nobody else to tell
                os.write(pipe_in, f"failed {json.dumps(f'{type(exc).__name__}: {exc}')} -\n".encode())
            os._exit(1)
        os.close(pipe_in)
        os.set_blocking(pipe_out, False)
        self.running[number] = Running(number, pid, pipe_out)

    def listen(self, worker: Running) -> None:
        """Take note of what a worker has said so far."""
        while True:
            try:
                data = os.read(worker.pipe, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                return
            *lines, worker.rest = (worker.rest + data).split(b"\n")
            for line in lines:
                word, rest = line.decode().split(" ", 1)
                name, value = rest.rsplit(" ", 1)
                self._note(worker, word, name, value)

    def _note(self, worker: Running, word: str, name: str, value: str) -> None:
        if word == "failed":
            self.lost.append(f"worker {worker.number}: {json.loads(name)}")
        elif word == "ran":
            self.ran[name] += 1
            self.races[int(value)] += 1
        elif word == "moved":
            self.moved.add(value)
            self.acknowledged += 1
        elif word == "begin":
            worker.begun = {name: None if value == "-" else int(value)}
        else:
            number = worker.begun.pop(name)
            if word == "done":
                self._set(worker.number, name, {number})
                self.acknowledged += 1
                self.written += sum(map(len, content(number).values())) if number is not None else 0

    def _set(self, worker: int, name: str, values: set[Value]) -> None:
        if name.startswith("remote/"):
            self.remote[name.removeprefix("remote/")] = values
        else:
            (self.known[worker][name],) = values

    def kill(self, *numbers: int) -> None:
        for number in numbers:
            os.kill(self.running[number].pid, signal.SIGKILL)
        for number in numbers:
            self._bury(number)

    def _bury(self, number: int) -> None:
        """Note the last words of a killed worker, and hold the store to them."""
        worker = self.running.pop(number)
        os.waitpid(worker.pid, 0)
        self.listen(worker)
        os.close(worker.pipe)
        self.kills += 1
        self.in_work += bool(worker.begun)
        with open_store(self.folder / "store", Silent()) as store:
            for name, value in list(self.known[number].items()):
                allowed = {value, *([worker.begun[name]] if name in worker.begun else [])}
                self.known[number][name] = self._verify(store, name, allowed, f"kill {self.kills}")
        for name, value in worker.begun.items():
            if name.startswith("remote/"):
                there = name.removeprefix("remote/")
                self.remote[there] = {value} | self.remote.get(there, {None})

    def _verify(self, store: Store, name: str, allowed: set[Value], when: str) -> Value:
        """Read a value back; returns which of the allowed ones it is."""
        try:
            found = read(store, name)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is a loss
            self.lost.append(f"{when}: {name} cannot be read: {exc}")
            return next(iter(allowed))
        self.verified += sum(map(len, found.values())) if found else 0
        for value in allowed:
            if found == (None if value is None else content(value)):
                return value
        self.lost.append(f"{when}: {name} is none of {allowed}")
        return next(iter(allowed))

    def check_all(self, when: str) -> None:
        """With nobody at work: every byte of the store and of the remote."""
        for place in ("store", "remote"):
            if not (self.folder / place / "FORMAT").exists():
                continue
            with open_store(self.folder / place, Silent()) as store:
                report = check(store, quick=False, progress=Silent())
                self.lost += [f"{when}: {place}: {item.where}: {item.what}" for item in report.problems]
                if place == "store":
                    log = {str(move.id) for move in ref_history(store, SHARED)}
                    self.lost += [f"{when}: the move of {SHARED} to {oid} is gone" for oid in self.moved - log]
                    for names in self.known:
                        for name, value in names.items():
                            self._verify(store, name, {value}, when)
                else:
                    for name, values in self.remote.items():
                        self.remote[name] = {self._verify(store, name, values, f"{when}: remote")}

    def go(self, kills: int) -> None:
        next_check = FSCK_EVERY
        while self.kills < kills and not self.lost:
            for number in range(len(self.known)):
                if number not in self.running:
                    self.start(number)
            time.sleep(min(1.0, self.random.expovariate(4)) + 0.002)
            for worker in self.running.values():
                self.listen(worker)
            if self.kills + len(self.running) < next_check:
                self.kill(self.random.choice(list(self.running)))
                continue
            self.kill(*self.running)
            next_check = self.kills + FSCK_EVERY
            self.check_all(f"after {self.kills} kills")
            print(f"{self.kills} kills, {self.acknowledged} acknowledged, {len(self.lost)} lost", flush=True)
        self.kill(*self.running)

    def tidy(self) -> None:
        """What the killed have left must go, and nothing else."""
        with contextlib.chdir(self.folder), open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere):
            for _ in range(2):
                later = time.time() - 3600
                for path in (self.folder / "store").glob("**/.tmp-*"):
                    os.utime(path, (later, later))
                if code := app.main(["--store", "store", "gc", "--grace", "0"]):
                    self.lost.append(f"the last gc: exit {code}")
        with open_store(self.folder / "store", Silent()) as store:
            left = [*store.tmp.iterdir(), *store.leases.iterdir(), *list_packs(store.trash).values()]
            self.lost += [f"{path} was left behind" for path in left]


def _import_all() -> None:
    """So that a new worker need not: it should die at work, not while it imports."""
    app.build(("add", "tag", "rm", "checkout", "gc", "push"))
    for room in ("formats", "store", "remote"):
        for module in sorted((Path(app.__file__).parent / room).glob("[!_]*.py")):
            with contextlib.suppress(ImportError):  # what an extra brings
                importlib.import_module(f"llmos_cli.{room}.{module.stem}")
    collector.freeze()  # or a child's first collection would copy every page


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where the stores are made; kept")
    options = parser.parse_args()
    print_machine()
    limits.PACK_TARGET_BYTES = PACK_BYTES  # type: ignore[misc]
    _import_all()
    with contextlib.ExitStack() as stack:
        folder = options.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmos-soak-")))
        folder.mkdir(exist_ok=True)
        init_store(folder / "store")
        with open_store(folder / "store", Silent()) as store:  # nothing is kept for its age: gc has much to take
            gc = dataclasses.replace(store.config.gc, keep_days=0)
            save_config(store, dataclasses.replace(store.config, gc=gc))
        names = [{f"w{worker}-{number}": None for number in range(NAMES_EACH)} for worker in range(options.workers)]
        soak = Soak(folder.resolve(), random.Random(options.seed), names)
        started = time.monotonic()
        soak.go(options.kills)
        soak.check_all("at the end")
        if not soak.lost:
            soak.tidy()
            soak.check_all("after the last gc")
    print(
        f"{soak.kills} kills of {options.workers} workers side by side in {time.monotonic() - started:.0f} s, "
        f"{soak.in_work} of them while something was being changed"
    )
    print(
        f"{sum(soak.ran.values())} commands ended: " + ", ".join(f"{n} {verb}" for verb, n in sorted(soak.ran.items()))
    )
    print("; ".join(f"{soak.races[code]} times {why} (exit {code})" for code, why in RACES.items()))
    print(
        f"{soak.acknowledged} commits acknowledged, {soak.written / 1e6:,.0f} MB of content in them, "
        f"{soak.verified / 1e6:,.0f} MB read back and compared"
    )
    print(f"{len(soak.lost)} losses")
    for text in soak.lost[:20]:
        print(f"  {text}")
    return 1 if soak.lost else 0


if __name__ == "__main__":
    sys.exit(main())

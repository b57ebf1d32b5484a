"""The main job from end to end, on text that every machine has. Each step is the command a user would type."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import LlmosError, UsageError
from llmos_cli.ui.output import Output, duration, percent, plural, size
from llmos_cli.ui.session import session

if TYPE_CHECKING:
    from llmos_cli.formats.manifest import Manifest

_HELD_OUT = ("json", "email", "http", "logging")  # packages the model never sees in training
_LEFT_OUT = ("test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__")
_ROWS = ("--max-rows", "128")  # as many as quantize compares on, so that nothing is measured twice
_PROMPT = "class Reader:\n    def __init__(self, "


@dataclass(frozen=True)
class _Step:
    """What a step did, what it took, and how many bytes the store's packs held after it."""

    title: str
    seconds: float
    result: str
    physical: int


def demo(
    ctx: typer.Context,
    directory: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="A new folder to work in.", readable=False)
    ] = Path("llmos-demo"),
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=100_000, help="Training steps: more is slower and better.")
    ] = 300,
) -> None:
    """Try everything: text to a served, quantized model in about two minutes.

    Examples:
      llmos demo
      llmos demo --dir /tmp/try --steps 1000
    """
    out = session(ctx).out
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(
            f"{directory} exists and is not empty",
            hint=f"go on with it (cd {directory}; llmos ls) or use another folder: llmos demo --dir OTHER",
        )
    directory.mkdir(parents=True, exist_ok=True)
    runner = _Runner(directory.resolve(), out)
    files, text_bytes = _copy_corpus(directory)
    _tell(
        out,
        f"This builds a small language model from the source of the Python standard library ({plural(files, 'file')},\n"
        f"{size(text_bytes)}) and takes it all the way to an HTTP API. Every step is a command that you can type\n"
        f"yourself in {directory}.",
    )
    runner.step("make a store", "init")
    runner.step("text to training data", "shard", "corpus/train", "code", "--tokenizer", "train:4096")
    runner.step("held-out text, same tokenizer", "shard", "corpus/held-out", "code-held-out", "--tokenizer", "code")
    runner.step(
        "train a small Llama",
        *("train", "tiny", "--data", "code", "--depth", "2", "--batch", "8", "--lr", "2e-3"),
        *("--steps", str(steps), "--save-every", str(max(1, steps // 3))),
    )
    runner.step("measure it", "eval", "tiny", "--data", "code-held-out", *_ROWS)
    runner.step("shrink it to 8 bits", "quantize", "tiny", "tiny-int8", "--scheme", "int8", "--data", "code-held-out")
    runner.step("measure the small one", "eval", "tiny-int8", "--data", "code-held-out", *_ROWS)
    runner.step("remember a second place", "remote", "add", "backup", "backup")
    runner.step("copy it all there", "push", "backup", "--all")
    runner.step("and back again", "clone", "backup", "clone")
    _compare(runner, directory / "clone")
    completion = _serve(runner)
    runner.step("what could be given back?", "gc")
    runner.step("where did it come from?", "log", "tiny-int8")
    _summary(runner, text_bytes, completion)


class _Runner:
    """Runs commands in the demo's folder as a user would, and keeps what they cost."""

    def __init__(self, folder: Path, out: Output) -> None:
        self.folder = folder
        self.out = out
        self.steps: list[_Step] = []

    def command(self, *arguments: str) -> list[str]:
        flags = ["--json"] if self.out.json else ["--quiet"] if self.out.quiet else []
        return [sys.executable, "-m", "llmos_cli", *flags, *arguments]

    def step(self, title: str, *arguments: str) -> None:
        self.announce(title, *arguments)
        started = time.perf_counter()
        done = subprocess.run(self.command(*arguments), cwd=self.folder, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise _StepFailed(f"llmos {' '.join(arguments)} ended with exit code {done.returncode}", done.returncode)
        self.note(title, time.perf_counter() - started, self.describe(arguments))

    def announce(self, title: str, *arguments: str) -> None:
        _tell(self.out, f"\n[{len(self.steps) + 1}] {title}\n$ llmos {' '.join(arguments)}")

    def note(self, title: str, seconds: float, result: str) -> None:
        physical = sum(path.stat().st_size for path in (self.folder / ".llmos" / "packs").glob("*/*.pack"))
        self.steps.append(_Step(title, seconds, result, physical))

    def describe(self, arguments: Sequence[str]) -> str:
        """The result of a step in a few words, read from the store."""
        match list(arguments[:3]):
            case ["shard", _, name]:
                meta = self.manifest(name).meta
                return f"{meta['tokens']:,} tokens in {plural(int(str(meta['shards'])), 'shard')}"
            case ["train", name, *_]:
                return f"model of {size(self.manifest(name).size)}"
            case ["eval", name, *_]:
                return f"perplexity {float(str(self.manifest(f'{name}-eval').meta['perplexity'])):.2f}"
            case ["quantize", name, small]:
                before, after = self.manifest(name).size, self.manifest(small).size
                return f"{size(before)} -> {size(after)} ({percent(after, before)})"
            case ["clone", *_]:
                return "identical ids"
            case _:
                return ""

    def manifest(self, text: str) -> "Manifest":
        from llmos_cli.store.local import open_store
        from llmos_cli.store.packs.objects import read_manifest
        from llmos_cli.store.refs.resolve import resolve

        with open_store(self.folder / ".llmos") as store:
            return read_manifest(store, resolve(store, text).id)


class _StepFailed(LlmosError):
    """A step's own command has said what was wrong; the demo ends with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, hint="its own message is above; what was committed is safe")
        self.exit_code = exit_code


def _tell(out: Output, text: str) -> None:
    for line in text.split("\n"):
        out.say(line)


def _copy_corpus(directory: Path) -> tuple[int, int]:
    """The standard library's source files into `corpus/`; returns how many and their bytes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    count = total = 0
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(name for name in subfolders if name not in _LEFT_OUT)
        for file in sorted(files):
            path = Path(folder, file)
            data = path.read_bytes() if path.suffix == ".py" and path.is_file() else b""
            if not data or b"\0" in data or not _is_utf8(data):
                continue
            name = path.relative_to(library)
            target = directory / "corpus" / ("held-out" if name.parts[0] in _HELD_OUT else "train") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            count, total = count + 1, total + len(data)
    if not count:
        raise LlmosError(f"no Python source in {library}", hint="shard a text of your own: llmos shard FILE... NAME")
    return count, total


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _compare(runner: _Runner, clone: Path) -> None:
    """The clone must have the same refs with the same ids."""
    from llmos_cli.store.local import open_store
    from llmos_cli.store.refs.refs import list_refs

    found = []
    for folder in (runner.folder, clone):
        with open_store(folder / ".llmos") as store:
            found.append({str(entry.ref): entry.id for entry in list_refs(store)})
    if found[0] != found[1]:
        raise LlmosError(f"the clone {clone} does not have the ids that were pushed")
    runner.out.say(f"all {plural(len(found[0]), 'ref')} have the same ids in the store and in its clone")


def _serve(runner: _Runner) -> str:
    """Serve the small model, ask it over HTTP, stop it; returns the completion."""
    import urllib.request  # costs more than all of start-up

    title = "answer over HTTP"
    arguments = ("serve", "tiny-int8", "--port", "0")
    runner.announce(title, *arguments)
    started = time.perf_counter()
    with _server([sys.executable, "-m", "llmos_cli", "--json", *arguments], runner.folder) as url:
        body = {"model": "tiny-int8", "prompt": _PROMPT, "max_tokens": 48, "temperature": 0.5, "seed": 1}
        runner.out.say(f"$ curl {url}/v1/completions -d '{json.dumps(body)}' -H 'Content-Type: application/json'")
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
    text = str(answer["choices"][0]["text"])
    _tell(runner.out, _PROMPT + text)
    runner.note(title, time.perf_counter() - started, f"{answer['usage']['completion_tokens']} tokens")
    return text


@contextlib.contextmanager
def _server(command: list[str], folder: Path) -> Iterator[str]:
    """A running server's URL; it is stopped at the end."""
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout
            assert process.stderr
            line = process.stdout.readline()
            if not line:
                said = process.stderr.read().decode("utf-8", "replace").strip()
                raise LlmosError(f"the server did not start: {said[-500:]}")
            yield str(json.loads(line)["url"])
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def _summary(runner: _Runner, text_bytes: int, completion: str) -> None:
    out = runner.out
    out.line("")
    rows = [
        [str(number), step.title, duration(step.seconds), step.result, size(step.physical)]
        for number, step in enumerate(runner.steps, 1)
    ]
    out.table(["#", "step", "time", "result", "store"], rows, right={0, 2, 4})
    from llmos_cli.store.inspect.usage import usage
    from llmos_cli.store.local import open_store

    with open_store(runner.folder / ".llmos") as store:
        found = usage(store)
        model = next(entry for entry in found.refs if entry.ref.name == "tiny-int8")
    seconds = sum(step.seconds for step in runner.steps)
    out.line("")
    out.line(
        f"{size(text_bytes)} of text became a served model in {duration(seconds)}. The store holds "
        f"{size(found.logical)} of files in {size(found.stored)} ({percent(found.stored, found.logical)}), and "
        f"{size(found.other)} of earlier checkpoints, which 'llmos gc' gives back in time."
    )
    with contextlib.suppress(ValueError):
        folder = runner.folder.relative_to(Path.cwd())
        _tell(out, f"\nGo on: cd {folder}")
        out.say("  llmos ls                                    what is in the store")
        out.say("  llmos show tiny-int8                        what one thing is made of")
        out.say('  llmos generate tiny-int8 "import os"        ask it on the command line')
        out.say("  llmos serve tiny-int8                       an OpenAI-compatible API")
        out.say("  llmos train better --data code --model tiny --steps 500   train it further")
        out.say("  llmos checkout tiny hf-model                its Hugging Face folder, byte for byte")
    out.result(
        {
            "id": str(model.id),
            "ref": str(model.ref),
            "kind": model.kind,
            "seconds": round(seconds, 1),
            "completion": completion,
            "steps": [dataclasses.asdict(step) for step in runner.steps],
            "logical": found.logical,
            "physical": found.disk,
        }
    )

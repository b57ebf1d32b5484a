"""How fast does training data go in and come out, beside a mapped file and its peers, and is a resumed batch the same?

python -m tests.bench.data [--mtok 20] [--rounds 3] [--dir DIR] [--only PARTS] [--against NAMES] [--peers-venv DIR]

Parts: tokenize (text to a dataset, beside the tokenizer alone), size (stored bytes to two a token), convert (rows that
are tokens already), read (a shuffled epoch of rows of 1024 in batches of 8, no workers), resume (in the middle of it).
The text is the source of Python's library and of what is installed beside it. Loaders: see with_loader.py; those that
llmos does not bring are looked for in the virtual environment that --peers-venv names. With --dir, data is kept.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.measure import alternate, goal, in_child, print_machine, report, size_of, spend
from tests.bench.peers import LLMOS

SEQ_LEN, BATCH = 1024, 8
VOCAB = 8192
CP, OURS, PACKED = "memmap", "llmos", "llmos-packed"
PEERS = {"nanogpt": "torch", "litdata": "litdata", "mds": "streaming", "hf": "datasets", "hf-stream": "datasets"}
SCRIPT = Path(__file__).with_name("with_loader.py")


@dataclass(frozen=True)
class Bench:
    work: Path
    rounds: int
    pythons: Mapping[str, str]  # of each loader

    @property
    def text(self) -> Path:
        return self.work / "text.jsonl"

    @property
    def rows(self) -> Path:
        return self.work / "rows.npy"

    def folder(self, name: str) -> Path:
        """Where a loader's data lies; what `llmos shard` made stands for documents that share rows."""
        return self.work / ("made" if name == PACKED else name)

    def run(self, name: str, action: str, *more: object) -> dict[str, Any]:
        loader = OURS if name == PACKED else name
        words = [self.pythons[loader], "-W", "ignore", SCRIPT, loader, action, self.folder(name), self.rows, *more]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed to {action}:\n{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def llmos(self, *words: object) -> list[str]:
        return [*LLMOS, "--store", str(self.folder(PACKED) / "store"), *(str(word) for word in words)]

    def converted(self) -> None:
        for name in self.pythons:
            if not self.folder(name).exists():
                self.run(name, "convert")


def make_text(path: Path, size: int) -> None:
    """About `size` bytes of Python source, one file a line."""
    held = 0
    with path.open("w", encoding="utf-8") as out:
        for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
            for file in sorted(Path(folder).rglob("*.py")):
                if "site-packages" in file.parts and folder != sysconfig.get_path("purelib"):
                    continue
                try:
                    text = file.read_text("utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                if text.strip() and held < size:
                    held += out.write(json.dumps({"text": text}) + "\n")


def make_data(bench: Bench, mtok: float) -> None:
    """Text, a dataset that `llmos shard` makes of it, and its rows as an array, unless they are there."""
    if bench.rows.exists():
        return
    make_text(bench.text, int(mtok * 1e6 * 4))
    bench.folder(PACKED).mkdir(exist_ok=True)
    spend(bench.llmos("init"))
    spend(bench.llmos("shard", bench.text, "data", "--tokenizer", f"train:{VOCAB}", "--seq-len", SEQ_LEN))
    in_child(save_rows, bench.folder(PACKED) / "store", bench.rows)


def save_rows(store: Path, target: Path) -> None:
    from llmos_cli.data.batches import TokenRows
    from llmos_cli.store.local import open_store
    from llmos_cli.store.packs.objects import read_manifest
    from llmos_cli.store.refs.resolve import resolve

    with open_store(store) as opened:
        rows = TokenRows(opened, read_manifest(opened, resolve(opened, "data").id))
        parts = [batch.input_ids.astype(np.uint16) for batch in rows.in_order(512) if batch.input_ids.shape[1] > 1]
        np.save(target, np.concatenate([part for part in parts if part.shape[1] == rows.seq_len]))


def encode_alone(text: Path, store: Path) -> float:
    """Seconds that the tokenizer takes for the same text, a megabyte a call, doing nothing with what it finds."""
    from llmos_cli.data.tokenizer import FILES, make_encoding
    from llmos_cli.store.local import open_store
    from llmos_cli.store.packs.objects import read_file, read_manifest
    from llmos_cli.store.refs.resolve import resolve

    with open_store(store) as opened:
        manifest = read_manifest(opened, resolve(opened, "data").id)
        entries = {name: manifest.file(f"tokenizer/{name}") for name in FILES}
        files = {name: read_file(opened, entry) for name, entry in entries.items() if entry}
    tokenizer = make_encoding(files, "data").tokenizer
    batches: list[list[str]] = [[]]
    held = 0
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            batches[-1].append(json.loads(line)["text"])
            held += len(line)
            if held > 1 << 20:
                batches.append([])
                held = 0
    began = time.perf_counter()
    for batch in batches:
        tokenizer.encode_batch(batch, add_special_tokens=False)
    return time.perf_counter() - began


def tokenize(bench: Bench) -> None:
    store = bench.folder(PACKED) / "store"

    def shard() -> float:
        fresh = bench.work / "again"
        shutil.rmtree(fresh, ignore_errors=True)
        spend([*LLMOS, "--store", str(fresh), "init"])
        spend([*LLMOS, "--store", str(store), "checkout", "data", str(bench.work / "folder"), "--force"])
        words = ["shard", str(bench.text), "data", "--tokenizer", str(bench.work / "folder" / "tokenizer")]
        seconds = spend([*LLMOS, "--store", str(fresh), *words, "--seq-len", str(SEQ_LEN)]).wall
        shutil.rmtree(fresh)
        return seconds

    taken = alternate({"encode_batch": lambda: in_child(encode_alone, bench.text, store), "llmos shard": shard}, 1)
    size = bench.text.stat().st_size
    speeds = {name: f"{size / 1e6 / statistics.median(seconds):.2f} MB/s" for name, seconds in taken.items()}
    report("text to tokens; to a dataset, whole command", taken, "encode_batch", speeds)
    rate = statistics.median(taken["encode_batch"]) / statistics.median(taken["llmos shard"])
    least("rate of shard, to that of encode_batch alone", rate, 0.9)


def sizes(bench: Bench) -> None:
    store = bench.folder(PACKED) / "store"
    shown = subprocess.run(bench.llmos("show", "data", "--tensors", "--json"), capture_output=True, check=True)
    tokens = json.loads(shown.stdout)
    listed = tokens["tensors"]["list"]
    plain = sum(tensor["size"] for tensor in listed if tensor["name"] == "tokens")
    kept = sum(tensor["stored"] for tensor in listed if tensor["name"] == "tokens")
    print(f"\n{plain / 2e6:.1f} M tokens of a vocabulary of {VOCAB}; fill {tokens['meta'].get('fill')}")
    print(
        f"stored in {kept / 1e6:.2f} MB, {kept / plain:.3f} of two bytes each; the store: {size_of(store) / 1e6:.2f} MB"
    )
    goal("stored bytes, tables and tokenizer with them, to two a token", size_of(store) / plain, 0.8)


def convert(bench: Bench) -> None:
    def turn(name: str) -> float:
        shutil.rmtree(bench.folder(name), ignore_errors=True)
        os.sync()
        return float(bench.run(name, "convert")["seconds"])

    taken = alternate({name: lambda name=name: turn(name) for name in bench.pythons if name != "nanogpt"}, bench.rounds)
    plain = bench.rows.stat().st_size
    notes = {name: f"{size_of(bench.folder(name)) / plain:.3f} of two bytes a token" for name in taken}
    report("rows of tokens, converted and durable, without imports", taken, CP, notes)
    for peer in ("mds", "litdata"):
        if peer in taken:
            goal(f"conversion, to {peer}", statistics.median(taken[OURS]) / statistics.median(taken[peer]), 1)


def read(bench: Bench) -> None:
    bench.converted()
    names = [*bench.pythons, PACKED]
    taken = alternate({name: lambda name=name: bench.run(name, "read") for name in names}, bench.rounds)
    rates = {name: statistics.median(found["rate"] for found in all_) for name, all_ in taken.items()}
    print(
        f"\na shuffled epoch in batches of {BATCH}, no workers\n"
        f"{'':16}{'Mtok/s':>10}{'ratio':>8}{'first batch':>13}{'RSS':>9}"
    )
    for name, all_ in taken.items():
        first = statistics.median(found["first"] for found in all_)
        memory = max(found["memory"] for found in all_)
        print(f"{name:16}{rates[name]:10.1f}{rates[name] / rates[CP]:8.2f}{first:12.3f}s{memory / 1e6:6.0f} MB")
    least("rate, to slices of a mapped file", rates[OURS] / rates[CP], 0.8)
    if "litdata" in rates:
        least("rate, to litdata", rates[OURS] / rates["litdata"], 1)
    goal("first batch", statistics.median(found["first"] for found in taken[OURS]), 1, " s")


def resume(bench: Bench) -> None:
    """Cut in the middle; a new process goes on. What comes next is compared with what the first process saw next."""
    bench.converted()
    step = len(np.load(bench.rows, mmap_mode="r")) // BATCH // 2
    print(f"\nresumed after {step} batches, in a new process\n{'':16}{'first batch':>13}  the batch")
    for name in [*(name for name in bench.pythons if name != "nanogpt"), PACKED]:
        expected = bench.run(name, "cut", step)["digest"]
        found = [bench.run(name, "resume", step) for _ in range(bench.rounds)]
        first = statistics.median(item["first"] for item in found)
        same = all(item["digest"] == expected for item in found)
        print(f"{name:16}{first:12.3f}s  {'identical' if same else 'ANOTHER ONE'}", flush=True)
        if name in (OURS, PACKED):
            goal(f"{name}, to the first batch", first, 1, " s")
    print("nanogpt          has no state of its data")


def least(what: str, value: float, least: float) -> None:
    """Say whether a figure reaches its bound."""
    print(f"{'ok    ' if value >= least else 'MISSED'} {what}: {value:.3g}x, at least {least:g}x", flush=True)


def find_loaders(venv: Path | None, wanted: str | None) -> dict[str, str]:
    """The python of each loader that is installed; says which versions, and who is missing."""
    found = {CP: sys.executable, OURS: sys.executable}
    python = str(venv / "bin" / "python") if venv else sys.executable
    for name, package in PEERS.items():
        project = {"streaming": "mosaicml-streaming"}.get(package, package)
        asked = f"import importlib.metadata as m; print(m.version({project!r}))"
        told = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
        if told.returncode:
            print(f"skipped: {name}, {project} is not in a virtual environment named by --peers-venv")
        elif wanted is None or name in wanted.split(","):
            print(f"{name}: {project} {told.stdout.strip()}")
            found[name] = python
    return found


PARTS: Mapping[str, Callable[[Bench], None]] = {
    "tokenize": tokenize,
    "size": sizes,
    "convert": convert,
    "read": read,
    "resume": resume,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mtok", type=float, default=20, help="millions of tokens, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure; keeps the data")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--against", help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--peers-venv", type=Path, help="a virtual environment with litdata, mosaicml-streaming, datasets"
    )
    options = parser.parse_args(words)
    print_machine()
    print(f"load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as scratch:
        work = options.dir or Path(scratch)
        work.mkdir(exist_ok=True)
        bench = Bench(work, options.rounds, find_loaders(options.peers_venv, options.against))
        make_data(bench, options.mtok)
        for part in options.only.split(","):
            PARTS[part](bench)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()

"""How fast and how small is the store beside cp + fsync and its peers, on models whose weights were really trained?

python -m tests.bench.store [--gb 0.7] [--rounds 5] [--dir DIR] [--only PARTS] [--against NAMES] [--peers-venv DIR]

Parts: small, add, again, checkout, load, chain, fp32, run, train. Contenders: see peers.py; DVC and ZipNN are looked
for in the virtual environment that --peers-venv names. Models are made as models.py tells, in --dir or in a temporary
folder; with --dir they are kept and used again.
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import probes
from tests.bench.measure import (
    RSS,
    Cost,
    alternate,
    evict,
    files_below,
    goal,
    in_child,
    make_models,
    median,
    print_machine,
    report_costs,
    size_of,
    spend,
)
from tests.bench.peers import COPY, LLMOS, Contender, contenders, named

FAMILY = {"base": "the dense model", "tuned": "its full fine-tune", "merged": "its LoRA-merged sibling"}
CP, OURS, XOR = "cp + fsync", "llmos", "XOR + zstd-3"


@dataclass(frozen=True)
class Added:
    """What adding models one after the other took, and by how much each made the store grow (in the last round)."""

    costs: Mapping[str, Mapping[str, list[Cost]]]  # model, contender
    grown: Mapping[str, Mapping[str, int]]

    def ratio(self, model: str, contender: str = OURS) -> float:
        return median(self.costs[model][contender]) / median(self.costs[model][CP])


@dataclass(frozen=True)
class Bench:
    work: Path
    models: Path
    rounds: int
    peers: Mapping[str, Contender]

    @property
    def store(self) -> Path:
        return self.peers[OURS].stored

    def add(self, models: Sequence[str], rounds: int | None = None, peers: Iterable[str] = ()) -> Added:
        """Every contender in turn starts afresh and adds the models; each but the first has the one before as base
        where a tool wants to be told (members of the family: the dense model)."""
        names = [name for name in self.peers if not peers or name in peers]
        costs: dict[str, dict[str, list[Cost]]] = {model: {name: [] for name in names} for model in models}
        grown: dict[str, dict[str, int]] = {model: {} for model in models}

        def turn(name: str) -> None:
            contender = self.peers[name]
            contender.fresh()
            for number, model in enumerate(models):
                base = models[0 if models[0] in FAMILY else number - 1] if number else None
                before = contender.size()
                os.sync()
                cost = contender.add(self.models / model, label(model), self.models / base if base else None)
                costs[model][name].append(cost)
                grown[model][name] = contender.size() - before
            if name != OURS:
                shutil.rmtree(contender.folder)

        alternate({name: lambda name=name: turn(name) for name in names}, rounds or self.rounds)
        return Added(costs, grown)

    def report(self, added: Added, model: str, what: str) -> None:
        size = size_of(self.models / model)
        notes = {
            name: f"{bytes_ / 1e6:8.1f} MB, {bytes_ / size:.3f} of its size"
            for name, bytes_ in added.grown[model].items()
        }
        report_costs(f"add of {what}, {size / 1e6:.1f} MB", added.costs[model], CP, notes)

    def with_family(self) -> None:
        """The three models in our store, unless they are there."""
        if not (self.store / "refs" / "merged").exists():
            self.peers[OURS].fresh()
            for model in FAMILY:
                self.peers[OURS].add(self.models / model, model, None)

    def llmos(self, *words: str) -> Cost:
        return spend([*LLMOS, "--store", str(self.store), *words])

    def memory(self, what: str, costs: Iterable[Cost]) -> None:
        goal(f"peak RSS of {what}", max(cost.memory for cost in costs) / 1e6, RSS / 1e6, " MB")


def label(model: str) -> str:
    return model.replace("/", "-")


def add(bench: Bench) -> None:
    added = bench.add(list(FAMILY))
    for model, what in FAMILY.items():
        bench.report(added, model, what)
    plain = sum(size_of(bench.models / model) for model in FAMILY)
    totals = {name: sum(added.grown[model][name] for model in FAMILY) for name in bench.peers}
    print("\nthe three together")
    for name, total in totals.items():
        print(f"{name:24}{total / 1e6:9.1f} MB{total / plain:8.3f}")
    print()
    grown = {model: added.grown[model][OURS] for model in FAMILY}
    goal("time of the dense model, to cp + fsync", added.ratio("base"), 1.2)
    goal("its bytes, to its size", grown["base"] / size_of(bench.models / "base"), 0.665)
    goal("time of the fine-tune, to cp + fsync", added.ratio("tuned"), 1.5)
    if XOR in bench.peers:
        goal("its bytes, to XOR + zstd-3", grown["tuned"] / added.grown["tuned"][XOR], 0.62)
    dense = median(added.costs["base"][OURS])
    goal("time of the sibling, to the dense model's", median(added.costs["merged"][OURS]) / dense, 0.6)
    changed = in_child(probes.changed_bytes, bench.models / "base", bench.models / "merged")
    goal("its bytes, to those of its changed tensors", grown["merged"] / changed, 1.0)
    if "borg" in bench.peers:
        goal("bytes of the three, to borg", totals[OURS] / totals["borg"], 0.60)
    bench.memory("add", [cost for model in FAMILY for cost in added.costs[model][OURS]])


def fp32(bench: Bench) -> None:
    added = bench.add(["base-fp32"], min(bench.rounds, 3))
    bench.report(added, "base-fp32", "a dense fp32 model")
    print()
    goal("bytes of fp32, to its size", added.grown["base-fp32"][OURS] / size_of(bench.models / "base-fp32"), 0.835)


def small(bench: Bench) -> None:
    """The real pair that the big one is made of: how alike are they?"""
    measures = [name for name in (CP, OURS, XOR, "XOR + planes + zstd-3") if name in bench.peers]
    for base, tuned in (("small-base", "small-tuned"), ("base", "tuned")):
        added = bench.add([base, tuned], 1, measures)
        size = size_of(bench.models / tuned)
        print(f"\n{base}, {tuned} ({size / 1e6:.1f} MB each): bytes to size")
        for name in measures[1:]:
            ratios = [added.grown[model][name] / size_of(bench.models / model) for model in (base, tuned)]
            print(f"{name:24}{ratios[0]:8.3f}{ratios[1]:8.3f}", flush=True)


def again(bench: Bench) -> None:
    bench.with_family()
    model = bench.models / "base"
    runs: dict[str, Callable[[], Cost]] = {
        "python -c pass": lambda: spend([sys.executable, "-c", "pass"]),
        "llmos --version": lambda: spend([*LLMOS, "--version"]),
        "llmos add": lambda: bench.llmos("add", str(model), "base"),
        "llmos add --rehash": lambda: bench.llmos("add", "--rehash", str(model), "base"),
    }
    taken = alternate(runs, bench.rounds)
    report_costs("add of the dense model, which is stored already", taken, "python -c pass", {})
    inside = in_child(probes.add_again, bench.store, model, "base")
    speed = in_child(probes.hash_speed, model / "model.safetensors")
    rehashed = size_of(model) / median(taken["llmos add --rehash"])
    print(f"{'inside a process':24}{inside:9.4f}s")
    print(f"--rehash: {rehashed / 1e9:.2f} GB/s; reading and hashing alone {speed / 1e9:.2f} GB/s\n")
    goal("an unchanged model", 1000 * median(taken["llmos add"]), 100, " ms")
    bench.memory("add --rehash", taken["llmos add --rehash"])


def checkout(bench: Bench) -> None:
    bench.with_family()
    out = bench.work / "out"

    def clean(cold: Iterable[Path]) -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        evict(cold)

    def copy(cold: bool) -> Cost:
        clean(files_below(bench.models / "base") if cold else ())
        return spend(["sh", "-c", COPY, "sh", str(bench.models / "base"), str(out)])

    def ours(model: str, cold: bool) -> Cost:
        clean(files_below(bench.store / "packs") if cold else ())
        return bench.llmos("checkout", model, str(out))

    for model, what in FAMILY.items():
        taken = alternate(
            {
                CP: lambda: copy(True),
                OURS: lambda model=model: ours(model, True),
                f"{CP}, warm": lambda: copy(False),
                f"{OURS}, warm": lambda model=model: ours(model, False),
            },
            bench.rounds,
        )
        report_costs(f"checkout of {what} from a cold page cache", taken, CP, {})
        same = filecmp.cmp(bench.models / model / "model.safetensors", out / "model.safetensors", shallow=False)
        print("byte for byte what was added" if same else "NOT WHAT WAS ADDED")
        goal(f"checkout of {what}, to cp + fsync", median(taken[OURS]) / median(taken[CP]), 1.2)
        bench.memory("checkout", taken[OURS])
    shutil.rmtree(out)


def load(bench: Bench) -> None:
    """All tensors into torch, each time in a fresh process, and one tensor alone."""
    bench.with_family()
    plain, stored = files_below(bench.models / "base"), files_below(bench.store / "packs")

    def from_plain(cold: bool) -> probes.Load:
        evict(plain if cold else ())
        return in_child(probes.load_plain, bench.models / "base")

    def from_store(model: str, cold: bool) -> probes.Load:
        evict(stored if cold else ())
        return in_child(probes.load_stored, bench.store, model)

    for cold in (True, False):
        os.sync()
        taken = alternate(
            {
                "load_file": lambda cold=cold: from_plain(cold),
                "llmos, dense": lambda cold=cold: from_store("base", cold),
                "llmos, fine-tune": lambda cold=cold: from_store("tuned", cold),
            },
            bench.rounds,
        )
        print(f"\nall tensors into torch, {'cold' if cold else 'warm'}: seconds until there, until read once")
        medians = {name: statistics.median(item.read for item in items) for name, items in taken.items()}
        for name, items in taken.items():
            print(f"{name:24}{statistics.median(item.there for item in items):9.3f}s{medians[name]:9.3f}s")
        goal("load of the dense model, to load_file", medians["llmos, dense"] / medians["load_file"], 1 if cold else 2)
    seconds, size, read = in_child(probes.load_one, bench.store, "base")
    print(f"one tensor of {size / 1e6:.1f} MB: {1e3 * seconds:.0f} ms, {read / 1e6:.1f} MB read")


def chain(bench: Bench) -> None:
    bench.with_family()
    found = in_child(probes.chain, bench.store, "tuned", "base")
    plain, delta = 1e3 * found.plain, 1e3 * found.delta
    print(f"\nreading 4 MiB: {plain:.2f} ms as planes, {delta:.2f} ms at the end of a chain of depth {found.depth}")
    goal("a chunk at the end of a full chain, to a plain one", found.delta / found.plain, 3)


def run(bench: Bench) -> None:
    steps = sorted((bench.models / "steps").iterdir())
    models = [f"steps/{step.name}" for step in steps]
    added = bench.add(models, 1)
    sizes = [size_of(step) for step in steps]
    print(f"\na training run's checkpoints, fp32 with the optimizer's state, {sizes[0] / 1e6:.1f} MB each: MB")
    for name in bench.peers:
        grown = [added.grown[model][name] for model in models]
        each = "".join(f"{bytes_ / 1e6:8.1f}" for bytes_ in grown)
        print(f"{name:24}{each}  all {sum(grown) / sum(sizes):.3f} of their size", flush=True)


def train(bench: Bench) -> None:
    """Checkpoints that our own trainer commits."""
    store = bench.work / "train"
    shutil.rmtree(store, ignore_errors=True)
    llmos = [*LLMOS, "--store", str(store)]
    spend([*llmos, "init"])
    folder = str(Path(json.__file__).parent)
    spend([*llmos, "shard", folder, "code", "--tokenizer", "train:512", "--seq-len", "64", "--skip-bad"])
    before = size_of(store)
    words = ["train", "tiny", "--data", "code", "--depth", "4", "--steps", "80", "--save-every", "20", "--batch", "4"]
    cost = spend([*llmos, *words])
    grown = size_of(store) - before
    logical = in_child(probes.plain_bytes, store, ["tiny", *(f"tiny:checkpoint~{back}" for back in range(4))])
    shutil.rmtree(store)
    print(f"\nllmos train, 80 steps of depth 4 with a checkpoint every 20: {cost.wall:.1f} s")
    print(f"model and checkpoints {logical / 1e6:.1f} MB, stored in {grown / 1e6:.1f} MB, {grown / logical:.3f}")


PARTS: Mapping[str, Callable[[Bench], None]] = {
    "small": small,
    "add": add,
    "again": again,
    "checkout": checkout,
    "load": load,
    "chain": chain,
    "fp32": fp32,
    "run": run,
    "train": train,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure; keeps the models")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--against", help="contenders, separated by commas")
    parser.add_argument("--peers-venv", type=Path, help="a virtual environment with dvc and zipnn")
    options = parser.parse_args()
    parts = [PARTS[name] for name in options.only.split(",")]
    print_machine()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="work-") as scratch:
        work = Path(scratch)
        models = (options.dir or work) / f"models-{options.gb:g}"
        make_models(models, options.gb)
        peers = named(contenders(work, options.peers_venv), options.against)
        bench = Bench(work, models, options.rounds, peers)
        for part in parts:
            part(bench)


if __name__ == "__main__":
    main()

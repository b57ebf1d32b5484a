"""What saving costs a training run: `python -m tests.bench.train [rate] [stall] [bytes] [start]`, else all of them.

- rate: steps a second without and with a checkpoint every 20 steps, by a bare torch loop of the same model, llmos and
  the transformers Trainer, alternating; ratios to the bare loop.
- stall: how long a step waits for a checkpoint of weights and AdamW state, beside a blocking torch.save, safetensors
  and torch.distributed.checkpoint, each with an fsync, and its async_save.
- bytes: what ten checkpoints of a run add to the store, beside ten files of torch.save; weights alone the same.
- start: a process to its first step, from nothing and from a checkpoint, beside a bare script that does so.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from llmos_cli.data.batches import TokenRows
from llmos_cli.data.make import Request, make_dataset
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.refs import ref_history
from llmos_cli.train.checkpoints.saver import Saved
from llmos_cli.train.config import Options
from llmos_cli.train.plan import Plan, make_plan
from llmos_cli.train.run import run
from tests.bench.measure import print_machine

SEQ, VOCAB, EVERY = 64, 512, 20
ROUNDS, STEPS, WARM = 5, 90, 9


@dataclass(frozen=True)
class Size:
    """Layers of width 64 a layer, and rows in a step."""

    depth: int
    batch: int


SMALL, LARGE = Size(2, 8), Size(6, 8)


def main(asked: list[str]) -> None:
    print_machine()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, rows of {SEQ} tokens")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, made_store(Path(folder)) as store:
        for name in asked or PARTS:
            PARTS[name](store, Path(folder))


@contextlib.contextmanager
def made_store(folder: Path) -> Iterator[Store]:
    text = folder / "text.txt"
    text.write_text("\n".join(f"{n} squared is {n * n}, and {n} halved is {n / 2}." for n in range(9000)))
    init_store(folder / ".llmos")
    with open_store(folder / ".llmos") as store:
        make_dataset(store, parse_ref("text"), Request((str(text),), f"train:{VOCAB}", SEQ, 1 << 22), progress=Silent())
        yield store


# ----------------------------------------------------------------------------------------------------------------- runs


class Clock(Silent):
    """When each step was done, and what processor time the process had used by then."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.used: list[float] = []

    def task(self, label: str, *, total: int | None = None, unit: str = "B") -> AbstractContextManager[Any]:
        return nullcontext(self) if label == "training" else super().task(label, total=total, unit=unit)

    def advance(self, amount: int = 1) -> None:
        self.times.append(time.perf_counter())
        self.used.append(time.process_time())

    def note(self, text: str) -> None:
        pass

    @property
    def rate(self) -> float:
        return (len(self.times) - WARM) / (self.times[-1] - self.times[WARM - 1])

    @property
    def work(self) -> float:
        """Processor seconds a step, of all threads."""
        return (self.used[-1] - self.used[WARM - 1]) / (len(self.used) - WARM)


def ours(
    store: Store, size: Size, *, every: int, steps: int = STEPS, saved: Callable[[Saved], None] = lambda _: None
) -> Clock:
    options = Options(steps=steps, batch=size.batch, depth=size.depth, warmup=10)
    plan = make_plan(store, "run", data="text", model=None, options=options, save_every=every, anew=True)
    clock = Clock()
    run(store, plan, progress=clock, saved=saved)
    with contextlib.suppress(OSError):
        shutil.rmtree(store.refs / "run")
    return clock


def model_of(size: Size) -> LlamaForCausalLM:
    """What `--depth` makes."""
    from llmos_cli.models.config import llama_config

    config = llama_config(size.depth, VOCAB, SEQ, bos=0, eos=0, pad=0)
    assert isinstance(config, LlamaConfig)
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)


def bare_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    optimizer.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB).float(), ids[:, 1:].reshape(-1))
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def batches_of(store: Store, size: Size) -> Callable[[int], torch.Tensor]:
    manifest = read_manifest(store, ref_history(store, parse_ref("text"))[0].id)
    ids = np.concatenate([batch.input_ids for batch in TokenRows(store, manifest).in_order(64)]).astype(np.int64)
    order = np.random.default_rng(0).permutation(len(ids))

    def batch(step: int) -> torch.Tensor:
        at = step * size.batch % (len(ids) - size.batch)
        return torch.from_numpy(ids[order[at : at + size.batch]])

    return batch


def bare(store: Store, size: Size, steps: int = STEPS) -> Clock:
    model, batch, clock = model_of(size), batches_of(store, size), Clock()
    optimizer = optimizer_of(model)
    model.train()
    for step in range(steps):
        bare_step(model, optimizer, batch(step))
        clock.advance()
    return clock


def trainer(store: Store, size: Size, folder: Path, *, every: int) -> Clock:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    batch, clock = batches_of(store, size), Clock()
    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in batch(step)]

    told = type("Told", (TrainerCallback,), {"on_step_end": lambda *_, **__: clock.advance()})

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=size.batch,
        max_steps=STEPS,
        learning_rate=1e-3,
        save_strategy="steps" if every <= STEPS else "no",
        save_steps=every,
        optim="adamw_torch_fused",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(model=model_of(size), args=arguments, train_dataset=rows, callbacks=[told()]).train()
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    return clock


# ------------------------------------------------------------------------------------------------------------ questions


def rate(store: Store, folder: Path) -> None:
    never = STEPS + 1
    ways: dict[str, Callable[[], Clock]] = {
        "bare torch": lambda: bare(store, SMALL),
        "llmos": lambda: ours(store, SMALL, every=never),
        f"llmos, saving every {EVERY}": lambda: ours(store, SMALL, every=EVERY),
        "Trainer": lambda: trainer(store, SMALL, folder, every=never),
        f"Trainer, saving every {EVERY}": lambda: trainer(store, SMALL, folder, every=EVERY),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    works: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            clock = way()
            rates[name].append(clock.rate)
            works[name].append(clock.work)
    print(f"\nrate: depth {SMALL.depth}, {SMALL.batch} rows a step, {ROUNDS} rounds of {STEPS} steps")
    for name, found in rates.items():
        ratio = statistics.median(one / other for one, other in zip(found, rates["bare torch"], strict=True))
        work = statistics.median(one / other for one, other in zip(works[name], works["bare torch"], strict=True))
        print(f"  {name:26} {statistics.median(found):7.1f} steps/s  {ratio:.3f}   processor time {work:.3f}")


def stall(store: Store, folder: Path) -> None:
    events: list[Saved] = []
    ours(store, LARGE, every=4, steps=33, saved=events.append)
    waits = [event.stalled for event in events if event.step < 33][1:]  # the first has no memory to copy into yet
    model = model_of(LARGE)
    optimizer = optimizer_of(model)
    bare_step(model, optimizer, batches_of(store, LARGE)(0))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    tensors = state_tensors(model, optimizer)
    total = sum(tensor.nbytes for tensor in tensors.values())
    ways = blocking(folder, state, tensors)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            found[name].append(way())
    yardstick = statistics.median(found["torch.save"])
    print(f"\nstall: {total / 1e6:.0f} MB of weights and state, {len(waits)} checkpoints")
    print(f"  {'llmos':18} {1000 * statistics.median(waits):7.1f} ms  {statistics.median(waits) / yardstick:.3f}")
    for name, times in found.items():
        print(f"  {name:18} {1000 * statistics.median(times):7.1f} ms  {statistics.median(times) / yardstick:.3f}")


def state_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for number, held in enumerate(optimizer.state.values()):
        tensors |= {f"{key}.{number}": value for key, value in held.items()}
    return tensors


def blocking(folder: Path, state: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Callable[[], float]]:
    """Seconds for which each of the others would hold up training."""
    import torch.distributed
    import torch.distributed.checkpoint
    from safetensors.torch import save_file

    dcp, distributed = vars(torch.distributed.checkpoint), vars(torch.distributed)

    target = folder / "peer"

    def timed(write: Callable[[], object]) -> float:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        began = time.perf_counter()
        write()
        for path in target.rglob("*"):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        return time.perf_counter() - began

    def async_save() -> float:
        shutil.rmtree(target, ignore_errors=True)
        began = time.perf_counter()
        future = dcp["async_save"](tensors, checkpoint_id=str(target))
        stalled = time.perf_counter() - began
        future.result()
        return stalled

    ways: dict[str, Callable[[], float]] = {
        "torch.save": lambda: timed(lambda: torch.save(state, target / "state.pt")),
        "safetensors": lambda: timed(lambda: save_file(tensors, target / "state.safetensors")),
        "dcp.save": lambda: timed(lambda: dcp["save"](tensors, checkpoint_id=str(target))),
    }
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=distributed["HashStore"](), rank=0, world_size=1)
    ways["dcp.async_save"] = async_save
    return ways


def kept_bytes(store: Store, folder: Path) -> None:
    begun = Options(steps=200, batch=SMALL.batch, depth=4, warmup=10)
    measure_bytes(store, "from nothing at 1e-3", make_plan(store, "ten", data="text", model=None, options=begun))
    tuned = Options(steps=200, batch=SMALL.batch)
    measure_bytes(store, "from that at 5e-5", make_plan(store, "tuned", data="text", model="ten", options=tuned))


def measure_bytes(store: Store, what: str, plan: Plan) -> None:
    before = disk_bytes(store)
    run(store, plan, progress=Silent())
    grew = disk_bytes(store) - before
    manifests = [read_manifest(store, move.id) for move in ref_history(store, plan.checkpoint_ref)]
    plain = sum(manifest.size for manifest in manifests)
    weights = {
        chunk.id: chunk.size for m in manifests for e in m.files if e.path == "model.safetensors" for chunk in e.chunks
    }
    stored = sum(min(copy.entry.stored_size for copy in store.index.locate(oid)) for oid in weights)
    print(f"\nbytes, {what}: {len(manifests)} checkpoints; {plain / 1e6:.0f} MB as files of torch.save")
    print(f"  weights and state  {grew / 1e6:7.1f} MB  {grew / plain:.3f}")
    print(f"  weights alone      {stored / 1e6:7.1f} MB  {stored / sum(weights.values()):.3f}")


def disk_bytes(store: Store) -> int:
    return sum(path.stat().st_size for path in store.packs.rglob("*.pack"))


BARE = """
import sys, json, os
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
rows, config, state = sys.argv[1:4]
torch.use_deterministic_algorithms(True)
ids = torch.from_numpy(np.load(rows))
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**json.loads(config)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
if state:
    held = torch.load(state)
    model.load_state_dict(held["model"]); optimizer.load_state_dict(held["optimizer"])
logits = model(input_ids=ids, use_cache=False).logits
torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
os._exit(0)  # what comes after the step does not count
"""


def start(store: Store, folder: Path) -> None:
    """Whole processes that take one step; those of llmos also commit it."""
    model = model_of(LARGE)
    optimizer, batch = optimizer_of(model), batches_of(store, LARGE)(0)
    bare_step(model, optimizer, batch)
    np.save(folder / "rows.npy", batch.numpy())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "held.pt")
    script = [sys.executable, "-c", BARE, str(folder / "rows.npy"), json.dumps(model.config.to_dict(), default=str)]
    print("\nstart: a process to the end of its first step, in seconds")
    words = ["--data", "text", "--depth", str(LARGE.depth), "--batch", str(LARGE.batch)]
    for name, state, more in (
        ("from nothing", "", []),
        ("from a checkpoint", str(folder / "held.pt"), ["--resume"]),
    ):
        times: dict[str, list[float]] = {"bare": [], "llmos": []}
        for number in range(3):
            times["bare"].append(seconds([*script, state]))
            times["llmos"].append(first_step(store, [f"start{number if not more else 0}", *words, *more]))
        ratio = statistics.median(a / b for a, b in zip(times["llmos"], times["bare"], strict=True))
        shown = ", ".join(f"{way} {statistics.median(found):.2f}" for way, found in times.items())
        print(f"  {name:18} {shown}  {ratio:.2f}")


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step(store: Store, words: list[str]) -> float:
    """Seconds until a step of this process is in the log; then it is asked to stop, and commits."""
    folder = store.root / "logs" / "train"

    def logged() -> tuple[int, int]:
        """When it was written last, and how much it holds."""
        found = [path.stat() for path in folder.glob(f"{words[0]}-*.jsonl")]
        return max((status.st_mtime_ns for status in found), default=0), sum(status.st_size for status in found)

    before = logged()
    began = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "llmos_cli",
        "--store",
        str(store.root),
        "-q",
        "train",
        *words,
        "--steps",
        "100000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while logged()[0] == before[0] or not logged()[1]:
        if process.poll() is not None:
            raise SystemExit(f"it ended before: {process.communicate()[1].decode()}")
        time.sleep(0.001)
    took = time.perf_counter() - began
    process.terminate()
    process.wait()
    return took


PARTS: dict[str, Callable[[Store, Path], None]] = {"rate": rate, "stall": stall, "bytes": kept_bytes, "start": start}

if __name__ == "__main__":
    main(sys.argv[1:])

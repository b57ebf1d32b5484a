"""What quantizing costs: in quality, in time, in memory.

python -m tests.bench.quantize [DIR] [--only quality,time,memory] [--text PATH...] [--steps N] [--rounds N] [--gb N]

quality   A Llama of 4 layers learns the modules of the Python standard library (or --text) with `llmos train`; every
          form of it is scored on documents that were set aside. The peer is llama.cpp: the same weights through ggml's
          own quantizers and back. What is not in a block (embedding and head, tied) has 8 bits on both sides.
time      `llmos quantize` of the model that tests.bench.store adds, store to store, beside ggml's quantizers on as many
          threads as there are cores, from the safetensors file to a file on the disk.
memory    The peak of resident memory for a model of --gb gigabytes of wide layers.

DIR keeps the trained model and the big ones for the next time. Peers that are not installed are left out and said.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmos_cli.formats.safetensors import encode_header
from tests.bench import ggml
from tests.bench.measure import Cost, goal, in_child, make_models, print_machine, report_costs, spend

VOCABULARY, CONTEXT, ROWS = 2048, 128, "64"
FORMS: Final = {
    "int8": ("--scheme", "int8"),
    **{f"w8a8 {method}": ("--scheme", "w8a8", "--method", method) for method in ("rtn", "smooth")},
    "fp8": ("--scheme", "fp8"),
    **{
        f"int4 {method}": ("--scheme", "int4", "--method", method) for method in ("rtn", "search", "hqq", "awq", "gptq")
    },
    **{f"int4 gptq, group {group}": ("--scheme", "int4", "--group", group) for group in ("64", "128")},
}
PEERS: Final = ("Q8_0", "Q4_0", "Q4_1", "Q4_K")
TIMED: Final = {"int8": ("int8", "Q8_0"), "int4 rtn": ("int4", "Q4_0"), "int4 search": ("int4", "Q4_K")}
WIDE: Final = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


@dataclass(frozen=True)
class Scored:
    perplexity: float
    bits: float


def llmos(store: Path, *arguments: str) -> dict[str, Any]:
    """What a command says as JSON, in this process: torch is not loaded anew for each."""
    from llmos_cli.app import main as run

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(sys.stderr):
        code = run(["--store", str(store), *arguments, "--json"])
    if code:
        raise SystemExit(f"failed with {code}: {' '.join(arguments)}")
    answer: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
    return answer


def trained(folder: Path, text: Sequence[str], steps: int) -> Path:
    """A store that holds the dataset `text` and the model `small`."""
    store = folder / ".llmos"
    if not store.exists():
        llmos(store, "init", str(store.parent))
        library = Path(os.__file__).parent
        paths = list(text) or sorted(map(str, library.glob("*.py")))
        shape = ("--tokenizer", f"train:{VOCABULARY}", "--seq-len", str(CONTEXT), "--split", "valid=0.06")
        llmos(store, "shard", *paths, "text", *shape)
        size = ("--depth", "4", "--steps", str(steps), "--batch", "8", "--lr", "0.002")
        llmos(store, "train", "small", "--data", "text", *size)
    return store


def score(store: Path, model: str) -> float:
    return float(llmos(store, "eval", model, "--data", "text", "--split", "valid", "--max-rows", ROWS)["perplexity"])


def peer(store: Path, lib: Any, kind: str) -> Scored:
    """The model as llama.cpp rounds it: blocks as `kind`, embedding and head as Q8_0, put back into the store."""
    import torch
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        llmos(store, "export", "small", "--to", folder)
        path = Path(folder, "model.safetensors")
        state, bits, count = load_file(path), 0.0, 0
        for name, tensor in state.items():
            if tensor.ndim == 2:
                used = kind if ".layers." in name else "Q8_0"
                weight = np.ascontiguousarray(tensor.float().numpy())
                bits += 8 * ggml.quantize(lib, weight, used).nbytes
                state[name] = torch.from_numpy(ggml.rounded(lib, weight, used).copy())
            else:
                bits += 32 * tensor.numel()
            count += tensor.numel()
        save_file(state, path, {"format": "pt"})
        llmos(store, "add", folder, f"peer:{kind.lower()}")
    return Scored(score(store, f"peer:{kind.lower()}"), bits / count)


def quality(folder: Path, text: Sequence[str], steps: int) -> None:
    store = trained(folder, text, steps)
    plain = score(store, "small")
    found: dict[str, Scored] = {}
    for name, options in FORMS.items():
        ref = "small:" + name.replace(" ", "-").replace(",", "")
        made = llmos(store, "quantize", "small", ref, *options, "--data", "text", "--max-rows", "1")
        found[name] = Scored(score(store, ref), made["bits_per_weight"])
        print(f"{name}: {found[name].perplexity:.4f}", file=sys.stderr, flush=True)
    lib = ggml.library()
    if lib is not None:
        found |= {f"llama.cpp {kind}": peer(store, lib, kind) for kind in PEERS}
    print(
        f"\nperplexity on the documents set aside; the model's own is {plain:.4f}\n{'':24}{'bits':>8}{'perplexity':>12}"
    )
    for name, scored in found.items():
        print(f"{name:24}{scored.bits:8.3f}{scored.perplexity:12.4f}  {100 * (scored.perplexity / plain - 1):+.3f} %")
    more = {name: 100 * (scored.perplexity / plain - 1) for name, scored in found.items()}
    goal("int8", more["int8"], 0.1, " %")
    goal("w8a8, the default", more["w8a8 smooth"], 0.5, " %")
    goal("int4, the default", more["int4 gptq"], 2.0, " %")
    goal("int4, the default: loss as a share of RTN's", more["int4 gptq"] / more["int4 rtn"], 0.9)
    if lib is not None:
        goal("int4, the default: loss as a share of Q4_0's", more["int4 gptq"] / more["llama.cpp Q4_0"], 1.0)
        goal("int4: bits as a share of Q4_0's", found["int4 gptq"].bits / found["llama.cpp Q4_0"].bits, 1.0)


def linked(store: Path, folder: Path) -> Path:
    """A copy of a store that shares its packs, which never change."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".pack") else shutil.copy2)(source, target)

    shutil.copytree(store, folder, copy_function=copy)
    return folder


def quantize_file(lib: Any, path: Path, kind: str, target: Path) -> None:
    """What llama.cpp's quantizer does: every matrix of a file through ggml on all cores, and onto the disk."""
    from safetensors import safe_open

    cores = len(os.sched_getaffinity(0))
    with safe_open(path, "pt") as file, target.open("wb") as out, ThreadPoolExecutor(cores) as pool:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            if tensor.ndim != 2:
                out.write(tensor.float().numpy().data)
                continue
            used = kind if ".layers." in name else "Q8_0"
            for made in pool.map(partial(_blocks, lib, used), tensor.chunk(8 * cores)):
                out.write(made.data)
        out.flush()
        os.fsync(out.fileno())


def _blocks(lib: Any, kind: str, part: Any) -> "np.ndarray[Any, Any]":
    return ggml.quantize(lib, part.float().numpy(), kind)


def times(folder: Path, rounds: int) -> None:
    make_models(folder / "models-0.7", 0.7)
    base = folder / "models-0.7/base"
    lib = ggml.library()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = Path(place, "one/.llmos")
        llmos(store, "init", str(store.parent))
        llmos(store, "add", str(base), "base")
        taken: dict[str, list[Cost]] = {}
        for _ in range(rounds):
            for name, (scheme, kind) in TIMED.items():
                ours = linked(store, Path(place, "copy"))
                method = ("--method", name.split()[1]) if scheme == "int4" else ()
                command = ("--store", str(ours), "quantize", "base", "small", "--scheme", scheme, *method)
                taken.setdefault(f"llmos {name}", []).append(spend([sys.executable, "-m", "llmos_cli", *command]))
                shutil.rmtree(ours)
                if lib is not None:
                    taken.setdefault(f"ggml {kind}", []).append(
                        _cost(lambda kind=kind: quantize_file(lib, base / "model.safetensors", kind, Path(place, "q")))
                    )
    yardstick = "ggml Q8_0" if lib is not None else "llmos int8"
    report_costs(f"{(base / 'model.safetensors').stat().st_size / 1e6:.0f} MB of bf16", taken, yardstick, {})
    if lib is not None:
        for name, (_, kind) in TIMED.items():
            ours, theirs = (statistics.median(c.wall for c in taken[who]) for who in (f"llmos {name}", f"ggml {kind}"))
            goal(f"{name} to ggml's {kind}", ours / theirs, 1.5 if kind == "Q8_0" else 2.0)


def _cost(run: Callable[[], None]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def write_wide(folder: Path, gigabytes: float) -> None:
    """A Llama of wide layers whose weights are noise, written a stretch at a time."""
    from transformers import LlamaConfig

    from tests.bench.models import shapes

    def config(layers: int) -> LlamaConfig:
        return LlamaConfig(**WIDE, num_hidden_layers=layers, vocab_size=128256, max_position_embeddings=2048)

    nothing, one = (sum(map(_count, shapes(config(layers)).values())) for layers in (0, 1))
    layers = max(1, round((gigabytes * 1e9 / 2 - nothing) / (one - nothing)))
    tensors = shapes(config(layers))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config(layers).to_json_string())
    noise = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header([(name, "BF16", shape) for name, shape in tensors.items()], {"format": "pt"}))
        for shape in tensors.values():
            for part in _parts(_count(shape)):
                values = noise.standard_normal(part, np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).data)


def _count(shape: Sequence[int]) -> int:
    return int(np.prod(shape))


def _parts(count: int, most: int = 1 << 24) -> Iterator[int]:
    yield from (min(most, count - at) for at in range(0, count, most))


def memory(folder: Path, gigabytes: float) -> None:
    wide = folder / f"wide-{gigabytes:g}"
    if not wide.exists():
        write_wide(wide, gigabytes)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = Path(place, ".llmos")
        llmos(store, "init", place)
        llmos(store, "add", str(wide), "base", "--adopt")
        print(f"\n{(wide / 'model.safetensors').stat().st_size / 1e9:.1f} GB of bf16, no layer alike")
        for name, options in {"int8": FORMS["int8"], "int4 search": FORMS["int4 search"]}.items():
            command = ("--store", str(store), "quantize", "base", f"small:{name.replace(' ', '-')}", *options)
            cost = spend([sys.executable, "-m", "llmos_cli", *command])
            print(f"{name:24}{cost.wall:9.1f}s, {cost.cpu:.1f}s of processor")
            goal(f"{name}: peak RSS", cost.memory / 1e9, 1.0, " GB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", type=Path, nargs="?", default=Path(tempfile.gettempdir(), "bench"))
    parser.add_argument("--only", default="quality,time,memory")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gb", type=float, default=8.0)
    options = parser.parse_args()
    wanted = options.only.split(",")
    print_machine()
    options.dir.mkdir(parents=True, exist_ok=True)
    if "quality" in wanted:
        in_child(quality, options.dir / "quality", options.text, options.steps)
    if "time" in wanted:
        times(options.dir, options.rounds)
    if "memory" in wanted:
        memory(options.dir, options.gb)


if __name__ == "__main__":
    main()

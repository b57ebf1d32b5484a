"""How small and how fast are deltas between the checkpoints of a real training run, against XOR and plain planes?

python -m tests.bench.delta [--steps 300]

A small transformer learns the Python standard library's source, byte by byte; then it goes on at 5e-5, a usual rate of
fine-tuning, and checkpoints are taken 60, 120 and 240 steps apart. Chunks are cut as the store cuts them: at most
4 MiB, no two tensors in one. Speeds are of CPU time, the best of several, on one thread.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import zstandard
from torch import nn
from torch.nn import functional

from llmos_cli.formats import codec, limits, native
from llmos_cli.formats.codec import DELTA, Words
from tests.bench.measure import print_machine

MARKS = (0, 60, 180, 420)
HIDDEN, LAYERS, HEADS, CONTEXT, BATCH = 256, 4, 4, 64, 4
State = dict[str, torch.Tensor]
Chunk = tuple[bytes, bytes]  # a chunk and its base


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.bytes(x) + self.places.weight)))


def train(steps: int) -> Iterator[State]:
    """The weights at every mark after `steps` steps."""
    torch.manual_seed(0)
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    started = time.perf_counter()
    for step in range(steps + MARKS[-1] + 1):
        if step - steps in MARKS:
            yield {name: value.detach().clone() for name, value in model.state_dict().items()}
        starts = torch.randint(0, len(data) - CONTEXT - 1, (BATCH,)).tolist()
        rows = torch.stack([data[start : start + CONTEXT + 1] for start in starts])
        loss = functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 20) if step < steps else 5e-5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parameters = sum(value.numel() for value in model.parameters())
    seconds = time.perf_counter() - started
    print(f"{parameters:,} parameters, loss {loss.item():.2f} after {step} steps, {seconds:.0f} s of training")


def data_of(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    return tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def chunks(new: State, old: State, dtype: torch.dtype) -> list[Chunk]:
    size, found = limits.CHUNK_BYTES, []
    for name in new:
        after, before = data_of(new[name], dtype), data_of(old[name], dtype)
        found += [(after[at : at + size], before[at : at + size]) for at in range(0, len(after), size)]
    return found


def xor(chunk: Chunk) -> bytes:
    after, before = (np.frombuffer(data, np.uint8) for data in chunk)
    return (after ^ before).tobytes()


def sizes(pairs: list[Chunk], width: int) -> dict[str, float]:
    """Bytes by method, as a ratio to the plain bytes. A chunk is never larger than raw."""
    floats, integers = Words(width, True), Words(width)
    level3 = zstandard.ZstdCompressor(level=3)
    methods: dict[str, Callable[[Chunk], int]] = {
        "planes": lambda chunk: codec.encode(memoryview(chunk[0]), floats).size,
        "XOR + zstd-3": lambda chunk: len(level3.compress(xor(chunk))),
        "XOR + planes": lambda chunk: codec.encode(memoryview(xor(chunk)), floats).size,
        "delta, not grouped": lambda chunk: codec.encode_delta(memoryview(chunk[0]), chunk[1], integers).size,
        "delta": lambda chunk: codec.encode_delta(memoryview(chunk[0]), chunk[1], floats).size,
    }
    plain = sum(len(after) for after, _ in pairs)
    return {name: sum(min(method(chunk), len(chunk[0])) for chunk in pairs) / plain for name, method in methods.items()}


def conditional_entropy(pairs: list[Chunk]) -> float:
    """Of 16-bit words by their group: what a coder with a table for every group and chunk comes close to."""
    bits = 0.0
    for after, before in pairs:
        new, old = np.frombuffer(after, np.uint16), np.frombuffer(before, np.uint16)
        change, key = new - old, (old >> 7) & 0xFF
        for group in np.unique(key):
            _, counts = np.unique(change[key == group], return_counts=True)
            bits += float((counts * np.log2(counts.sum() / counts)).sum())
    return bits / 8 / sum(len(after) for after, _ in pairs)


def best(run: Callable[[], object], size: int, rounds: int = 15) -> float:
    """GB/s."""
    taken = []
    for _ in range(rounds):
        started = time.thread_time()
        run()
        taken.append(time.thread_time() - started)
    return size / min(taken) / 1e9


def speeds(pairs: list[Chunk], width: int) -> dict[str, float]:
    """Of one full chunk."""
    size, words = limits.CHUNK_BYTES, Words(width, True)
    plain, base = (memoryview((b"".join(parts) * 2)[:size]) for parts in zip(*pairs, strict=True))
    room, out = memoryview(bytearray(size)), memoryview(bytearray(size))
    found = {}
    for name, make, given in (
        ("planes", lambda: codec.encode(plain, words, room), None),
        ("delta", lambda: codec.encode_delta(plain, base, words, room), base),
    ):
        encoded = make()
        payload = memoryview(b"".join(map(bytes, encoded.parts)))
        found[f"{name}: encode"] = best(make, size)
        found[f"{name}: decode"] = best(
            lambda encoded=encoded, payload=payload, given=given: codec.decode(
                encoded.codec, width, True, payload, out, given
            ),
            size,
        )
        assert (encoded.codec == DELTA) == (given is not None)
        assert out == plain
    views, _ = native.subtract(plain, base, width, True, room)
    found["grouping alone: there"] = best(lambda: native.subtract(plain, base, width, True, room), size)
    views = [memoryview(bytes(view)) for view in views]
    found["grouping alone: back"] = best(lambda: native.add(views, base, True, out), size)
    kernels, native._ready._kernels[width] = native._ready._kernels[width], None
    found["grouping in numpy: there"] = best(lambda: native.subtract(plain, base, width, True, room), size, 3)
    found["grouping in numpy: back"] = best(lambda: native.add(views, base, True, out), size, 3)
    native._ready._kernels[width] = kernels
    found["memory copy"] = best(lambda: out.__setitem__(slice(None), plain), size)
    return found


def table(title: str, columns: dict[str, dict[str, float]], digits: int) -> None:
    print(f"\n{title}\n{'':26}" + "".join(f"{name:>11}" for name in columns))
    for row in next(iter(columns.values())):
        print(f"{row:26}" + "".join(f"{column[row]:11.{digits}f}" for column in columns.values()))


def load_seconds() -> str:
    script = """
import time, numpy
from llmos_cli.formats import codec, native
started = time.process_time(); native.find_kernels(2); loaded = time.process_time()
import numba; print(f"{loaded - started:.2f} s; of importing numba: {time.process_time() - loaded:.2f} s")
"""
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300, help="before the first checkpoint")
    options = parser.parse_args()
    print_machine()
    for width in (2, 4):
        native._ready._kernels[width] = native.find_kernels(width)
        native._ready._final.add(width)
    states = list(train(options.steps))
    apart = [f"{after - before} steps" for before, after in itertools.pairwise(MARKS)]
    measured: dict[str, dict[str, float]] = {}
    for width, dtype, title in ((2, torch.bfloat16, "bf16"), (4, torch.float32, "fp32")):
        cut = [chunks(new, old, dtype) for old, new in itertools.pairwise(states)]
        columns = {name: sizes(pairs, width) for name, pairs in zip(apart, cut, strict=True)}
        if width == 2:
            for name, pairs in zip(apart, cut, strict=True):
                columns[name]["conditional entropy"] = conditional_entropy(pairs)
        columns["mean"] = {
            row: float(np.mean([column[row] for column in columns.values()])) for row in columns[apart[0]]
        }
        table(f"{title}: stored size as a ratio", columns, 3)
        measured[title] = speeds(cut[0], width)
    table("one core, 4 MiB chunks, 60 steps apart: GB/s", measured, 2)
    print(f"\nCPU time of loading kernels that are kept: {load_seconds()}")


if __name__ == "__main__":
    main()

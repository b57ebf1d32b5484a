"""The reference that deltas are measured against, as a program: XOR with the base, then zstd -3, on every core.

python -m tests.bench.xor OUT NEW [--base FOLDER] [--planes]

Of the safetensors files of a folder; without a base zstd -3 alone. With --planes words of 16 bits are first split as
ZipLLM's BitX splits them, the exponent from the rest. Writes 4 MiB blocks one after the other and flushes them to the
disk: a fair contender for time.
"""

import argparse
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zstandard

BLOCK = 4 << 20
_own = threading.local()


def packed(new: Path, base: Path | None, start: int, planes: bool) -> list[bytes]:
    data = _read(new, start)
    if base is not None:
        old = _read(base, start)
        common = min(len(data), len(old))
        data[:common] ^= old[:common]
    if not planes:
        return [_compress(data)]
    even = len(data) // 2 * 2
    turned = data[:even].view(np.uint16)
    turned = (turned << np.uint16(1)) | (turned >> np.uint16(15))
    return [
        _compress((turned >> np.uint16(8)).astype(np.uint8)),
        _compress(turned.astype(np.uint8)),
        data[even:].tobytes(),
    ]


def _read(path: Path, start: int) -> np.ndarray:
    with path.open("rb", buffering=0) as file:
        data = np.empty(max(0, min(BLOCK, path.stat().st_size - start)), np.uint8)
        read = os.preadv(file.fileno(), [data], start) if len(data) else 0
    if read != len(data):
        raise SystemExit(f"{path} was read short")
    return data


def _compress(data: np.ndarray) -> bytes:
    if not hasattr(_own, "zstd"):
        _own.zstd = zstandard.ZstdCompressor(level=3)
    return min(_own.zstd.compress(data), data.tobytes(), key=len)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--planes", action="store_true")
    options = parser.parse_args()
    files = sorted(options.new.rglob("*.safetensors"))
    blocks = [(path, start) for path in files for start in range(0, path.stat().st_size, BLOCK)]

    def pack(block: tuple[Path, int]) -> list[bytes]:
        path, start = block
        base = options.base / path.relative_to(options.new) if options.base else None
        return packed(path, base, start, options.planes)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, options.out.open("wb") as file:
        for parts in pool.map(pack, blocks):
            file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()

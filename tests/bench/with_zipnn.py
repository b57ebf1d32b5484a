"""A folder's safetensors files through ZipNN, as a program of its own virtual environment: imports nothing of ours.

python with_zipnn.py OUT NEW DTYPE [BASE]

With a base folder their XOR is compressed, as ZipNN's delta compression does.
"""

import os
import sys
from pathlib import Path

import numpy as np
from zipnn import ZipNN


def main() -> None:
    out, new, dtype, *base = sys.argv[1:]
    with open(out, "wb") as file:
        for path in sorted(Path(new).rglob("*.safetensors")):
            data = np.fromfile(path, np.uint8)
            if base:
                old = np.fromfile(Path(base[0]) / path.relative_to(new), np.uint8)
                common = min(len(data), len(old))
                data[:common] ^= old[:common]
            file.write(ZipNN(bytearray_dtype=dtype).compress(data.tobytes()))
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()

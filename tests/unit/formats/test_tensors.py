"""Which reader a file gets: by its name and its first bytes."""

import io

import numpy as np
import pytest

from llmos_cli.errors import Damaged, Unsafe
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.formats.tensors import TensorInfo, find_tensors


def find(name: str, data: bytes) -> tuple[TensorInfo, ...] | None:
    return find_tensors(name, lambda start, end: data[start:end], len(data), f"/there/{name}")


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


def gguf() -> bytes:
    return b"GGUF" + (3).to_bytes(4, "little") + bytes(16)


def test_the_name_and_the_first_bytes_decide() -> None:
    safetensors = encode_header([("a", "U8", (2,))], {}) + b"xy"
    assert [tensor.name for tensor in find("m.safetensors", safetensors) or ()] == ["a"]
    assert [tensor.name for tensor in find("deep/m.npy", npy()) or ()] == ["array"]
    assert [tensor.name for tensor in find("m.npz", npz()) or ()] == ["a"]
    assert find("m.gguf", gguf()) == ()
    for data in (safetensors, npy(), npz(), gguf(), b"", b"text"):
        for name in ("f", "f.txt", "npy", "f.npy.gz", "safetensors", "m.pt", "m.bin", "pytorch_model.ckpt", "m.pth"):
            assert find(name, data) is None
    for name, data in (
        ("m.gguf", npy()),
        ("m.npy", npz()),
        ("m.npz", npy()),
        ("m.npy", b""),
        ("m.gguf", b"version https"),
    ):
        assert find(name, data) is None


def test_only_the_strict_formats_refuse_a_broken_file() -> None:
    with pytest.raises(Damaged, match=r"/there/m\.safetensors"):
        find("m.safetensors", b"")
    with pytest.raises(Unsafe, match=r"/there/m\.gguf") as caught:
        find("m.gguf", gguf()[:20])
    assert caught.value.exit_code == 14
    assert caught.value.hint
    for name in ("m.pt", "m.npz", "m.npy"):
        assert find(name, npz()[:150]) is None


def test_the_readers_of_archives_are_not_loaded_for_other_files() -> None:
    def read(start: int, end: int) -> bytes:
        raise AssertionError("only a file with a fitting name is read")

    assert find_tensors("corpus.jsonl", read, 1 << 40, "x") is None

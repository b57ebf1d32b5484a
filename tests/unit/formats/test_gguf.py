"""GGUF files from anybody: agreement with the library that writes them, and case by case what is refused."""

import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import Damaged, Unsafe
from llmos_cli.formats import limits
from llmos_cli.formats.codec import Words
from llmos_cli.formats.gguf import TYPES, read_table
from llmos_cli.formats.safetensors import TensorInfo


def table(data: bytes) -> tuple[TensorInfo, ...] | None:
    return read_table(lambda start, end: data[start:end], len(data), "f.gguf")


def text(value: str | bytes, *, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def u32(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def strings(key: str, values: list[str], *, count: int | None = None) -> bytes:
    head = struct.pack("<IIQ", 9, 8, len(values) if count is None else count)
    return text(key) + head + b"".join(text(value) for value in values)


def entry(name: str, shape: list[int], kind: int = 0, offset: int = 0, *, rank: int | None = None) -> bytes:
    head = text(name) + struct.pack("<I", len(shape) if rank is None else rank)
    return head + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


def file(
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    alignment: int = 32,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


ONE = [entry("a", [8])]
GOOD = file(
    [u32("general.quantization_version", 2), strings("tokenizer.ggml.tokens", ["<s>", "a", "bc"])],
    [entry("embed", [4, 2]), entry("blk.0.w", [32, 3], 2, 32)],
    bytes(range(32)) + bytes(54),
)


@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_a_file_of_the_library_is_read_as_the_library_reads_it(tmp_path: Path, alignment: int) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "f.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_token_list([f"token {number}" for number in range(3000)])
    writer.add_array("scores", [0.5] * 3000)
    writer.add_bool("flag", True)
    rows = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    writer.add_tensor("norm", rows[0, :7])
    writer.add_tensor("half", rows.astype(np.float16))
    writer.add_tensor("wide", rows.astype(np.float64))
    writer.add_tensor("ids", np.arange(5, dtype=np.int8))
    for name in ("Q8_0", "Q4_0", "Q5_1", "BF16", "TQ2_0", "MXFP4"):
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(f"blk.{name}", gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    found = table(data)
    assert found is not None
    library = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {tensor.name for tensor in found} == set(library)
    for tensor in found:
        other = library[tensor.name]
        assert tensor.dtype == other.tensor_type.name
        assert tensor.shape == tuple(reversed(other.shape.tolist()))
        assert data[tensor.start : tensor.end] == other.data.tobytes()
    assert list(found) == sorted(found, key=lambda tensor: tensor.start)


def test_the_sizes_of_all_types_are_those_of_the_library() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    both = theirs.keys() & TYPES.keys()
    assert len(both) > 30
    assert {number: theirs[number] for number in both} == {number: TYPES[number] for number in both}


def test_a_codec_is_told_how_to_read_each_type() -> None:
    words = {dtype: TensorInfo("t", dtype, (), 0, 0).words for dtype, _, _ in TYPES.values()}
    assert (words["BF16"], words["F32"], words["I64"]) == (Words(2, True), Words(4, True), Words(8))
    assert {words[dtype] for dtype in words if "Q" in dtype or dtype == "MXFP4"} == {Words(1)}


def test_shapes_are_numpys_and_padding_is_no_tensor() -> None:
    found = table(GOOD)
    assert found is not None
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in found] == [
        ("embed", "F32", (2, 4)),
        ("blk.0.w", "Q4_0", (3, 32)),
    ]
    assert GOOD[found[0].start : found[0].end] == bytes(range(32))
    assert found[1].end - found[1].start == 3 * 18
    assert table(GOOD + bytes(10)) == found  # padding at the end


def test_other_versions_and_other_files_are_none_of_its_business() -> None:
    assert table(file([], [], version=2)) == ()
    for data in (b"", b"GGUF", b"GGUF\3\0\0", b"GGML" + bytes(20), file([], [], version=1), file([], [], version=4)):
        assert table(data) is None


def test_a_type_that_is_newer_reaches_to_the_next_tensor() -> None:
    found = table(file([], [entry("new", [7, 7], 137), entry("b", [8], 0, 64), entry("last", [3], 99, 96)], bytes(150)))
    assert found is not None
    assert [(tensor.dtype, tensor.end - tensor.start) for tensor in found] == [
        ("GGML_137", 64),
        ("F32", 32),
        ("GGML_99", 54),
    ]


def test_an_empty_tensor_and_a_scalar() -> None:
    found = table(file([], [entry("none", [4, 0]), entry("one", []), entry("end", [0], 0, 32)], bytes(32)))
    assert found is not None
    assert [(tensor.name, tensor.end - tensor.start) for tensor in found] == [("none", 0), ("one", 4), ("end", 0)]


BAD = {
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "n_kv 2^60": file([], [], counts=(0, 1 << 60)),
    "n_tensors 2^63": file([], [], counts=(1 << 63, 0)),
    "n_tensors 2^64 - 1": file([], ONE, bytes(32), counts=(2**64 - 1, 0)),
    "one key more than there are": file([u32("a", 1)], [], counts=(0, 2)),
    "one tensor more than there are": file([], ONE, counts=(2, 0)),
    "key of 2^63 bytes": file([text("a", length=1 << 63)], [], counts=(0, 1)),
    "key longer than the file": file([text("a", length=1000) + bytes(40)], [], counts=(0, 1)),
    "string of 2^63 bytes": file([text("a") + struct.pack("<I", 8) + text("x", length=1 << 63)], [], bytes(40)),
    "array of 2^61 int64": file([text("a") + struct.pack("<IIQ", 9, 11, 1 << 61)], [], bytes(40)),
    "array of 2^60 strings": file([strings("a", [], count=1 << 60)], [], bytes(40)),
    "array of unknown things": file([text("a") + struct.pack("<IIQ", 9, 13, 1)], [], bytes(40)),
    "arrays in arrays in arrays": file(
        [text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9], [], bytes(99)
    ),
    "unknown type of a value": file([text("a") + struct.pack("<I", 13)], [], bytes(40)),
    "key is no UTF-8": file([text(b"\xff") + struct.pack("<II", 4, 1)], []),
    "duplicate keys": file([u32("a", 1), u32("a", 1)], []),
    "alignment 0": file([u32("general.alignment", 0)], ONE, bytes(32)),
    "alignment 3": file([u32("general.alignment", 3)], ONE, bytes(32)),
    "alignment is an int64": file([text("general.alignment") + struct.pack("<IQ", 10, 32)], ONE, bytes(32)),
    "alignment is a text": file([text("general.alignment") + struct.pack("<I", 8) + text("32")], ONE, bytes(32)),
    "duplicate tensors": file([], [entry("a", [8]), entry("a", [8], 0, 32)], bytes(64)),
    "overlap": file([], [entry("a", [16]), entry("b", [8], 0, 32)], bytes(64)),
    "the same bytes twice": file([], [entry("a", [8]), entry("b", [8])], bytes(64)),
    "unknown type within another": file([], [entry("a", [16]), entry("b", [8], 99, 32)], bytes(64)),
    "offset beyond the end": file([], [entry("a", [8], 0, 1 << 20)], bytes(64)),
    "offset 2^64 - 32": file([], [entry("a", [8], 0, 2**64 - 32)], bytes(64)),
    "offset of an unknown type beyond the end": file([], [entry("a", [8], 99, 1 << 20)], bytes(64)),
    "offset plus size beyond the end": file([], [entry("a", [8])], bytes(31)),
    "offset is not aligned": file([], [entry("a", [8], 0, 4)], bytes(64)),
    "shape overflows": file([], [entry("a", [1 << 32, 1 << 32])], bytes(64)),
    "shape overflows to 32": file([], [entry("a", [8, 1 << 32, 1 << 32])], bytes(64)),
    "row is no whole block": file([], [entry("a", [31, 32], 2)], bytes(18 * 32)),
    "9 dimensions": file([], [entry("a", [1] * 9)], bytes(64)),
    "2^32 - 1 dimensions": file([], [entry("a", [1], rank=2**32 - 1)], bytes(64)),
    "name ../../x": file([], [entry("../../x", [8])], bytes(32)),
    "name with an escape": file([], [entry("\x1b[2J", [8])], bytes(32)),
    "name of 2^63 bytes": file([], [text("a", length=1 << 63) + bytes(24)], bytes(64)),
}


@pytest.mark.parametrize("what", BAD)
def test_a_header_that_does_not_hold_is_unsafe_and_allocates_nothing(what: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Unsafe, match=r"f\.gguf"):
            table(BAD[what])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_every_truncation_is_unsafe() -> None:
    for size in range(8, len(GOOD)):
        with pytest.raises(Unsafe):
            table(GOOD[:size])


def test_limits_bound_a_header_however_large_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    many = file(
        [strings("a", ["x"] * 10)], [entry(f"t{number}", [8], 0, 32 * number) for number in range(10)], bytes(320)
    )
    assert len(table(many) or ()) == 10
    for name, value in {"GGUF_STRINGS": 9, "GGUF_KEYS": 0, "GGUF_TENSORS": 9, "GGUF_HEADER_BYTES": 300}.items():
        with monkeypatch.context() as patch:
            patch.setattr(limits, name, value)
            with pytest.raises(Unsafe):
                table(many)


def test_a_vocabulary_larger_than_the_window_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [random.Random(number).randbytes(number % 97).hex() for number in range(40_000)]
    nested = text("n") + struct.pack("<IIQ", 9, 9, 2) + struct.pack("<IQ3B", 0, 3, 1, 2, 3) + struct.pack("<IQ", 8, 0)
    data = file([strings("tokens", words), nested, u32("general.alignment", 64)], ONE, bytes(32), alignment=64)
    found = table(data)
    assert found is not None
    assert len(data) > 2 << 20
    assert found[0].start == len(data) - 32


def test_a_file_that_shrinks_while_it_is_read_is_damaged() -> None:
    def read(start: int, end: int, size: int) -> bytes:
        return GOOD[start : min(end, size)]

    for size in range(len(GOOD) - 90):
        with pytest.raises(Damaged):
            read_table(lambda start, end, size=size: read(start, end, size), len(GOOD), "f.gguf")  # type: ignore[misc]


def test_reads_stay_inside_the_file() -> None:
    asked: list[Any] = []

    def read(start: int, end: int) -> bytes:
        asked.append((start, end))
        return GOOD[start:end]

    read_table(read, len(GOOD), "f.gguf")
    assert all(0 <= start < end <= len(GOOD) for start, end in asked)

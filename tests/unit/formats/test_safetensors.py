"""Safetensors files from anybody. (Agreement with the library on made-up files: tests/property/test_values.py)"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from llmos_cli.errors import Damaged, LlmosError, Unsafe
from llmos_cli.formats import limits
from llmos_cli.formats.codec import OPAQUE, Words
from llmos_cli.formats.safetensors import (
    DTYPE_BITS,
    TensorInfo,
    check_tensor_name,
    encode_header,
    read_shard_index,
    read_table,
)


def table(data: bytes) -> tuple[TensorInfo, ...]:
    return read_table(lambda start, end: data[start:end], len(data), "f.safetensors")


def file(header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def library_accepts(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def test_a_file_of_the_library_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    arrays = {
        "model.embed": np.arange(12, dtype=np.float32).reshape(3, 4),
        "scale": np.array(2.5),
        "empty": np.zeros((0, 7), np.int16),
        "mask": np.array([True, False]),
        "half": np.ones(5, np.float16),
        "ids": np.arange(3, dtype=np.int64),
    }
    path = tmp_path / "f.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    data = path.read_bytes()
    infos = table(data)
    assert {info.name: (info.shape, data[info.start : info.end]) for info in infos} == {
        name: (array.shape, array.tobytes()) for name, array in arrays.items()
    }
    assert list(infos) == sorted(infos, key=lambda info: info.start)


def test_our_header_is_byte_for_byte_this_and_the_library_reads_it() -> None:
    header = encode_header([("b", "BF16", (2, 1)), ("a", "I64", ())], {"format": "pt"})
    text = b'{"__metadata__":{"format":"pt"},"a":{"data_offsets":[4,12],"dtype":"I64","shape":[]},'
    text += b'"b":{"data_offsets":[0,4],"dtype":"BF16","shape":[2,1]}}'
    assert header == struct.pack("<Q", 144) + text.ljust(144)
    assert [info.name for info in table(header + bytes(12))] == ["b", "a"]
    assert library_accepts(header + bytes(12))
    for names in (["a", "a"], ["__metadata__"]):
        with pytest.raises(ValueError, match="twice or has a reserved name"):
            encode_header([(name, "U8", (1,)) for name in names], {})


ONE = {"a": tensor("U8", [1], 0, 1)}
BAD_FILES = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "N = 2^63": file(ONE, b"x", length=2**63),
    "N = 2^64 - 1": file(ONE, b"x", length=2**64 - 1),
    "header longer than file": file(ONE, b"x", length=100),
    "header over the cap": file(ONE, b"x", length=limits.SAFETENSORS_HEADER_BYTES + 1),
    "no JSON": file(b"{]"),
    "no UTF-8": file(b'{"\xff":1}'),
    "a list": file(b"[]"),
    "deep": file(b'{"a":' + b"[" * 50_000),
    "overlap": file({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}, b"xyz"),
    "same bytes twice": file({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 0, 2)}, b"xy"),
    "empty inside another": file({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [0], 1, 1)}, b"xy"),
    "hole": file({"a": tensor("U8", [1], 0, 1), "b": tensor("U8", [1], 2, 3)}, b"xyz"),
    "hole at the start": file({"a": tensor("U8", [1], 1, 2)}, b"xy"),
    "bytes after the last": file(ONE, b"xy"),
    "bytes without tensors": file({}, b"x"),
    "data cut short": file({"a": tensor("U8", [2], 0, 2)}, b"x"),
    "shape overflows": file({"a": tensor("F64", [2**31, 2**31], 0, 1)}, b"x"),
    "shape overflows to its size": file({"a": tensor("U8", [2**32, 2**32], 0, 0)}),
    "offsets overflow": file({"a": tensor("U8", [1], 2**64 - 1, 2**64)}, b"x"),
    "negative offsets": file({"a": tensor("U8", [1], -1, 0)}, b"x"),
    "negative extent": file({"a": tensor("U8", [-1, -1], 0, 1)}, b"x"),
    "end before start": file({"a": tensor("U8", [1], 1, 0)}, b"x"),
    "size is not the shape's": file({"a": tensor("U16", [1], 0, 1)}, b"x"),
    "true as an extent": file({"a": tensor("U8", [True], 0, 1)}, b"x"),
    "true as an offset": file({"a": tensor("U8", [1], False, True)}, b"x"),
    "1.0 as an extent": file({"a": tensor("U8", [1.0], 0, 1)}, b"x"),
    "null as an extent": file({"a": tensor("U8", [None], 0, 1)}, b"x"),
    "a list as an extent": file({"a": tensor("U8", [[1]], 0, 1)}, b"x"),
    "5000 digits": file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}", b"x"),
    "three offsets": file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]}}, b"x"),
    "unknown dtype": file({"a": tensor("F7", [1], 0, 1)}, b"x"),
    "dtype is no string": file({"a": {"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}}, b"x"),
    "F4, odd": file({"a": tensor("F4", [3], 0, 2)}, b"xy"),
    "F6, odd": file({"a": tensor("F6_E2M3", [2], 0, 2)}, b"xy"),
    "a field is missing": file({"a": {"dtype": "U8", "shape": [1]}}, b"x"),
    "no table": file({"a": [0, 1]}, b"x"),
    "metadata holds a number": file({"__metadata__": {"a": 1}}),
    "metadata is a list": file({"__metadata__": []}),
    "a field twice": file(b'{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}', b"x"),
}
STRICTER = {
    "a tensor twice": file(b'{"a":%s,"a":%s}' % ((json.dumps(ONE["a"]).encode(),) * 2), b"x"),
    "an unknown field": file({"a": {**ONE["a"], "x": 1}}, b"x"),
    "17 dimensions": file({"a": tensor("U8", [1] * 17, 0, 1)}, b"x"),
    "overflow undone by a zero": file({"a": tensor("U8", [2**62, 0], 0, 0)}),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_malformed_file_is_damaged_and_the_library_refuses_it_too(name: str) -> None:
    with pytest.raises(Damaged, match=r"f\.safetensors|tensor 'a'"):
        table(BAD_FILES[name])
    assert not library_accepts(BAD_FILES[name])


@pytest.mark.parametrize("name", STRICTER)
def test_what_only_the_library_lets_pass_is_damaged(name: str) -> None:
    with pytest.raises(Damaged):
        table(STRICTER[name])
    assert library_accepts(STRICTER[name])


@pytest.mark.parametrize(
    "data",
    [file({}), file(b"  {}  "), file({"__metadata__": None}), file({"a": tensor("F32", [], 0, 4)}, b"abcd"),
     file({"a": tensor("F4", [2, 2], 0, 2)}, b"ab"), file({"b": tensor("U8", [1], 1, 2), **ONE}, b"xy"),
     file({"z": tensor("F32", [0, 5], 0, 0), **ONE, "y": tensor("F32", [0], 1, 1)}, b"x")],
)  # fmt: skip
def test_an_odd_but_valid_file_is_accepted_by_both(data: bytes) -> None:
    table(data)
    assert library_accepts(data)


def test_every_truncation_is_damaged_and_a_flipped_bit_never_leads_outside() -> None:
    good = file({"__metadata__": {"k": "v"}, "a": tensor("BF16", [2], 0, 4), "b": tensor("U8", [3], 4, 7)}, b"1234567")
    for size in range(len(good)):
        with pytest.raises(Damaged):
            table(good[:size])
    for bit in range(8 * (len(good) - 7)):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            infos = table(bytes(flipped))
        except LlmosError as exc:
            assert isinstance(exc, Damaged | Unsafe)  # noqa: PT017
        else:
            assert all(8 < info.start <= info.end <= len(good) for info in infos)


def test_a_file_that_shrinks_while_it_is_read_is_damaged() -> None:
    good = file(ONE, b"x")
    for size in range(len(good) - 1):
        with pytest.raises(Damaged):
            read_table(lambda start, end, size=size: good[start : min(end, size)], len(good), "f.safetensors")


def test_too_many_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = json.dumps(tensor("U8", [0], 0, 0))
    text = "{" + ",".join(f'"{number}":{empty}' for number in range(50_000)) + "}"
    assert len(table(file(text.encode()))) == 50_000
    monkeypatch.setattr(limits, "SAFETENSORS_TENSORS", 49_999)
    with pytest.raises(Damaged, match="50000 tensors"):
        table(file(text.encode()))


@pytest.mark.parametrize("name", ["", "../../x", "a/../b", "..", "/etc/x", "a\\b", "a\0b", "a\nb", "\x1b[2J", "\u202e"])
def test_a_name_that_looks_like_a_path_or_cannot_be_shown_is_unsafe(name: str) -> None:
    with pytest.raises(Unsafe):
        table(file({name: ONE["a"]}, b"x"))
    with pytest.raises(Unsafe):
        read_shard_index(json.dumps({"weight_map": {name: "a.safetensors"}}).encode(), "index")


def test_names_that_models_use_are_accepted() -> None:
    for name in ("model.layers.0.mlp.up_proj.weight", "h/0/attn", "bert/embeddings:0", "a b", "x..y", "重み"):
        assert check_tensor_name(name, "f") == name


def test_a_shard_index_gives_each_tensor_its_file() -> None:
    index = {"metadata": {"total_size": 2}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    assert read_shard_index(json.dumps(index).encode(), "index") == index["weight_map"]


@pytest.mark.parametrize(
    "name",
    ["m.bin", "../x.safetensors", "/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "C:x.safetensors",
     "a\0.safetensors", "a\n.safetensors", "", ".safetensors.bin", "pytorch_model.pt", 7, None, ["a.safetensors"]],
)  # fmt: skip
def test_a_shard_index_may_only_name_safetensors_files_beside_it(name: object) -> None:
    with pytest.raises(Unsafe):
        read_shard_index(json.dumps({"weight_map": {"a": name}}).encode(), "index")


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b'{"weight_map":{}}', b'{"weight_map":[]}', b'{"weight_map":null}',
     b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'],
)  # fmt: skip
def test_a_malformed_shard_index_is_damaged(text: bytes) -> None:
    with pytest.raises(Damaged, match="index"):
        read_shard_index(text, "index")


def test_a_codec_is_told_how_to_read_each_dtype() -> None:
    words = {dtype: TensorInfo("t", dtype, (), 0, 0).words for dtype in DTYPE_BITS}
    assert words["BF16"] == words["F16"] == Words(2, True)
    assert (words["F32"], words["F64"], words["I64"]) == (Words(4, True), Words(8, True), Words(8))
    assert words["I8"] == words["F8_E4M3"] == words["BOOL"] == Words(1)
    assert words["F4"] == words["F6_E2M3"] == OPAQUE

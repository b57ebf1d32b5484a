"""Values round-trip through their one byte string; bytes that no writer of ours makes are refused, never misread."""

import json
import math
import struct
from typing import Any

import pytest
import safetensors
from hypothesis import assume, given
from hypothesis import strategies as st

from llmos_cli.errors import Damaged, Unsafe
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.ids import ObjectId, checksum, object_id
from llmos_cli.formats.manifest import (
    KINDS,
    Chunk,
    FileEntry,
    Manifest,
    Recipe,
    Source,
    decode_manifest,
    encode_manifest,
    recipe_key,
)
from llmos_cli.formats.names import RefName, check_paths
from llmos_cli.formats.reflog import RefEntry, decode_entry, encode_entry
from llmos_cli.formats.safetensors import DTYPE_BITS, encode_header, read_table

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
INTS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | INTS | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ODD = JSON | st.sampled_from([True, False, 1.0, 0, -1, 2, 2**62, "", "../x", None, [], {}, [[]], "0" * 64])
IDS = st.binary(min_size=32, max_size=32).map(ObjectId)
TABLES = st.dictionaries(TEXT, JSON, max_size=3)
FILES = st.lists(
    st.builds(
        FileEntry,
        st.lists(st.text("ab.é", min_size=1, max_size=3), min_size=1, max_size=3).map("/".join),
        st.lists(st.builds(Chunk, IDS, st.integers(1, limits.CHUNK_BYTES)), max_size=3).map(tuple),
    ),
    max_size=4,
).map(tuple)
RECIPES = st.builds(
    Recipe,
    TEXT,
    TABLES,
    st.dictionaries(TEXT, IDS, max_size=2),
    st.lists(st.builds(Source, TEXT, st.integers(0, 2**63 - 1), IDS), max_size=2).map(tuple),
    st.none() | INTS,
    st.dictionaries(TEXT, TEXT, max_size=2),
)
MANIFESTS = st.builds(Manifest, st.sampled_from(KINDS), FILES, TABLES, st.none() | RECIPES)
REF = RefName("model", "v1")
ENTRIES = st.builds(RefEntry, st.just(REF), st.integers(1, 10**10 - 1), IDS, st.none() | IDS, TEXT, TEXT, TEXT)


def spoil(draw: st.DrawFn | Any, value: Any) -> Any:
    """The same JSON with one node somewhere replaced, added or taken away."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 9)):
        copy: Any = value.copy()
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        match draw(st.integers(0, 9)):
            case 0:
                del copy[key]
            case 1 if isinstance(value, list):
                copy.insert(key, draw(ODD))
            case 1:
                copy[draw(TEXT)] = draw(ODD)
            case _:
                copy[key] = spoil(draw, value[key])
        return copy
    return draw(ODD)


def manifest_bytes(manifest: Manifest) -> bytes:
    try:
        check_paths(entry.path for entry in manifest.files)
    except Unsafe:
        assume(False)
    return encode_manifest(manifest)


@given(JSON)
def test_canonical_json_has_one_form(value: canonical.Json) -> None:
    data = canonical.encode(value)
    assert canonical.encode(canonical.decode(data, "x")) == data
    assert canonical.decode(data, "x") == value
    assert canonical.loads(json.dumps(value, indent=1).encode(), "x") == value
    for other in (json.dumps(value, indent=1).encode(), b" " + data, data + b"\n"):
        if other != data:
            with pytest.raises(Damaged):
                canonical.decode(other, "x")


@given(MANIFESTS)
def test_manifests_round_trip(manifest: Manifest) -> None:
    data = manifest_bytes(manifest)
    again = decode_manifest(data)
    assert encode_manifest(again) == data
    assert again == Manifest(
        manifest.kind, tuple(sorted(manifest.files, key=lambda f: f.path)), manifest.meta, manifest.recipe
    )
    if manifest.recipe and again.recipe:
        assert recipe_key(again.recipe) == recipe_key(manifest.recipe)


@given(MANIFESTS, st.data())
def test_a_spoiled_manifest_is_refused_or_means_just_what_it_says(manifest: Manifest, data: st.DataObject) -> None:
    spoiled = canonical.encode(spoil(data.draw, json.loads(manifest_bytes(manifest))))
    try:
        again = decode_manifest(spoiled)
    except (Damaged, Unsafe):
        return
    assert encode_manifest(again) == spoiled


@given(MANIFESTS.filter(lambda m: m.files), st.data())
def test_a_flipped_bit_in_a_manifest_is_refused_or_another_id(manifest: Manifest, data: st.DataObject) -> None:
    good = manifest_bytes(manifest)
    flipped = bytearray(good)
    flipped[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert object_id(flipped) != object_id(good)
    try:
        again = decode_manifest(bytes(flipped))
    except (Damaged, Unsafe):
        return
    assert encode_manifest(again) == flipped
    with pytest.raises(Damaged):
        decode_manifest(good[: data.draw(st.integers(0, len(good) - 1))])


@given(ENTRIES)
def test_ref_moves_round_trip(entry: RefEntry) -> None:
    data = encode_entry(entry)
    assert decode_entry(data, entry.ref, entry.sequence) == entry
    for ref, sequence in ((RefName("model"), entry.sequence), (entry.ref, entry.sequence + 1)):
        with pytest.raises(Damaged):
            decode_entry(data, ref, sequence)


@given(ENTRIES, st.data())
def test_a_forged_ref_move_is_refused_or_means_just_what_it_says(entry: RefEntry, data: st.DataObject) -> None:
    body = canonical.encode(spoil(data.draw, json.loads(encode_entry(entry).split(b"\n")[0])))
    forged = body + f"\n{checksum(body):016x}\n".encode()
    try:
        again = decode_entry(forged, entry.ref, entry.sequence)
    except Damaged:
        return
    assert encode_entry(again) == forged


Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


@st.composite
def tensor_files(draw: st.DrawFn) -> tuple[Tensors, dict[str, str]]:
    tensors: Tensors = {}
    for name in draw(st.lists(st.text("ab_é", min_size=1, max_size=4), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        last = 8 if DTYPE_BITS[dtype] < 8 else draw(st.integers(0, 5))
        shape = (*draw(st.lists(st.integers(0, 3), max_size=3)), last)
        tensors[name] = (dtype, shape, bytes([len(tensors)]) * (DTYPE_BITS[dtype] * math.prod(shape) // 8))
    return tensors, draw(st.dictionaries(TEXT, TEXT, max_size=2))


def write(file: tuple[Tensors, dict[str, str]]) -> bytes:
    tensors, metadata = file
    header = encode_header([(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()], metadata)
    return header + b"".join(data for _, _, data in tensors.values())


def library_reads(data: bytes) -> Tensors | None:
    try:
        return {
            name: (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
            for name, info in safetensors.deserialize(data)
        }
    except safetensors.SafetensorError:
        return None


def we_read(data: bytes) -> Tensors:
    table = read_table(lambda start, end: data[start:end], len(data), "x")
    return {tensor.name: (tensor.dtype, tensor.shape, data[tensor.start : tensor.end]) for tensor in table}


@given(tensor_files())
def test_tensor_tables_round_trip_and_the_library_agrees(file: tuple[Tensors, dict[str, str]]) -> None:
    data = write(file)
    assert we_read(data) == file[0] == library_reads(data)
    for cut in range(len(data)):
        with pytest.raises(Damaged):
            we_read(data[:cut])


@given(tensor_files(), st.data())
def test_what_we_accept_of_a_spoiled_table_the_library_accepts(
    file: tuple[Tensors, dict[str, str]], data: st.DataObject
) -> None:
    good = write(file)
    begin = 8 + int.from_bytes(good[:8], "little")
    text = json.dumps(spoil(data.draw, json.loads(good[8:begin]))).encode()
    spoiled = struct.pack("<Q", len(text)) + text + good[begin:]
    try:
        ours = we_read(spoiled)
    except (Damaged, Unsafe):
        return
    assert library_reads(spoiled) == ours

"""Manifests: the exact bytes, and all that must not pass for one. (Round trips: tests/property/test_values.py)"""

import json
from typing import Any

import pytest

from llmos_cli.errors import Damaged, UnknownVersion, Unsafe, UsageError
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest, Recipe, decode_manifest, encode_manifest, recipe_key

OID = object_id(b"x")
MANIFEST = Manifest(
    "dataset",
    (FileEntry("b.txt", (Chunk(OID, 1), Chunk(OID, 4))), FileEntry("a/empty", ())),
    {"rows": 3},
    Recipe("shard", {"seq_len": 256}, {"tokenizer": OID}, (), 7, {"tokenizers": "0.22"}),
)


def spoiled(**changes: Any) -> bytes:
    """The manifest with top-level fields changed, dotted ones inside the recipe; `...` takes one away."""
    value = json.loads(encode_manifest(MANIFEST))
    for name, item in changes.items():
        table = value["recipe"] if name.startswith("recipe_") else value
        key = name.removeprefix("recipe_")
        table[key] = item
        if item is ...:
            del table[key]
    return canonical.encode(value)


def test_the_bytes_are_fixed() -> None:
    assert encode_manifest(MANIFEST).decode() == (
        '{"files":[{"chunks":[],"path":"a/empty"},{"chunks":[["ID",1],["ID",4]],"path":"b.txt"}],"kind":"dataset",'
        '"meta":{"rows":3},"recipe":{"command":"shard","inputs":{"tokenizer":"ID"},"params":{"seq_len":256},"seed":7,'
        '"sources":[],"tools":{"tokenizers":"0.22"}},"version":1}'.replace("ID", str(OID))
    )
    again = decode_manifest(encode_manifest(MANIFEST))
    assert again.size == 5
    assert again.file("b.txt") == MANIFEST.files[0]
    assert again.file("b") is None


def test_a_recipe_is_known_by_what_decides_the_result() -> None:
    assert MANIFEST.recipe
    assert recipe_key(MANIFEST.recipe) == recipe_key(
        Recipe("shard", {"seq_len": 256}, {"tokenizer": OID}, (), 7, {"tokenizers": "0.22"})
    )
    assert recipe_key(MANIFEST.recipe) != recipe_key(Recipe("shard", {"seq_len": 256}, {"tokenizer": OID}, (), 8))


@pytest.mark.parametrize("change", [{"version": 2}, {"version": 0}, {"version": 2, "surprise": 1}, {"kind": "image"}])
def test_an_unknown_version_or_kind_is_refused_as_such(change: dict[str, Any]) -> None:
    with pytest.raises(UnknownVersion):
        decode_manifest(spoiled(**change))


CHUNK = [str(OID), 1]


@pytest.mark.parametrize(
    "change",
    [
        {"version": True},
        {"version": 1.0},
        {"version": "1"},
        {"version": None},
        {"version": ...},
        {"surprise": 1},
        {"recipe": ...},
        {"recipe": []},
        {"meta": None},
        {"files": {}},
        {"files": [{"path": "a"}]},
        {"files": [{"path": 1, "chunks": []}]},
        {"files": [{"path": "a", "chunks": [], "mode": 1}]},
        {"files": [{"path": "b", "chunks": []}, {"path": "a", "chunks": []}]},
        *({"files": [{"path": "a", "chunks": [chunk]}]} for chunk in (
            [], [str(OID)], [*CHUNK, 1], [1, str(OID)], ["x", 1], [str(OID).upper(), 1], [str(OID), 0], [str(OID), -1],
            [str(OID), True], [str(OID), 1.0], [str(OID), "1"], [str(OID), limits.CHUNK_BYTES + 1],
            [str(OID), 2**63 - 1],
        )),
        {"recipe_seed": "1"},
        {"recipe_seed": True},
        {"recipe_seed": 1.0},
        {"recipe_command": None},
        {"recipe_params": []},
        {"recipe_inputs": {"data": "x"}},
        {"recipe_inputs": []},
        {"recipe_tools": {"torch": 2}},
        {"recipe_sources": {}},
        {"recipe_sources": [["name", 1]]},
        {"recipe_sources": [["name", -1, str(OID)]]},
        {"recipe_sources": [["name", 1, "x"]]},
        {"recipe_surprise": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_too_many_too_few_or_of_the_wrong_type_is_damaged(change: dict[str, Any]) -> None:
    with pytest.raises(Damaged) as caught:
        decode_manifest(spoiled(**change))
    assert not isinstance(caught.value, UnknownVersion)


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{}", b"1", b'"x"', encode_manifest(MANIFEST) + b"\n"])
def test_what_is_not_a_manifest_is_damaged(text: bytes) -> None:
    with pytest.raises(Damaged):
        decode_manifest(text)


def test_every_truncation_is_damaged() -> None:
    data = encode_manifest(MANIFEST)
    for size in range(len(data)):
        with pytest.raises(Damaged):
            decode_manifest(data[:size])


@pytest.mark.parametrize("paths", [["../x"], ["/etc/passwd"], ["A", "a"], ["a", "a"], ["a", "a/b"]])
def test_paths_are_checked_on_the_way_in_and_out(paths: list[str]) -> None:
    with pytest.raises(Unsafe):
        encode_manifest(Manifest("files", tuple(FileEntry(path, ()) for path in paths)))
    with pytest.raises(Unsafe):
        decode_manifest(spoiled(files=[{"chunks": [], "path": path} for path in paths]))


def test_the_limits_hold_on_the_way_in_and_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_manifest(MANIFEST)
    for name, value in (("MANIFEST_FILES", 1), ("MANIFEST_BYTES", len(data) - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(limits, name, value)
            with pytest.raises(Damaged, match="limit"):
                decode_manifest(data)
            with pytest.raises(UsageError, match="limits"):
                encode_manifest(MANIFEST)


@pytest.mark.parametrize(
    "manifest",
    [
        Manifest("image", ()),
        Manifest("files", (), {"loss": float("nan")}),
        Manifest("files", (FileEntry("a", (Chunk(OID, 0),)),)),
        Manifest("files", (FileEntry("a", (Chunk(OID, limits.CHUNK_BYTES + 1),)),)),
    ],
)
def test_what_could_not_be_read_back_is_not_written(manifest: Manifest) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        encode_manifest(manifest)

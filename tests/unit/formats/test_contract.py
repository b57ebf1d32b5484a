"""README.md of the formats is the contract: its tables must say what the code does."""

import json
import re
from pathlib import Path

import pytest

import llmos_cli.formats
from llmos_cli.formats import adopted, codec, frame, layout, limits, pack, reflog
from llmos_cli.formats.ids import NO_ID
from llmos_cli.formats.manifest import KINDS, FileEntry, Manifest, Recipe, encode_manifest
from llmos_cli.formats.names import RefName
from llmos_cli.formats.pool import Card, Members, encode_card, encode_members
from llmos_cli.formats.signature import Signature, Statement, encode_signature
from llmos_cli.formats.snapshot import Snapshot, encode_snapshot

README = (Path(llmos_cli.formats.__file__).parent / "README.md").read_text()
STRUCTS = {
    "Frame header": frame._HEADER.format + frame._CHECK.format,
    "Planes table entry": codec._PLANE.format,
    "Adopted payload": adopted._PLACE.format,
    "Pack header": pack._HEADER.format,
    "Pack index entry": pack._ENTRY.format,
    "Pack trailer": pack._TRAILER.format + pack._TRAILER_END.format,
}
TYPES = {"u8": ("B", 1), "u32": ("I", 4), "u64": ("Q", 8)}
UNITS = {"": 1, "KiB": limits.KiB, "MiB": limits.MiB, "GiB": limits.GiB}
MANIFEST = json.loads(encode_manifest(Manifest("files", (FileEntry("a", ()),), {}, Recipe("add"))))
MOVE = reflog.encode_entry(reflog.RefEntry(RefName("a"), 1, NO_ID, None, "", "", ""))
SNAPSHOT = encode_snapshot(Snapshot("", "", {}, ()))
SIGNED = encode_signature(Signature(Statement(RefName("a"), NO_ID, None, 1, "", None), "", b""))
CARD = encode_card(Card("", "", ""))
MEMBERS = encode_members(Members("", 1, 1, ()))


def section(heading: str) -> tuple[str, list[list[str]]]:
    """What stands behind a heading's name, and the cells of the first table below it."""
    match = re.search(rf"^#+ {re.escape(heading)}(.*)\n((?:(?!#)(?!\|).*\n)*)((?:\|.*\n)+)", README, re.MULTILINE)
    assert match, heading
    return match[1], [[cell.strip() for cell in line.strip("|\n").split("|")] for line in match[3].splitlines()[2:]]


def test_every_byte_table_is_checked() -> None:
    named = set(re.findall(r"^### (.*) \(\d+ bytes\)$", README, re.MULTILINE))
    assert named == set(STRUCTS)


@pytest.mark.parametrize("name", STRUCTS)
def test_a_byte_table_is_the_struct_that_the_code_packs(name: str) -> None:
    title, rows = section(name)
    at, layout_ = 0, ""
    for offset, size, kind, _ in rows:
        assert int(offset) == at, f"{name}: the field at {offset} should start at {at}"
        letter, width = TYPES.get(kind, (f"{size}{'x' if kind == 'zero' else 's'}", int(size)))
        assert kind in {*TYPES, "bytes", "zero"}
        assert width == int(size)
        layout_ += letter
        at += int(size)
    assert title == f" ({at} bytes)"
    assert layout_ == re.sub(r"[<\s]", "", STRUCTS[name])


def test_the_sizes_the_code_exports_are_those_of_the_tables() -> None:
    sizes = {name: section(name)[0] for name in STRUCTS}
    assert sizes["Frame header"] == f" ({frame.HEADER_BYTES} bytes)"
    assert sizes["Pack header"] == f" ({pack.HEADER_SIZE} bytes)"
    assert sizes["Pack index entry"] == f" ({pack.ENTRY_SIZE} bytes)"
    assert sizes["Pack trailer"] == f" ({pack.TRAILER_SIZE} bytes)"


def test_the_limits_are_those_of_the_code() -> None:
    stated = {}
    for name, value, _ in section("Limits")[1]:
        number, _, unit = value.partition(" ")
        stated[name.strip("`")] = int(number.replace(",", "")) * UNITS[unit]
    assert stated == {name: value for name, value in vars(limits).items() if name.isupper()}


def test_the_codecs_are_those_of_the_code() -> None:
    assert {int(number): name for number, name, _ in section("Codecs")[1]} == codec.CODEC_NAMES


@pytest.mark.parametrize(
    ("heading", "fields"),
    [
        ("Manifest fields", MANIFEST),
        ("File fields", MANIFEST["files"][0]),
        ("Recipe fields", MANIFEST["recipe"]),
        ("Ref move fields", json.loads(MOVE.split(b"\n")[0])),
        ("Signature fields", json.loads(SIGNED)),
        ("Snapshot fields", json.loads(SNAPSHOT)),
        ("Card fields", json.loads(CARD.split(b"\n")[0])),
        ("Members fields", json.loads(MEMBERS.split(b"\n")[0])),
    ],
)
def test_the_fields_are_those_of_the_code(heading: str, fields: dict[str, object]) -> None:
    assert [row[0].strip("`") for row in section(heading)[1]] == sorted(fields)


def test_names_magics_and_places_are_those_of_the_code() -> None:
    kinds = {row[0]: row[1:] for row in section("Manifest fields")[1]}["`kind`"][1]
    assert tuple(re.findall(r"`(\w+)`", kinds)) == KINDS
    for magic in (frame.MAGIC, pack.MAGIC, pack.END_MAGIC):
        assert f"magic `{magic.rstrip(bytes(1)).decode()}`" in README
    assert f"holds the 8 bytes `{layout.FORMAT_TEXT.decode().strip()}` and a newline" in README
    places = [row[0] for row in section("Store")[1]]
    assert f"`{layout.PACKS}/ab/<64 hex>{layout.PACK_SUFFIX}`" in places
    assert f"`{layout.ADOPTED}/ab/<64 hex>`" in places
    assert f"`{layout.REFS}/<name>/<tag>/<{reflog.SEQUENCE_DIGITS} digits>`" in places
    assert f"`{layout.FORMAT_FILE}`" in places

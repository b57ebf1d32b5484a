"""What version 1 wrote is read for ever, and what is written today is the same bytes. Made by make_v1.py."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.formats import codec, pack
from llmos_cli.formats.frame import HEADER_BYTES, MANIFEST, check_id, decode_payload, encode_header
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.layout import check_format, pack_key, ref_key
from llmos_cli.formats.manifest import decode_manifest, encode_manifest
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry, decode_entry, encode_entry

FOLDER = Path(__file__).parent / "v1"
MAKE = runpy.run_path(str(FOLDER.parent / "make_v1.py"))
MANIFEST_ID = "91ae352dfd020f21e985fc88351519e64606e547cbb196dfca7b623e35128336"
PACK = "1449d01618e6ecd69c2dd526002befd3959011265e244b68f60fd53e622a6134"
REF = RefName("golden", "v1")


@pytest.fixture(scope="module")
def packed() -> bytes:
    return (FOLDER / "packs" / PACK[:2] / f"{PACK}.pack").read_bytes()


def objects(data: bytes) -> dict[ObjectId, tuple[pack.Entry, bytes]]:
    found = {}
    for entry in pack.read_index(lambda start, end: data[start:end], len(data)):
        frame = pack.check_entry(entry, data[entry.offset : entry.offset + HEADER_BYTES])
        assert encode_header(frame) == data[entry.offset : entry.offset + HEADER_BYTES]
        plain = bytearray(frame.plain_size)
        decode_payload(frame, memoryview(data)[entry.offset + HEADER_BYTES : entry.end], memoryview(plain))
        check_id(frame, plain)
        found[frame.id] = (entry, bytes(plain))
    return found


def test_the_pack_is_read_and_its_index_written_the_same(packed: bytes) -> None:
    assert str(object_id(packed)) == PACK
    assert pack_key(object_id(packed)) == f"packs/{PACK[:2]}/{PACK}.pack"
    entries = pack.read_index(lambda start, end: packed[start:end], len(packed))
    end = pack.pack_end(entries, pack.aligned(entries[-1].end))
    assert packed.startswith(pack.pack_header())
    assert packed.endswith(end)
    assert entries[-1].kind == MANIFEST


def test_every_codec_is_decoded_to_the_bytes_that_went_in(packed: bytes) -> None:
    found = objects(packed)
    manifest = decode_manifest((FOLDER / "manifest.json").read_bytes())
    for path, (words, chunks) in MAKE["plain_files"]().items():
        entry = manifest.file(path)
        assert entry is not None
        assert [found[chunk.id][1] for chunk in entry.chunks] == chunks
        codecs = {found[chunk.id][0].codec for chunk in entry.chunks}
        assert codecs <= {codec.PLANES if words.width else codec.ZSTD if path == "text/cat.txt" else codec.RAW}
    assert {entry.codec for entry, _ in found.values()} == {codec.RAW, codec.ZSTD, codec.PLANES}


def test_the_manifest_is_read_and_written_the_same(packed: bytes) -> None:
    data = (FOLDER / "manifest.json").read_bytes()
    assert str(object_id(data)) == MANIFEST_ID
    assert objects(packed)[object_id(data)][1] == data
    assert encode_manifest(decode_manifest(data)) == data
    assert encode_manifest(MAKE["manifest_of"](MAKE["plain_files"]())) == data


def test_the_ref_is_read_and_written_the_same() -> None:
    moves: list[RefEntry] = []
    for sequence in (1, 2):
        data = (FOLDER / ref_key(REF, sequence)).read_bytes()
        moves.append(decode_entry(data, REF, sequence))
        assert encode_entry(moves[-1]) == data
    assert moves[0].previous is None
    assert moves[1].previous == moves[0].id
    assert str(moves[1].id) == MANIFEST_ID
    assert moves[1].message == 'add: "é"\n'


def test_the_store_format_is_accepted() -> None:
    check_format((FOLDER / "FORMAT").read_bytes())


def test_the_script_writes_today_what_it_wrote_then_but_for_what_zstd_packed(packed: bytes) -> None:
    built: dict[str, bytes] = MAKE["build"]()
    for name, data in built.items():
        if name.startswith("packs/"):
            assert {oid: plain for oid, (_, plain) in objects(data).items()} == {
                oid: plain for oid, (_, plain) in objects(packed).items()
            }
        else:
            assert (FOLDER / name).read_bytes() == data


def test_the_script_never_overwrites_unless_forced(tmp_path: Path) -> None:
    write: Any = MAKE["write"]
    write(tmp_path / "new", force=False)
    (tmp_path / "new" / "FORMAT").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="promise"):
        write(tmp_path / "new", force=False)
    assert (tmp_path / "new" / "FORMAT").read_bytes() == b"mine"
    write(tmp_path / "new", force=True)
    check_format((tmp_path / "new" / "FORMAT").read_bytes())

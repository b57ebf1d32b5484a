"""What version 1 wrote is read for ever, and what is written today is the same bytes. Made by make_v1.py."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from llmos_cli.formats import codec, pack
from llmos_cli.formats.adopted import decode_place
from llmos_cli.formats.frame import HEADER_BYTES, MANIFEST, check_id, decode_header, decode_payload, encode_header
from llmos_cli.formats.ids import ObjectId, checksum, object_id
from llmos_cli.formats.layout import adopted_key, check_format, pack_key, ref_key
from llmos_cli.formats.manifest import decode_manifest, encode_manifest
from llmos_cli.formats.names import RefName
from llmos_cli.formats.pool import decode_card, decode_members, encode_card, encode_members
from llmos_cli.formats.reflog import RefEntry, decode_entry, encode_entry
from llmos_cli.formats.signature import (
    decode_signature,
    encode_signature,
    parse_signature_name,
    signature_name,
    signed_bytes,
)
from llmos_cli.formats.snapshot import decode_snapshot, encode_snapshot, parse_snapshot_name

FOLDER = Path(__file__).parent / "v1"
MAKE = runpy.run_path(str(FOLDER.parent / "make_v1.py"))
MANIFEST_ID = "91ae352dfd020f21e985fc88351519e64606e547cbb196dfca7b623e35128336"
PACK = "1449d01618e6ecd69c2dd526002befd3959011265e244b68f60fd53e622a6134"
DELTA_MANIFEST_ID = "62e2c9738a52d73ca1336261aa0d1c629d5c21956fc05ca5aaec4a25fd1ea842"
DELTA_PACK = "9a47fa5b050f38b7d10603abfbfa84d01341daf6b501e137510ef73feaf242b1"
ADOPTED_MANIFEST_ID = "5c8aed3c50836826d0f8e4911e3cbdf8a92eb2a09c09fcc33bfbd72493fbe6da"
ADOPTED_PACK = "3b2b53218e97d5139f8c109dafcfc18fcc4f8efad8dcdd43340e49f08fb095b2"
STEP_PACK = "10c166c76e838e46e6f1c55cb395aecce8f1ca78232ffd051ad86ed894d7931b"
REF = RefName("golden", "v1")
Objects = dict[ObjectId, tuple[pack.Entry, bytes]]


def stored(name: str) -> bytes:
    return (FOLDER / "packs" / name[:2] / f"{name}.pack").read_bytes()


@pytest.fixture(scope="module")
def packed() -> bytes:
    return stored(PACK)


def objects(data: bytes, known: Objects | None = None) -> Objects:
    """Every object of a pack, by its frame; the bases of deltas stand before them or are `known`."""
    found = {}
    for entry in pack.read_index(lambda start, end: data[start:end], len(data)):
        frame = pack.check_entry(entry, data[entry.offset : entry.offset + HEADER_BYTES])
        assert encode_header(frame) == data[entry.offset : entry.offset + HEADER_BYTES]
        plain, base = bytearray(frame.plain_size), None
        if frame.codec == codec.DELTA:
            below, base = {**(known or {}), **found}[frame.base]
            assert frame.depth == below.depth + 1
        payload = memoryview(data)[entry.offset + HEADER_BYTES : entry.end]
        if frame.codec == codec.ADOPTED:
            place = decode_place(payload)
            plain[:] = (FOLDER / adopted_key(frame.base)).read_bytes()[place.offset :][: frame.plain_size]
            assert checksum(plain) == place.check
            check_id(frame, plain)
            found[frame.id] = (entry, bytes(plain))
            continue
        decode_payload(frame, payload, memoryview(plain), memoryview(base) if base else None)
        check_id(frame, plain)
        found[frame.id] = (entry, bytes(plain))
    return found


@pytest.mark.parametrize("name", [PACK, DELTA_PACK, ADOPTED_PACK])
def test_a_pack_is_read_and_its_index_written_the_same(name: str) -> None:
    packed = stored(name)
    assert str(object_id(packed)) == name
    assert pack_key(object_id(packed)) == f"packs/{name[:2]}/{name}.pack"
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


def test_every_delta_is_decoded_to_the_bytes_that_went_in(packed: bytes) -> None:
    found = objects(stored(DELTA_PACK), objects(packed))
    data = (FOLDER / "manifest-delta.json").read_bytes()
    assert str(object_id(data)) == DELTA_MANIFEST_ID
    assert found[object_id(data)][1] == data
    manifest = decode_manifest(data)
    for path, delta in MAKE["plain_deltas"]().items():
        entry = manifest.file(path)
        assert entry is not None
        line, plain = found[entry.chunks[0].id]
        assert plain == delta.plain
        assert (line.codec, line.base, line.depth) == (codec.DELTA, object_id(delta.base), delta.depth)
    assert encode_manifest(MAKE["manifest_of_deltas"](MAKE["plain_deltas"]())) == data


def test_planes_that_are_steps_are_decoded_to_the_bytes_that_went_in() -> None:
    data = stored(STEP_PACK)
    assert str(object_id(data)) == STEP_PACK
    found = objects(data)
    assert [plain for _, plain in found.values()] == [plain for _, plain in MAKE["signed_integers"]()]
    for (entry, _), (words, _) in zip(found.values(), MAKE["signed_integers"](), strict=True):
        table = data[entry.offset + HEADER_BYTES :][: 8 * words.width]
        methods = [table[8 * plane] for plane in range(words.width)]
        assert methods == [1] + [2] * (words.width - 1)


def test_adopted_chunks_are_found_in_their_file() -> None:
    found = objects(stored(ADOPTED_PACK))
    data = (FOLDER / "manifest-adopted.json").read_bytes()
    assert str(object_id(data)) == ADOPTED_MANIFEST_ID
    entry = decode_manifest(data).file("adopted.bin")
    assert entry is not None
    file = b"".join(found[chunk.id][1] for chunk in entry.chunks)
    assert (FOLDER / adopted_key(object_id(file))).read_bytes() == file
    for chunk, (words, plain) in zip(entry.chunks, MAKE["adopted_chunks"](), strict=True):
        line = found[chunk.id][0]
        assert (found[chunk.id][1], line.codec, line.base, line.depth) == (plain, codec.ADOPTED, object_id(file), 0)
        header = stored(ADOPTED_PACK)[line.offset :][:HEADER_BYTES]
        frame = decode_header(header)
        assert (frame.width, frame.rotated) == (words.width, words.is_float)


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


def test_the_snapshot_is_read_and_written_the_same() -> None:
    (path,) = (FOLDER / "snapshots").iterdir()
    name, data = parse_snapshot_name(path.name), path.read_bytes()
    assert name is not None
    assert name.moment.isoformat() == "2026-01-02T03:04:07.089000+00:00"
    snapshot = decode_snapshot(data, name)
    assert encode_snapshot(snapshot) == data
    for ref, log in snapshot.refs.items():
        assert [(FOLDER / ref_key(ref, move.sequence)).read_bytes() for move in log] == [*map(encode_entry, log)]
    assert {str(oid) for oid in snapshot.manifests} >= {MANIFEST_ID, DELTA_MANIFEST_ID, ADOPTED_MANIFEST_ID}


def test_the_card_and_the_members_of_a_pool_are_read_and_written_the_same() -> None:
    card = decode_card((FOLDER / "pool/node").read_bytes())
    members = decode_members((FOLDER / "pool/members/0000000002").read_bytes(), 2)
    assert encode_card(card) == (FOLDER / "pool/node").read_bytes()
    assert encode_members(members) == (FOLDER / "pool/members/0000000002").read_bytes()
    assert (members.pool, members.replicas, members.majority) == (card.pool, 2, 2)
    assert [node.url for node in members.renewed] == ["/node3"]
    assert [node.url for node in members.nodes if (node.id, node.life) == (card.node, card.life)] == ["/node1"]


def test_the_store_format_is_accepted() -> None:
    check_format((FOLDER / "FORMAT").read_bytes())


def test_the_script_writes_today_what_it_wrote_then_but_for_what_zstd_packed(packed: bytes) -> None:
    built: dict[str, bytes] = MAKE["build"]()
    now: Objects = {}
    for name, data in built.items():
        if name.startswith("packs/"):
            now |= objects(data, now)
        else:
            assert (FOLDER / name).read_bytes() == data
    then = objects(packed)
    then |= objects(stored(DELTA_PACK), then)
    then |= objects(stored(ADOPTED_PACK))
    then |= objects(stored(STEP_PACK))
    assert {oid: plain for oid, (_, plain) in now.items()} == {oid: plain for oid, (_, plain) in then.items()}


def test_the_script_never_overwrites_unless_forced(tmp_path: Path) -> None:
    write: Any = MAKE["write"]
    write(tmp_path / "new", force=False)
    (tmp_path / "new" / "FORMAT").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="promise"):
        write(tmp_path / "new", force=False)
    assert (tmp_path / "new" / "FORMAT").read_bytes() == b"mine"
    write(tmp_path / "new", force=True)
    check_format((tmp_path / "new" / "FORMAT").read_bytes())


def test_the_signature_is_read_written_and_good() -> None:
    (path,) = (FOLDER / "refs/golden/v1").glob("*.sig")
    data = path.read_bytes()
    signature = decode_signature(data, path.name)
    assert encode_signature(signature) == data
    assert (parse_signature_name(path.name), signature_name(2, data)) == (2, path.name)
    assert signed_bytes(signature.statement).startswith(
        b'llmos ref signature 1\n{"expires":"2036-01-02T03:04:07+00:00",'
    )
    assert (str(signature.statement.id), signature.statement.serial) == (MANIFEST_ID, 3)
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key))
    key.verify(signature.value, signed_bytes(signature.statement))

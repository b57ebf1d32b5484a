"""Make the golden files of format version 1: a store of three packs, the second of deltas, the third of chunks that lie
in an adopted file, three refs and their manifests, and a pack of signed integers.

    python tests/golden/make_v1.py            # refuses to touch a folder that has files
    python tests/golden/make_v1.py --force    # only before version 1 has been released

Later readers must read these bytes for ever, so the files are kept and never made again; a new version gets a new
folder and a new script. The values come from integer arithmetic, so that they are the same on every machine.
"""

import argparse
import random
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmos_cli.formats import codec, pack
from llmos_cli.formats.adopted import Place, encode_place
from llmos_cli.formats.codec import OPAQUE, Encoded, Words
from llmos_cli.formats.frame import CHUNK, MANIFEST, encode_header, new_frame
from llmos_cli.formats.ids import NO_ID, ObjectId, checksum, object_id
from llmos_cli.formats.layout import FORMAT_FILE, FORMAT_TEXT, REFS, adopted_key, pack_key, ref_key
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest, Recipe, Source, encode_manifest
from llmos_cli.formats.names import RefName
from llmos_cli.formats.pool import CARD_KEY, Card, Member, Members, encode_card, encode_members, members_key
from llmos_cli.formats.reflog import RefEntry, encode_entry
from llmos_cli.formats.signature import Signature, Statement, encode_signature, signature_name
from llmos_cli.formats.snapshot import Snapshot, encode_snapshot, name_snapshot

FOLDER = Path(__file__).parent / "v1"
# Of the private key that is the bytes 0 to 31.
KEY = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
SIGNED = bytes.fromhex(
    "0f4a19a7ec776d74511e359b3892686bbadacdcf5050a48b744a6e6ef1cf3ae0"
    "f6a20635efcc7bf1f66545eaf34484c1e91a342402f44af1aee3f8ed17c3a609"
)


def plain_files() -> dict[str, tuple[Words, list[bytes]]]:
    """The chunks of every file, and how they are to be read."""
    dice = random.Random(1)

    def weights(count: int) -> list[float]:
        return [(dice.random() + dice.random() + dice.random() - 1.5) / 32 for _ in range(count)]

    text = b"".join(b"%d: the cat sat on the mat.\n" % number for number in range(40))
    return {
        "bf16.bin": (Words(2, True), [b"".join(struct.pack("<f", value)[2:] for value in weights(400)) + b"\1"]),
        "empty.bin": (OPAQUE, []),
        "fp16.bin": (Words(2, True), [struct.pack("<400e", *weights(400))]),
        "fp32.bin": (Words(4, True), [struct.pack("<256f", *weights(256)) + b"\1\2\3"]),
        "fp64.bin": (Words(8, True), [struct.pack("<128d", *(round(value, 3) for value in weights(128)))]),
        "int8.bin": (Words(1), [bytes(int(value * 300) % 256 for value in weights(256))]),
        "noise.bin": (OPAQUE, [dice.randbytes(100), dice.randbytes(28)]),
        "text/cat.txt": (OPAQUE, [text]),
        "tokens.bin": (Words(2), [struct.pack("<400H", *(dice.randrange(5000) for _ in range(400)))]),
    }


@dataclass(frozen=True)
class Delta:
    words: Words
    base: bytes
    depth: int
    plain: bytes


def plain_deltas() -> dict[str, Delta]:
    """Chunks of `plain_files` with small changes, one cut short, one made longer, and a delta on a delta."""
    dice = random.Random(2)
    files = {path: (words, chunks[0]) for path, (words, chunks) in plain_files().items() if chunks}

    def changed(plain: bytes, width: int) -> bytes:
        count, limit = len(plain) // width, 1 << 8 * width
        values = [int.from_bytes(plain[at : at + width], "little") for at in range(0, count * width, width)]
        moved = [(value + dice.choice((0, 0, 1, -1, 2, -3, 300))) % limit for value in values]
        return b"".join(value.to_bytes(width, "little") for value in moved) + plain[count * width :]

    found = {}
    for path in ("bf16.bin", "fp16.bin", "fp32.bin", "fp64.bin", "int8.bin", "tokens.bin"):
        words, base = files[path]
        found[path] = Delta(words, base, 1, changed(base, words.width))
    words, base = files["bf16.bin"]
    found["bf16-longer.bin"] = Delta(words, base, 1, changed(base + base[:300], 2) + b"\7")
    found["bf16-next.bin"] = Delta(words, found["bf16.bin"].plain, 2, changed(found["bf16.bin"].plain, 2))
    found["bf16-shorter.bin"] = Delta(words, base, 1, changed(base[:401], 2))
    return found


def signed_integers() -> list[tuple[Words, bytes]]:
    """Small signed integers in wide words, whose planes are steps."""
    dice = random.Random(4)
    values = [dice.randrange(-8, 8) for _ in range(600)]
    return [
        (Words(width), struct.pack(f"<600{code}", *values) + b"\1") for width, code in ((2, "h"), (4, "i"), (8, "q"))
    ]


def manifest_of(files: dict[str, tuple[Words, list[bytes]]]) -> Manifest:
    entries = tuple(
        FileEntry(path, tuple(Chunk(object_id(chunk), len(chunk)) for chunk in chunks))
        for path, (_, chunks) in files.items()
    )
    source = Source("cat.txt", 3, object_id(b"cat"))
    recipe = Recipe("add", {"lr": 1e-05, "name": "é"}, {"data": object_id(b"data")}, (source,), 7, {"llmos": "0.1"})
    return Manifest("files", entries, {"counts": [1, None, True]}, recipe)


def adopted_chunks() -> list[tuple[Words, bytes]]:
    """The chunks of a file that is adopted: text, floats, the end."""
    dice = random.Random(3)
    floats = struct.pack("<200f", *((dice.random() - 0.5) / 8 for _ in range(200)))
    return [(OPAQUE, b"a header of some kind\n"), (Words(4, True), floats), (Words(2), b"tail")]


def manifest_of_adopted() -> Manifest:
    chunks = tuple(Chunk(object_id(plain), len(plain)) for _, plain in adopted_chunks())
    return Manifest("files", (FileEntry("adopted.bin", chunks),))


def manifest_of_deltas(deltas: dict[str, Delta]) -> Manifest:
    entries = (FileEntry(path, (Chunk(object_id(one.plain), len(one.plain)),)) for path, one in sorted(deltas.items()))
    return Manifest("files", tuple(entries))


def packed(objects: Iterable[tuple[bytes, Encoded, int, ObjectId, int]]) -> bytes:
    """A pack of plain bytes, each as it is encoded, with kind, base and depth."""
    body, entries = pack.pack_header(), []
    for plain, encoded, kind, base, depth in objects:
        frame = new_frame(kind, object_id(plain), len(plain), encoded, base, depth)
        entries.append(pack.entry_of(frame, len(body)))
        body += b"".join([encode_header(frame), *map(bytes, encoded.parts)])
        body += pack.padding(len(body))
    return body + pack.pack_end(entries, len(body))


def build() -> dict[str, bytes]:
    """Every golden file by its path; only zstd payloads, and so the names of packs, may differ between machines."""
    files, deltas = plain_files(), plain_deltas()
    first, manifest = encode_manifest(Manifest("report", ())), encode_manifest(manifest_of(files))
    delta_manifest = encode_manifest(manifest_of_deltas(deltas))
    chunks = [(chunk, words, CHUNK) for words, chunks in files.values() for chunk in chunks]
    whole = packed(
        (plain, codec.encode(memoryview(plain), words), kind, NO_ID, 0)
        for plain, words, kind in [(first, OPAQUE, MANIFEST), *chunks, (manifest, OPAQUE, MANIFEST)]
    )
    frames = [
        (
            one.plain,
            codec.encode_delta(memoryview(one.plain), one.base, one.words),
            CHUNK,
            object_id(one.base),
            one.depth,
        )
        for one in deltas.values()
    ]
    frames.append((delta_manifest, codec.encode(memoryview(delta_manifest), OPAQUE), MANIFEST, NO_ID, 0))
    differences = packed(frames)
    adopted = b"".join(plain for _, plain in adopted_chunks())
    adopted_manifest = encode_manifest(manifest_of_adopted())
    pointers, at = [], 0
    for words, plain in adopted_chunks():
        pointers.append((plain, encode_place(Place(at, checksum(plain)), words), CHUNK, object_id(adopted), 0))
        at += len(plain)
    pointers.append((adopted_manifest, codec.encode(memoryview(adopted_manifest), OPAQUE), MANIFEST, NO_ID, 0))
    points = packed(pointers)
    steps = packed(
        (plain, codec.encode(memoryview(plain), words), CHUNK, NO_ID, 0) for words, plain in signed_integers()
    )
    ref, time = RefName("golden", "v1"), "2026-01-02T03:04:05Z"
    moves = [
        RefEntry(ref, 1, object_id(first), None, time, "ann@example", ""),
        RefEntry(ref, 2, object_id(manifest), object_id(first), "2026-01-02T03:04:06Z", "ann@example", 'add: "é"\n'),
        RefEntry(RefName("golden", "delta"), 1, object_id(delta_manifest), None, time, "ann@example", "add"),
        RefEntry(RefName("golden", "adopted"), 1, object_id(adopted_manifest), None, time, "ann@example", "add"),
    ]
    logs = {ref: tuple(move for move in moves if move.ref == ref) for ref in sorted({move.ref for move in moves})}
    kept_ids = tuple(sorted({move.id for move in moves}))
    snapshot = Snapshot("2026-01-02T03:04:07.089+00:00", "ann@example:/store", logs, kept_ids)
    kept = encode_snapshot(snapshot)
    statement = Statement(
        ref, moves[1].id, moves[1].previous, 3, "2026-01-02T03:04:07+00:00", "2036-01-02T03:04:07+00:00"
    )
    signature = encode_signature(Signature(statement, KEY, SIGNED))
    nodes = tuple(Member(f"{number:032x}", f"{number + 8:032x}", f"/node{number}") for number in (1, 2, 3))
    members = Members("f" * 32, 2, 2, nodes[:2], nodes[2:])
    return {
        FORMAT_FILE: FORMAT_TEXT,
        name_snapshot(snapshot, kept).key: kept,
        CARD_KEY: encode_card(Card(members.pool, nodes[0].id, nodes[0].life)),
        members_key(members.epoch): encode_members(members),
        "manifest.json": manifest,
        "manifest-delta.json": delta_manifest,
        pack_key(object_id(whole)): whole,
        pack_key(object_id(differences)): differences,
        "manifest-adopted.json": adopted_manifest,
        adopted_key(object_id(adopted)): adopted,
        pack_key(object_id(points)): points,
        pack_key(object_id(steps)): steps,
        f"{REFS}/{ref.name}/{ref.tag}/{signature_name(2, signature)}": signature,
        **{ref_key(move.ref, move.sequence): encode_entry(move) for move in moves},
    }


def write(folder: Path, *, force: bool) -> None:
    """Write the golden files; without `force`, a folder that has any is left as it is."""
    if folder.exists() and any(folder.iterdir()) and not force:
        raise SystemExit(f"{folder} exists; its bytes are a promise (--force to break it)")
    for name, data in build().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true")
    write(FOLDER, force=parser.parse_args().force)

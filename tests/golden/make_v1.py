"""Make the golden files of format version 1: a store of one pack and a ref that moved once, and its manifest as text.

    python tests/golden/make_v1.py            # refuses to touch a folder that has files
    python tests/golden/make_v1.py --force    # only before version 1 has been released

Later readers must read these bytes for ever, so the files are kept and never made again; a new version gets a new
folder and a new script. The values come from integer arithmetic, so that they are the same on every machine.
"""

import argparse
import random
import struct
from pathlib import Path

from llmos_cli.formats import codec, pack
from llmos_cli.formats.codec import OPAQUE, Words
from llmos_cli.formats.frame import CHUNK, MANIFEST, encode_header, new_frame
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.layout import FORMAT_FILE, FORMAT_TEXT, pack_key, ref_key
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest, Recipe, Source, encode_manifest
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry, encode_entry

FOLDER = Path(__file__).parent / "v1"


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


def manifest_of(files: dict[str, tuple[Words, list[bytes]]]) -> Manifest:
    entries = tuple(
        FileEntry(path, tuple(Chunk(object_id(chunk), len(chunk)) for chunk in chunks))
        for path, (_, chunks) in files.items()
    )
    source = Source("cat.txt", 3, object_id(b"cat"))
    recipe = Recipe("add", {"lr": 1e-05, "name": "é"}, {"data": object_id(b"data")}, (source,), 7, {"llmos": "0.1"})
    return Manifest("files", entries, {"counts": [1, None, True]}, recipe)


def build() -> dict[str, bytes]:
    """Every golden file by its path; only zstd payloads, and with them the pack's name, may differ between machines."""
    files = plain_files()
    first, manifest = encode_manifest(Manifest("report", ())), encode_manifest(manifest_of(files))
    chunks = [(CHUNK, chunk, words) for words, chunks in files.values() for chunk in chunks]
    body, entries = pack.pack_header(), []
    for kind, plain, words in [(MANIFEST, first, OPAQUE), *chunks, (MANIFEST, manifest, OPAQUE)]:
        encoded = codec.encode(memoryview(plain), words)
        frame = new_frame(kind, object_id(plain), len(plain), encoded)
        entries.append(pack.entry_of(frame, len(body)))
        body += b"".join([encode_header(frame), *map(bytes, encoded.parts)])
        body += pack.padding(len(body))
    whole = body + pack.pack_end(entries, len(body))
    ref = RefName("golden", "v1")
    moves = [
        RefEntry(ref, 1, object_id(first), None, "2026-01-02T03:04:05Z", "ann@example", ""),
        RefEntry(ref, 2, object_id(manifest), object_id(first), "2026-01-02T03:04:06Z", "ann@example", 'add: "é"\n'),
    ]
    return {
        FORMAT_FILE: FORMAT_TEXT,
        "manifest.json": manifest,
        pack_key(object_id(whole)): whole,
        **{ref_key(ref, move.sequence): encode_entry(move) for move in moves},
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

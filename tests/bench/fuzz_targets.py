"""The readers of bytes from outside, each as a function of arbitrary bytes, and sound bytes to start from.

Where a checksum would stop every mutation at the door, it is put right first. A target may raise LlmosError; what else
it raises is a finding. Run by tests.bench.fuzz_formats.
"""

import struct
from collections.abc import Callable, Sequence

from llmos_cli.errors import LlmosError
from llmos_cli.formats import canonical, codec, frame, manifest, names, pack, reflog
from llmos_cli.formats.ids import NO_ID, checksum, object_id
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest, Recipe
from llmos_cli.formats.names import RefName
from llmos_cli.formats.pickled import read_storages
from llmos_cli.formats.safetensors import encode_header, read_shard_index
from llmos_cli.formats.tensors import find_tensors
from tests.property.test_foreign import PICKLE, SOUND

Target = Callable[[bytes], object]
PLAIN = bytes(range(256)) * 16
BASE = bytes(value ^ (value >> 3 & 1) for value in PLAIN[:4000])
REF = RefName("model", "v1")


def fuzz_frame(data: bytes) -> None:
    head = data[:120].ljust(120, b"\0")
    found = frame.decode_header(head + struct.pack("<Q", checksum(head)))
    assert frame.encode_header(found)[:120] == head


def fuzz_payload(data: bytes) -> None:
    """codec, width, rotated, plain bytes, then the payload."""
    kind, width, rotated, size = struct.unpack("<BBBH", data[:5].ljust(5, b"\0"))
    out = bytearray(size)
    codec.decode(kind % 5, width, bool(rotated % 2), memoryview(data[5:]), memoryview(out), memoryview(BASE))


def fuzz_pack(data: bytes) -> None:
    """frames and the index's lines, to which a trailer with the right checksums is put."""
    count = data[0] if data else 0
    body = data[1:]
    lines = min(count, len(body) // pack.ENTRY_SIZE) * pack.ENTRY_SIZE
    frames, index = body[: len(body) - lines], body[len(body) - lines :]
    end = struct.pack("<Q I I Q 24x", pack.HEADER_SIZE + len(frames), lines // pack.ENTRY_SIZE, 1, checksum(index))
    whole = pack.pack_header() + frames + index + end + struct.pack("<Q8s", checksum(end), pack.END_MAGIC)
    for entry in pack.read_index(lambda start, end: whole[start:end], len(whole)):
        assert entry.offset + frame.HEADER_BYTES + entry.payload_size <= len(whole)
        found = pack.check_entry(entry, whole[entry.offset :][: frame.HEADER_BYTES])
        assert found.id == entry.id


def fuzz_raw_pack(data: bytes) -> None:
    pack.read_index(lambda start, end: data[start:end], len(data))


def fuzz_manifest(data: bytes) -> None:
    assert manifest.encode_manifest(manifest.decode_manifest(data)) == data


def fuzz_json(data: bytes) -> None:
    assert canonical.encode(canonical.decode(data, "x")) == data


def fuzz_foreign_json(data: bytes) -> None:
    canonical.loads(data, "x")


def fuzz_shard_index(data: bytes) -> None:
    read_shard_index(data, "x")


def fuzz_reflog(data: bytes) -> None:
    body, check, end = data, f"\n{checksum(data):016x}", "\n"
    whole = body + (check + end).encode()
    assert reflog.encode_entry(reflog.decode_entry(whole, REF, 1)) == whole


def fuzz_names(data: bytes) -> None:
    text = data.decode(errors="replace")
    for parse in (names.check_path, names.parse_ref, names.parse_target):
        try:
            parse(text)
        except LlmosError:
            continue


def fuzz_pickle(data: bytes) -> None:
    for storage in read_storages(data).values():
        assert storage.size >= 0


def fuzz_safetensors(data: bytes) -> None:
    """A header of the right length before 64 bytes of data."""
    place("m.safetensors", struct.pack("<Q", len(data)) + data + bytes(64))


def place(name: str, data: bytes) -> None:
    def read(start: int, end: int) -> bytes:
        assert 0 <= start <= end <= len(data)
        return data[start:end]

    at = 0
    for tensor in find_tensors(name, read, len(data), name) or ():
        assert at <= tensor.start <= tensor.end <= len(data)
        at = tensor.end


def foreign(name: str) -> Target:
    return lambda data: place(name, data)


def targets() -> dict[str, tuple[Target, Sequence[bytes]]]:
    """Every reader, and sound bytes for it."""
    head = frame.encode_header(
        frame.new_frame(
            frame.CHUNK, object_id(PLAIN), len(PLAIN), codec.encode(memoryview(PLAIN), codec.Words(2, True))
        )
    )
    every = (codec.OPAQUE, codec.Words(1), codec.Words(2, True), codec.Words(4), codec.Words(8, True))
    done = [codec.encode(memoryview(PLAIN), words) for words in every]
    done += [codec.encode_delta(memoryview(PLAIN), memoryview(BASE), words) for words in every if words.width]
    payloads = [
        struct.pack("<BBBH", one.codec, one.width, one.rotated, len(PLAIN)) + b"".join(one.parts) for one in done
    ]
    raw = codec.Encoded(codec.RAW, 0, False, (b"x" * 64,))
    entry = frame.new_frame(frame.CHUNK, object_id(b"x" * 64), 64, raw)
    framed = frame.encode_header(entry) + b"x" * 64
    line = pack.pack_end([pack.entry_of(entry, pack.HEADER_SIZE)], pack.HEADER_SIZE + len(framed))
    files = (FileEntry("a/b.bin", (Chunk(object_id(b"a"), 3), Chunk(object_id(b"b"), 9))), FileEntry("c", ()))
    whole = Manifest("model", files, {"k": [1, 2.5, None]}, Recipe("train", {"lr": 0.1}, {}, (), 7, {"torch": "2"}))
    text = manifest.encode_manifest(whole)
    move = reflog.encode_entry(reflog.RefEntry(REF, 1, object_id(b"a"), NO_ID, "2026-01-01T00:00:00Z", "me", "note"))
    json = b'{"weight_map":{"a":"m-1.safetensors"},"x":[1,-2.5,true,null,"\\u00e9"]}'
    return {
        "frame header": (fuzz_frame, [head[:120]]),
        "payloads": (fuzz_payload, payloads),
        "pack": (fuzz_pack, [b"\1" + framed + line[: pack.ENTRY_SIZE]]),
        "pack, raw": (fuzz_raw_pack, [pack.pack_header() + framed + line]),
        "manifest": (fuzz_manifest, [text]),
        "canonical JSON": (fuzz_json, [text, b'{"a":[1,2.5,"x",null,true,{}]}']),
        "foreign JSON": (fuzz_foreign_json, [json, text]),
        "shard index": (fuzz_shard_index, [json]),
        "reflog": (fuzz_reflog, [move.partition(b"\n")[0]]),
        "names": (fuzz_names, [b"a/b-1.x", b"name:tag~1", b"@0123abcd"]),
        "safetensors": (fuzz_safetensors, [encode_header([("a", "BF16", (4, 8))], {"k": "v"})[8:]]),
        "safetensors, raw": (foreign("m.safetensors"), [SOUND["m.safetensors"]]),
        "gguf": (foreign("m.gguf"), [SOUND["m.gguf"]]),
        "torch zip": (foreign("m.pt"), [SOUND["m.pt"]]),
        "torch pickle": (fuzz_pickle, [PICKLE]),
        "npy": (foreign("m.npy"), [SOUND["m.npy"]]),
        "npz": (foreign("m.npz"), [SOUND["m.npz"]]),
    }

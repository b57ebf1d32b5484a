"""A remote may lie. Whatever it says, nothing that is not proven becomes visible, and the error names it."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import Damaged, LlmosError, NotFound, Unsafe
from llmos_cli.formats import canonical, codec
from llmos_cli.formats.frame import CHUNK, HEADER_BYTES, MANIFEST, Frame, encode_header, new_frame
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.layout import pack_key
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest, encode_manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.formats.pack import Entry, entry_of, pack_end, pack_header, padding
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange.refs import RemoteRef, list_remote_refs, move_remote_ref
from llmos_cli.remote.transports.folder import FolderTransport
from llmos_cli.store.packs.packs import read_pack_index

Exchange = Any
Overwrite = Callable[[Path, bytes], None]


def framed(kind: int, plain: bytes, oid: ObjectId | None = None, **fields: Any) -> tuple[Frame, bytes]:
    """A frame and its payload, raw; `oid` and `fields` may lie."""
    encoded = codec.Encoded(codec.RAW, 0, False, (plain,))
    return replace(new_frame(kind, oid or object_id(plain), len(plain), encoded), **fields), plain


def packed(frames: Iterable[tuple[Frame, bytes]], edit: Callable[[list[Entry]], list[Entry]] = list) -> bytes:
    """A pack as its writer would make it; `edit` changes the index only."""
    data, entries = pack_header(), []
    for frame, payload in frames:
        entries.append(entry_of(frame, len(data)))
        data += encode_header(frame) + payload + padding(HEADER_BYTES + len(payload))
    return data + pack_end(edit(entries), len(data))


class Liar:
    """A remote made by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.transport = FolderTransport(root)
        self.transport.initialise()

    def put_pack(self, data: bytes, name: ObjectId | None = None) -> Path:
        path = self.root / pack_key(name or object_id(data))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def put_ref(self, oid: ObjectId) -> None:
        move_remote_ref(self.transport, RemoteRef(parse_ref("web")), oid, message="trust me")


@pytest.fixture
def liar(tmp_path: Path) -> Liar:
    return Liar(tmp_path / "nas")


def refused(exchange: Exchange, error: type[LlmosError], match: str) -> LlmosError:
    """Pull must fail, leave no ref, no temporary file and a clean store behind."""
    other = exchange.store("other")
    with pytest.raises(error, match=match) as caught:
        exchange.pull(other, "web")
    assert exchange.value(other, "web") is None
    assert exchange.problems(other) == []
    assert exchange.leftovers("other") == []
    return caught.value


PLAIN = b"the bytes of a chunk " * 100
OTHER = b"the bytes of another " * 100
MANIFEST_BYTES = encode_manifest(
    Manifest("files", (FileEntry("a.bin", (Chunk(object_id(PLAIN), len(PLAIN)),)),), {}, None)
)


def test_an_honest_pack_made_by_hand_is_taken(exchange: Exchange, liar: Liar) -> None:
    """Otherwise the refusals below would prove nothing."""
    liar.put_pack(packed([framed(CHUNK, PLAIN), framed(MANIFEST, MANIFEST_BYTES)]))
    liar.put_ref(object_id(MANIFEST_BYTES))
    other = exchange.store("other")
    exchange.pull(other, "web")
    assert exchange.files(other, "web") == {"a.bin": PLAIN}


def test_bytes_under_another_objects_id(exchange: Exchange, liar: Liar) -> None:
    """Header, checksum, index and pack name all agree; only the id does not follow from the bytes."""
    liar.put_pack(packed([framed(CHUNK, OTHER, object_id(PLAIN)), framed(MANIFEST, MANIFEST_BYTES)]))
    liar.put_ref(object_id(MANIFEST_BYTES))
    error = refused(exchange, Damaged, f"object {object_id(PLAIN).short} does not have the bytes its id names")
    assert str(liar.root) in error.message


def test_an_index_that_lies_about_an_id(exchange: Exchange, liar: Liar) -> None:
    def lie(entries: list[Entry]) -> list[Entry]:
        return [entries[0]._replace(id=object_id(PLAIN)), *entries[1:]]

    liar.put_pack(packed([framed(CHUNK, OTHER), framed(MANIFEST, MANIFEST_BYTES)], lie))
    liar.put_ref(object_id(MANIFEST_BYTES))
    refused(exchange, Damaged, "the index and the frame disagree")


def test_an_index_that_lies_about_a_size(exchange: Exchange, liar: Liar) -> None:
    def lie(entries: list[Entry]) -> list[Entry]:
        return [entries[0]._replace(plain_size=5), *entries[1:]]

    liar.put_pack(packed([framed(CHUNK, PLAIN), framed(MANIFEST, MANIFEST_BYTES)], lie))
    liar.put_ref(object_id(MANIFEST_BYTES))
    refused(exchange, Damaged, f"object {object_id(PLAIN).short}")


def test_a_manifest_that_is_another(exchange: Exchange, liar: Liar) -> None:
    named = object_id(b"never seen")
    liar.put_pack(packed([framed(CHUNK, PLAIN), framed(MANIFEST, MANIFEST_BYTES, named)]))
    liar.put_ref(named)
    refused(exchange, Damaged, f"object {named.short}")


def test_a_chunk_that_poses_as_a_manifest(exchange: Exchange, liar: Liar) -> None:
    liar.put_pack(packed([framed(CHUNK, MANIFEST_BYTES), framed(CHUNK, PLAIN)]))
    liar.put_ref(object_id(MANIFEST_BYTES))
    refused(exchange, Damaged, "is missing at")


def test_a_manifest_frame_that_is_none(exchange: Exchange, liar: Liar) -> None:
    liar.put_pack(packed([framed(MANIFEST, b"{}")]))
    liar.put_ref(object_id(b"{}"))
    refused(exchange, Damaged, "manifest")


def test_a_manifest_that_would_write_outside(exchange: Exchange, liar: Liar) -> None:
    value = canonical.decode(MANIFEST_BYTES, "manifest")
    value["files"][0]["path"] = "../../outside"  # type: ignore[index, call-overload]
    data = canonical.encode(value)
    liar.put_pack(packed([framed(CHUNK, PLAIN), framed(MANIFEST, data)]))
    liar.put_ref(object_id(data))
    assert refused(exchange, Unsafe, "outside").exit_code == 14


def test_a_manifest_that_lies_about_a_chunks_size(exchange: Exchange, liar: Liar) -> None:
    data = encode_manifest(Manifest("files", (FileEntry("a", (Chunk(object_id(PLAIN), 5),)),), {}, None))
    liar.put_pack(packed([framed(CHUNK, PLAIN), framed(MANIFEST, data)]))
    liar.put_ref(object_id(data))
    refused(exchange, Damaged, "does not have the 5 bytes")


def test_a_manifest_that_lies_about_a_chunk_that_is_here(exchange: Exchange, liar: Liar) -> None:
    data = encode_manifest(Manifest("files", (FileEntry("a", (Chunk(object_id(PLAIN), 5),)),), {}, None))
    liar.put_pack(packed([framed(MANIFEST, data)]))
    liar.put_ref(object_id(data))
    exchange.commit(exchange.store("other"), "own", a=PLAIN)
    refused(exchange, Damaged, "does not have the 5 bytes")


def test_a_junk_frame_in_a_pack_costs_only_the_pack_not_the_object(exchange: Exchange, liar: Liar) -> None:
    """What is needed is proven and taken; what is not needed and not true stays there."""
    liar.put_pack(
        packed(
            [
                framed(CHUNK, PLAIN),
                framed(MANIFEST, MANIFEST_BYTES),
                framed(CHUNK, b"x", object_id(b"y")),
                framed(MANIFEST, b"no manifest"),
            ]
        )
    )
    liar.put_ref(object_id(MANIFEST_BYTES))
    other = exchange.store("other")
    exchange.pull(other, "web")
    assert exchange.files(other, "web") == {"a.bin": PLAIN}
    assert {entry.id for path in exchange.packs("other") for entry in read_pack_index(path)[1]} == {
        object_id(PLAIN),
        object_id(MANIFEST_BYTES),
    }
    assert exchange.problems(other) == []


def test_a_pack_under_another_name_gives_only_what_is_proven(exchange: Exchange, liar: Liar) -> None:
    data = packed([framed(CHUNK, PLAIN), framed(MANIFEST, MANIFEST_BYTES)])
    liar.put_pack(data, object_id(b"another name"))
    liar.put_ref(object_id(MANIFEST_BYTES))
    other = exchange.store("other")
    exchange.pull(other, "web")
    assert exchange.files(other, "web") == {"a.bin": PLAIN}
    assert str(object_id(b"another name")) not in [path.stem for path in exchange.packs("other")]
    assert exchange.problems(other) == []


def test_a_second_copy_saves_a_damaged_object(exchange: Exchange, liar: Liar) -> None:
    liar.put_pack(packed([framed(CHUNK, OTHER, object_id(PLAIN)), framed(MANIFEST, MANIFEST_BYTES)]))
    liar.put_pack(packed([framed(CHUNK, PLAIN)]))
    liar.put_ref(object_id(MANIFEST_BYTES))
    other = exchange.store("other")
    exchange.pull(other, "web")
    assert exchange.files(other, "web") == {"a.bin": PLAIN}
    assert exchange.problems(other) == []


def test_every_flipped_bit_is_refused_or_without_effect(exchange: Exchange, liar: Liar, overwrite: Overwrite) -> None:
    honest = packed([framed(CHUNK, PLAIN), framed(MANIFEST, MANIFEST_BYTES)])
    path = liar.put_pack(honest)
    liar.put_ref(object_id(MANIFEST_BYTES))
    for number, position in enumerate(range(0, len(honest), 97)):
        data = bytearray(honest)
        data[position] ^= 1 << number % 8
        path.write_bytes(bytes(data))
        name = f"other{number}"
        other = exchange.store(name)
        try:
            exchange.pull(other, "web")
        except Damaged:
            assert exchange.value(other, "web") is None
        else:
            assert exchange.files(other, "web") == {"a.bin": PLAIN}
        assert exchange.problems(other) == []
        assert exchange.leftovers(name) == []


@pytest.mark.parametrize("keep", [0, 10, 64, 1000, -1])
def test_a_pack_cut_short(exchange: Exchange, liar: Liar, keep: int) -> None:
    data = packed([framed(CHUNK, PLAIN), framed(MANIFEST, MANIFEST_BYTES)])
    liar.put_pack(data[:keep], object_id(data))
    liar.put_ref(object_id(MANIFEST_BYTES))
    refused(exchange, Damaged, "is missing at .*, where 1 of its packs cannot be read")


def test_a_missing_pack(exchange: Exchange, liar: Liar) -> None:
    liar.put_pack(packed([framed(MANIFEST, MANIFEST_BYTES)]))
    liar.put_ref(object_id(MANIFEST_BYTES))
    refused(exchange, Damaged, f"object {object_id(PLAIN).short} is missing at .*nas")


def test_a_pack_that_is_listed_but_cannot_be_read(
    exchange: Exchange, liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ceph did (60771): HEAD finds it, GET does not."""
    data = packed([framed(CHUNK, PLAIN * 1000), framed(MANIFEST, MANIFEST_BYTES)])
    manifest = encode_manifest(
        Manifest("files", (FileEntry("a", (Chunk(object_id(PLAIN * 1000), len(PLAIN) * 1000),)),), {}, None)
    )
    liar.put_pack(data)
    liar.put_pack(packed([framed(MANIFEST, manifest)]))
    liar.put_ref(object_id(manifest))
    read = FolderTransport.read

    def lose(self: FolderTransport, key: str, start: int = 0, end: int | None = None) -> bytes:
        if end is not None and end - start > 100_000:
            raise NotFound(f"{key} is not at {self.url}")
        return read(self, key, start, end)

    monkeypatch.setattr(FolderTransport, "read", lose)
    refused(exchange, Damaged, "is missing at")


@pytest.mark.parametrize("move", [b"", b"\0" * 300, b"{}\n0000000000000000\n", b"x" * 20_000])
def test_a_ref_with_a_damaged_move_has_the_value_before(exchange: Exchange, liar: Liar, move: bytes) -> None:
    liar.put_pack(packed([framed(CHUNK, PLAIN), framed(MANIFEST, MANIFEST_BYTES)]))
    liar.put_ref(object_id(MANIFEST_BYTES))
    (liar.root / "refs/web/latest/0000000002").write_bytes(move)
    other = exchange.store("other")
    exchange.pull(other, "web")
    assert exchange.files(other, "web") == {"a.bin": PLAIN}
    (liar.root / "refs/web/latest/0000000001").write_bytes(move)
    with pytest.raises(Damaged, match="web:latest"):
        exchange.pull(other, "web")


def test_a_move_of_another_ref_is_refused(exchange: Exchange, liar: Liar) -> None:
    liar.put_ref(object_id(MANIFEST_BYTES))
    (liar.root / "refs/safe/latest").mkdir(parents=True)
    (liar.root / "refs/safe/latest/0000000001").write_bytes((liar.root / "refs/web/latest/0000000001").read_bytes())
    with pytest.raises(Damaged, match="another ref"):
        exchange.pull(exchange.store("other"), "safe")


def test_links_and_pipes_in_the_place_of_files_are_refused(exchange: Exchange, liar: Liar, tmp_path: Path) -> None:
    data = packed([framed(CHUNK, PLAIN), framed(MANIFEST, MANIFEST_BYTES)])
    (tmp_path / "elsewhere").write_bytes(data)
    path = liar.put_pack(data)
    liar.put_ref(object_id(MANIFEST_BYTES))
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    refused(exchange, Damaged, "is missing at")
    path.unlink()
    os.mkfifo(path)
    refused(exchange, Damaged, "is missing at")


def test_a_ref_folder_that_leads_outside_is_not_followed(liar: Liar, tmp_path: Path) -> None:
    (tmp_path / "outside/latest").mkdir(parents=True)
    (tmp_path / "outside/latest/0000000001").write_bytes(b"x")
    (liar.root / "refs/linked").symlink_to(tmp_path / "outside")
    (liar.root / "refs/-rf/..bad").mkdir(parents=True)
    (liar.root / "refs/-rf/..bad/0000000001").write_bytes(b"x")
    assert list_remote_refs(liar.transport, Silent()) == {}

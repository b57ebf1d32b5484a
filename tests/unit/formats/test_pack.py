"""A pack's index is checked as a whole before anything in it is believed. (Whole packs: tests/property/test_pack.py)"""

from collections.abc import Sequence

import pytest

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats import codec, limits, pack
from llmos_cli.formats.frame import CHUNK, HEADER_BYTES, MANIFEST
from llmos_cli.formats.ids import NO_ID, checksum, object_id
from llmos_cli.formats.pack import Entry

FIRST = Entry(object_id(b"1"), NO_ID, pack.HEADER_SIZE, 100, 100, CHUNK, codec.RAW, 0)
SECOND = Entry(object_id(b"2"), NO_ID, pack.aligned(FIRST.end), 64, 100, MANIFEST, codec.ZSTD, 0)
BODY = pack.aligned(SECOND.end)


def index_of(entries: Sequence[Entry], body: int = BODY, *, claimed: int | None = None) -> tuple[Entry, ...]:
    """What a reader makes of a pack with these index lines; the frames themselves are blank."""
    data = pack.pack_header() + bytes(body - pack.HEADER_SIZE)
    data += pack.pack_end(entries, body if claimed is None else claimed)
    return pack.read_index(lambda start, end: data[start:end], len(data))


def test_an_index_is_read_back() -> None:
    assert index_of([FIRST, SECOND]) == (FIRST, SECOND)
    assert index_of([], pack.HEADER_SIZE) == ()
    assert FIRST.stored_size == 256 + pack.ENTRY_SIZE


@pytest.mark.parametrize(
    "second",
    [
        SECOND._replace(offset=SECOND.offset + 64),
        SECOND._replace(offset=SECOND.offset - 64),
        SECOND._replace(offset=2**63),
        SECOND._replace(payload_size=SECOND.payload_size + 64),
        SECOND._replace(payload_size=0),
        SECOND._replace(plain_size=limits.CHUNK_BYTES + 1, kind=CHUNK),
        SECOND._replace(plain_size=limits.MANIFEST_BYTES + 1),
        SECOND._replace(depth=1),
        SECOND._replace(base=FIRST.id),
        SECOND._replace(codec=codec.DELTA),
        SECOND._replace(codec=codec.DELTA, base=FIRST.id, depth=limits.DELTA_DEPTH + 1),
    ],
    ids=["gap", "overlap", "far", "long", "short", "chunk", "manifest", "depth", "base", "no base", "too deep"],
)
def test_an_index_that_does_not_fit_is_damaged(second: Entry) -> None:
    with pytest.raises(Damaged):
        index_of([FIRST, second])


@pytest.mark.parametrize("entries", [[], [FIRST], [SECOND], [SECOND, FIRST], [FIRST, FIRST], [FIRST, SECOND, SECOND]])
def test_an_index_of_other_frames_is_damaged(entries: list[Entry]) -> None:
    with pytest.raises(Damaged):
        index_of(entries)


@pytest.mark.parametrize("claimed", [0, BODY - 64, BODY + 64, 2**64 - 1])
def test_an_index_that_lies_about_where_it_starts_is_damaged(claimed: int) -> None:
    with pytest.raises(Damaged):
        index_of([FIRST, SECOND], claimed=claimed)


@pytest.mark.parametrize("change", [{"kind": 3}, {"kind": 0}, {"codec": 5}])
def test_an_unknown_kind_or_codec_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(UnknownVersion):
        index_of([FIRST, SECOND._replace(**change)])


def test_a_newer_version_is_named_as_such() -> None:
    data = pack.pack_header() + pack.pack_end([], pack.HEADER_SIZE)
    newer = data[:8] + b"\2" + data[9:]
    with pytest.raises(UnknownVersion, match="version 2"):
        pack.read_index(lambda start, end: newer[start:end], len(newer))
    end = bytearray(data[pack.HEADER_SIZE :])
    end[12] = 2
    end[48:56] = checksum(end[:48]).to_bytes(8, "little")
    newer = data[: pack.HEADER_SIZE] + bytes(end)
    with pytest.raises(UnknownVersion, match="version 2"):
        pack.read_index(lambda start, end: newer[start:end], len(newer))


@pytest.mark.parametrize("size", [0, 127, limits.PACK_BYTES + 1, 2**63])
def test_a_size_no_pack_can_have_is_refused_unread(size: int) -> None:
    def read(_start: int, _end: int) -> bytes:
        raise AssertionError

    with pytest.raises(Damaged):
        pack.read_index(read, size)


def test_an_index_may_not_be_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PACK_FRAMES", 1)
    with pytest.raises(Damaged, match="limits"):
        index_of([FIRST, SECOND])


def test_a_file_that_shrinks_while_it_is_read_is_damaged() -> None:
    data = pack.pack_header() + bytes(BODY - pack.HEADER_SIZE) + pack.pack_end([FIRST, SECOND], BODY)
    for size in range(len(data)):
        with pytest.raises(Damaged):
            pack.read_index(lambda start, end, size=size: data[start : min(end, size)], len(data))


def test_padding_must_be_zero() -> None:
    assert [len(pack.padding(size)) for size in (0, 1, 63, 64, 65)] == [0, 63, 1, 0, 63]
    pack.check_padding(FIRST, bytes(28))
    with pytest.raises(Damaged, match=FIRST.id.short):
        pack.check_padding(FIRST, bytes(27) + b"\1")
    assert HEADER_BYTES % pack.ALIGNMENT == 0  # so that a raw payload lies aligned

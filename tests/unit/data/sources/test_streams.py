import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from llmos_cli.data.sources import streams
from llmos_cli.data.sources.streams import Unreadable, blocks, opened, unpacked
from llmos_cli.errors import NotFound, Unsafe

TEXT = "".join(f"line {number} of a text\n" for number in range(20_000)).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstandard.compress}


def pieces(data: bytes, size: int = 1000) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_what_was_packed_comes_back(packing: str, size: int) -> None:
    text = TEXT[:5000] if size == 1 else TEXT
    data = PACK[packing](text)
    assert b"".join(unpacked(pieces(data, size), packing, len(data))) == text


@pytest.mark.parametrize("packing", PACK)
def test_files_that_were_joined_are_read_to_the_end(packing: str) -> None:
    data = PACK[packing](b"one\n") + PACK[packing](TEXT)
    assert b"".join(unpacked(pieces(data), packing, len(data))) == b"one\n" + TEXT


def test_zeros_after_the_last_gzip_member_are_padding() -> None:
    data = gzip.compress(TEXT) + b"\0" * 3000
    assert b"".join(unpacked(pieces(data), "gzip", len(data))) == TEXT


@pytest.mark.parametrize("packing", PACK)
def test_what_ends_too_soon_or_is_damaged_is_told(packing: str) -> None:
    data = PACK[packing](TEXT)
    with pytest.raises(Unreadable, match=r"ends|damaged"):
        list(unpacked(pieces(data[:-20]), packing, len(data)))
    with pytest.raises(Unreadable, match="damaged"):
        list(unpacked(pieces(b"not packed at all" * 10), packing, 170))


@pytest.mark.parametrize("packing", PACK)
def test_a_bomb_is_refused_once_it_is_seen_to_be_one(packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SMALL_BYTES", 1 << 20)
    data = PACK[packing](bytes(64 << 20))
    come: list[int] = []
    with pytest.raises(Unreadable, match="unpacks to more than"):
        come.extend(map(len, unpacked(pieces(data), packing, len(data))))
    assert sum(come) <= max(1 << 20, streams.MOST_TIMES * len(data))


def test_a_gzip_block_is_bounded_however_much_comes_of_a_byte() -> None:
    data = zlib.compress(bytes(8 << 20), 9, 31)
    assert max(map(len, unpacked(iter([data]), "gzip", len(data)))) <= streams.BLOCK


def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Unsafe, match="not a regular file"):
        opened(tmp_path / "pipe")
    with pytest.raises(NotFound):
        opened(tmp_path / "gone")


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(TEXT)
    with opened(tmp_path / "a") as stream:
        stream.seek(10)
        assert b"".join(blocks(stream, tmp_path / "a", 25)) == TEXT[10:35]
        assert b"".join(blocks(stream, tmp_path / "a")) == TEXT[35:]

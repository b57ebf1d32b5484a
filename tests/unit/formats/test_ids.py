"""Ids, prefixes and checksums."""

import pytest
from blake3 import blake3

from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.ids import IdHasher, ObjectId, checksum, object_id, parse_id, parse_prefix


def test_an_id_is_the_blake3_of_the_plain_bytes() -> None:
    oid = object_id(b"")
    assert str(oid) == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262" == blake3(b"").hexdigest()
    assert oid.short == "af1349b9f5f9"
    assert parse_id(str(oid)) == oid
    hasher = IdHasher()
    for part in (b"ab", bytearray(b"c"), memoryview(b"de")):
        hasher.update(part)
    assert hasher.id() == object_id(b"abcde")


@pytest.mark.parametrize("text", ["", "ab", "A" * 64, "g" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", None, 7, ["a"]])
def test_anything_but_64_lower_case_digits_is_no_id(text: object) -> None:
    with pytest.raises(Damaged):
        parse_id(text)


def test_an_id_has_32_bytes() -> None:
    with pytest.raises(Damaged):
        ObjectId(bytes(31))


def test_prefixes_as_a_user_types_them() -> None:
    assert parse_prefix("AF13") == "af13"
    for text in ("", "abc", "xyzw", "a" * 65, "abcd\n", "../../etc"):
        with pytest.raises(UsageError):
            parse_prefix(text)
    with pytest.raises(UsageError) as caught:
        parse_prefix("x" * 10_000)
    assert len(caught.value.message) < 200


def test_a_checksum_does_not_care_how_its_bytes_are_cut() -> None:
    assert checksum(b"abc", b"", memoryview(b"def")) == checksum(b"abcdef") == 0xDA87BD32D3C47DB6
    assert checksum(b"") == checksum() == 0x2D06800538D394C2

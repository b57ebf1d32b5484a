"""The FORMAT file and where things lie."""

import pytest

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.layout import FORMAT_TEXT, check_format, pack_key, ref_key
from llmos_cli.formats.names import RefName


def test_this_version_is_accepted() -> None:
    check_format(FORMAT_TEXT)


@pytest.mark.parametrize("text", [b"llmos 2\n", b"llmos 10\n", b"llmos 1.1\n", b"llmos 2+delta\n"])
def test_another_version_is_refused_as_such(text: bytes) -> None:
    with pytest.raises(UnknownVersion, match="the unknown format"):
        check_format(text)


@pytest.mark.parametrize(
    "text",
    [b"llmos 1", b"llmos 1\r\n", b"llmos 1\n\n", b" llmos 1\n", b"llmos  1\n", b"llmos \n", b"LLMOS 1\n", bytes(8),
     b"llmos " + b"9" * 99 + b"\n", b"llmos \x1b[2J\n", b"repository 1\n"],
)  # fmt: skip
def test_anything_else_is_damaged(text: bytes) -> None:
    with pytest.raises(Damaged) as caught:
        check_format(text)
    assert not isinstance(caught.value, UnknownVersion)


def test_every_truncation_and_every_flipped_bit_is_refused() -> None:
    for size in range(len(FORMAT_TEXT)):
        with pytest.raises(Damaged):
            check_format(FORMAT_TEXT[:size])
    for bit in range(8 * len(FORMAT_TEXT)):
        flipped = bytearray(FORMAT_TEXT)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            check_format(bytes(flipped))


def test_keys() -> None:
    oid = object_id(b"")
    assert pack_key(oid) == f"packs/af/{oid}.pack"
    assert ref_key(RefName("web", "v1"), 3) == "refs/web/v1/0000000003"

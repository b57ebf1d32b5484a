"""A ref's moves: an entry is whole and in its own place, or it is refused."""

import json

import pytest

from llmos_cli.errors import Damaged, UnknownVersion, UsageError
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.ids import checksum, object_id
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry, decode_entry, encode_entry, entry_name, parse_entry_name

REF = RefName("model", "v1")
ENTRY = RefEntry(REF, 2, object_id(b"new"), object_id(b"old"), "2026-01-02T03:04:05Z", "ann@host", "train: step 100")
DATA = encode_entry(ENTRY)


def sealed(**changes: object) -> bytes:
    value = json.loads(DATA.split(b"\n")[0]) | changes
    body = canonical.encode({key: item for key, item in value.items() if item is not ...})
    return body + f"\n{checksum(body):016x}\n".encode()


def test_a_move_is_read_back() -> None:
    assert decode_entry(DATA, REF, 2) == ENTRY
    assert sealed() == DATA


def test_every_truncation_and_every_flipped_bit_is_damaged() -> None:
    for size in range(len(DATA)):
        for cut in (DATA[:size], DATA[:size] + bytes(len(DATA) - size)):
            with pytest.raises(Damaged):
                decode_entry(cut, REF, 2)
    for bit in range(8 * len(DATA)):
        flipped = bytearray(DATA)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            decode_entry(bytes(flipped), REF, 2)
    with pytest.raises(Damaged):
        decode_entry(DATA + b"\n", REF, 2)


@pytest.mark.parametrize(("ref", "sequence"), [(REF, 1), (REF, 3), (RefName("model"), 2), (RefName("v1", "model"), 2)])
def test_a_move_copied_to_another_place_is_damaged(ref: RefName, sequence: int) -> None:
    with pytest.raises(Damaged, match=str(ref)):
        decode_entry(DATA, ref, sequence)


@pytest.mark.parametrize(
    "changes",
    [{"id": "x"}, {"id": None}, {"previous": 0}, {"previous": ...}, {"extra": 1}, {"message": 1}, {"who": None},
     {"time": []}, {"sequence": 2.0}, {"sequence": "2"}, {"version": True}, {"version": 1.0}, {"version": None},
     {"message": "x" * limits.REF_FILE_BYTES}],
    ids=lambda changes: str(changes)[:30],
)  # fmt: skip
def test_a_sealed_move_with_a_wrong_field_is_damaged_and_named(changes: dict[str, object]) -> None:
    with pytest.raises(Damaged, match=r"ref model:v1 \(move 2\)"):
        decode_entry(sealed(**changes), REF, 2)


def test_a_newer_version_is_named_as_such() -> None:
    with pytest.raises(UnknownVersion):
        decode_entry(sealed(version=2, more="fields"), REF, 2)


@pytest.mark.parametrize("message", ["x" * limits.REF_FILE_BYTES, "add: \udcff"], ids=["too long", "not Unicode"])
def test_a_message_that_could_not_be_read_back_is_not_written(message: str) -> None:
    with pytest.raises(UsageError):
        encode_entry(RefEntry(REF, 2, ENTRY.id, None, "", "", message))


def test_names_of_moves_sort_as_their_numbers() -> None:
    assert [entry_name(number) for number in (1, 20)] == ["0000000001", "0000000020"]
    assert parse_entry_name("0000000020") == 20
    for name in ("", "20", "00000000020", "000000002x", ".tmp-0000", "+000000020", "٠٠٠٠٠٠٠٠٢٠", "0000000020\n"):
        assert parse_entry_name(name) is None

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.errors import Damaged, UnknownVersion, UsageError
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry, encode_entry
from llmos_cli.formats.signature import Signature, Statement, encode_signature
from llmos_cli.formats.snapshot import (
    Snapshot,
    SnapshotName,
    decode_snapshot,
    encode_snapshot,
    name_snapshot,
    parse_snapshot_name,
)

ONE, TWO = object_id(b"1"), object_id(b"2")
WEB, TINY = RefName("web"), RefName("tiny", "int8")
TIME = "2026-11-25T03:23:12.007+00:00"


def move(ref: RefName, sequence: int, oid: ObjectId, previous: ObjectId | None) -> RefEntry:
    return RefEntry(ref, sequence, oid, previous, "2026-11-24T00:00:00+00:00", "ann@host", 'add "é"\n')


SNAPSHOT = Snapshot(
    TIME,
    "ann@host:/store",
    {TINY: (move(TINY, 1, ONE, None),), WEB: (move(WEB, 3, ONE, TWO), move(WEB, 7, TWO, ONE))},
    tuple(sorted((ONE, TWO))),
)


def test_it_comes_back_as_it_was_and_the_moves_byte_for_byte() -> None:
    data = encode_snapshot(SNAPSHOT)
    name = name_snapshot(SNAPSHOT, data)
    assert str(name) == f"20261125T032312.007Z-{object_id(data)}"
    assert parse_snapshot_name(str(name)) == name
    back = decode_snapshot(data, name)
    assert back == SNAPSHOT
    assert [encode_entry(entry) for entry in back.refs[WEB]] == [encode_entry(entry) for entry in SNAPSHOT.refs[WEB]]


def test_names_sort_by_time_and_odd_ones_are_nothing() -> None:
    names = [SnapshotName(f"2026112{day}T000000.000Z", ONE) for day in (3, 1, 2)]
    assert [name.moment.day for name in sorted(names)] == [21, 22, 23]
    digits = "0" * 64
    for odd in ("", "README", f"20261125T032312.007Z-{digits[1:]}", f"20261325T032312.007Z-{digits}", f"2026-{digits}"):
        assert parse_snapshot_name(odd) is None


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    table = json.loads(encode_snapshot(SNAPSHOT))
    change(table)
    return canonical.encode(table)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.pop("source"),
        lambda table: table.update(more=1),
        lambda table: table.update(version=True),
        lambda table: table.update(time="yesterday"),
        lambda table: table.update(time="2026-11-25T03:23:12.008+00:00"),
        lambda table: table.update(refs=[]),
        lambda table: table.update(refs={"../x:y": table["refs"]["web:latest"]}),
        lambda table: table["refs"].update({"web:latest": []}),
        lambda table: table["refs"]["web:latest"].reverse(),
        lambda table: table["refs"]["web:latest"][0].update(sequence="3"),
        lambda table: table["refs"]["web:latest"][0].update(id="00"),
        lambda table: table["refs"]["web:latest"][0].pop("who"),
        lambda table: table["manifests"].reverse(),
        lambda table: table["manifests"].append(table["manifests"][1]),
        lambda table: table["manifests"].clear(),
        lambda table: table["manifests"].__setitem__(0, 7),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    data = changed(change)
    with pytest.raises(Damaged, match=r"snapshot 20261125T032312\.007Z"):
        decode_snapshot(data, SnapshotName("20261125T032312.007Z", object_id(data)))


def signed(change: Callable[[dict[str, Any]], object] = lambda table: None) -> bytes:
    value = encode_signature(Signature(Statement(WEB, TWO, ONE, 7, TIME), "a" * 64, bytes(64)))
    table = json.loads(encode_snapshot(replace(SNAPSHOT, signatures={WEB: ((3, value), (7, value))})))
    change(table)
    return canonical.encode(table)


def test_signatures_come_back_as_they_were() -> None:
    data = signed()
    back = decode_snapshot(data, SnapshotName("20261125T032312.007Z", object_id(data)))
    assert encode_snapshot(back) == data
    assert [number for number, _ in back.signatures[WEB]] == [3, 7]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.update(version=1),
        lambda table: table.pop("signatures"),
        lambda table: table.update(signatures={}),
        lambda table: table.update(signatures={"other:latest": table["signatures"]["web:latest"]}),
        lambda table: table.update(signatures={"tiny:latest": table["signatures"]["web:latest"]}),
        lambda table: table["signatures"].update({"web:latest": []}),
        lambda table: table["signatures"]["web:latest"].reverse(),
        lambda table: table["signatures"]["web:latest"][0].append(1),
        lambda table: table["signatures"]["web:latest"][0].__setitem__(0, "3"),
        lambda table: table["signatures"]["web:latest"][0][1].pop("key"),
        lambda table: table["signatures"]["web:latest"][0][1].update(more="x" * 9999),
    ],
)
def test_signatures_that_do_not_fit_are_refused(change: Callable[[dict[str, Any]], object]) -> None:
    data = signed(change)
    with pytest.raises(Damaged, match=r"snapshot 20261125T032312\.007Z"):
        decode_snapshot(data, SnapshotName("20261125T032312.007Z", object_id(data)))


def test_another_version_is_named() -> None:
    data = changed(lambda table: table.update(version=3))
    with pytest.raises(UnknownVersion, match="unknown version 3"):
        decode_snapshot(data, SnapshotName("20261125T032312.007Z", object_id(data)))


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_no_bit_flips_unnoticed(at: int, bit: int) -> None:
    data = bytearray(encode_snapshot(SNAPSHOT))
    name = name_snapshot(SNAPSHOT, bytes(data))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(Damaged, match="does not have the bytes its name stands for"):
        decode_snapshot(bytes(data), name)


def test_more_than_a_reader_takes_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SNAPSHOT_BYTES", 100)
    with pytest.raises(UsageError, match="more than a snapshot may hold"):
        encode_snapshot(SNAPSHOT)

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.ids import checksum
from llmos_cli.formats.pool import (
    Card,
    Member,
    Members,
    decode_card,
    decode_members,
    encode_card,
    encode_members,
    members_key,
    new_id,
    parse_members_key,
)

MEMBERS = Members(new_id(), 4, 2, tuple(sorted(Member(new_id(), new_id(), f"/mnt/é{n}") for n in range(3))))
CARD = Card(MEMBERS.pool, new_id(), new_id())


def sealed(body: bytes) -> bytes:
    return body + b"\n%016x\n" % checksum(body)


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    table = json.loads(encode_members(MEMBERS).split(b"\n")[0])
    change(table)
    return sealed(canonical.encode(table))


def test_they_come_back_as_they_were() -> None:
    assert decode_card(encode_card(CARD)) == CARD
    assert decode_members(encode_members(MEMBERS), 4) == MEMBERS
    assert parse_members_key(members_key(4)) == 4
    assert [parse_members_key(key) for key in ("pool/members/4", "pool/node", "refs/a/b/0000000004")] == [None] * 3


@pytest.mark.parametrize(("nodes", "majority"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_a_majority_is_more_than_half(nodes: int, majority: int) -> None:
    assert Members("", 1, 1, tuple(Member(str(n), "", "") for n in range(nodes))).majority == majority


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_no_bit_flips_unnoticed(at: int, bit: int) -> None:
    for whole, decode in ((encode_card(CARD), decode_card), (encode_members(MEMBERS), lambda d: decode_members(d, 4))):
        data = bytearray(whole)
        data[at % len(data)] ^= 1 << bit
        with pytest.raises(Damaged):
            decode(bytes(data))
        with pytest.raises(Damaged):
            decode(whole[: at % len(whole)])


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.pop("pool"),
        lambda table: table.update(more=1),
        lambda table: table.update(epoch=5),
        lambda table: table.update(replicas=0),
        lambda table: table.update(replicas="2"),
        lambda table: table.update(replicas=limits.POOL_NODES + 1),
        lambda table: table.update(nodes=[]),
        lambda table: table["nodes"].reverse(),
        lambda table: table["nodes"].append(table["nodes"][-1]),
        lambda table: table["nodes"][0].pop("life"),
        lambda table: table["nodes"][0].update(id="../x"),
        lambda table: table["nodes"][0].update(url=7),
        lambda table: table.pop("renewed"),
        lambda table: table.update(renewed=table["nodes"][:1]),
        lambda table: table.update(renewed={}),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(Damaged):
        decode_members(changed(change), 4)


def test_another_version_is_named() -> None:
    with pytest.raises(UnknownVersion, match="unknown version 2"):
        decode_members(changed(lambda table: table.update(version=2)), 4)

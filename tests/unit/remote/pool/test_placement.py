from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.remote.pool.placement import homes, ranked

NODES = st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), min_size=1, max_size=12, unique=True)
PACKS = st.binary(min_size=32, max_size=32).map(ObjectId)


def nodes(count: int) -> list[str]:
    return [f"{number:032x}" for number in range(count)]


def packs(count: int) -> list[ObjectId]:
    return [object_id(b"%d" % number) for number in range(count)]


@given(PACKS, NODES, st.integers(1, 14))
def test_a_pack_has_as_many_homes_as_there_should_be_copies(pack: ObjectId, members: list[str], replicas: int) -> None:
    found = homes(pack, members, replicas)
    assert len(found) == len(set(found)) == min(replicas, len(members))
    assert set(found) <= set(members)


@given(PACKS, NODES, st.randoms())
def test_places_do_not_depend_on_the_order_of_nodes(pack: ObjectId, members: list[str], dice: object) -> None:
    shuffled = list(members)
    dice.shuffle(shuffled)  # type: ignore[attr-defined]
    assert ranked(pack, members) == ranked(pack, shuffled)


@given(PACKS, NODES.filter(lambda found: len(found) > 1), st.integers(1, 4), st.data())
def test_a_node_that_goes_changes_only_what_it_had(
    pack: ObjectId, members: list[str], replicas: int, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(members))
    before = homes(pack, members, replicas)
    after = homes(pack, [node for node in members if node != gone], replicas)
    assert [node for node in before if node != gone] == after[: len(before) - (gone in before)]


def test_places_are_the_same_on_every_machine() -> None:
    """Written down once: a change would move every pool's data."""
    assert ranked(object_id(b"pack"), nodes(5)) == [f"{number:032x}" for number in (0, 2, 1, 4, 3)]


def test_each_node_gets_its_share() -> None:
    """N packs, R copies, M nodes: about K = N*R/M; five standard deviations of a binomial are allowed."""
    for count, replicas in ((3, 2), (5, 3), (12, 2)):
        held = Counter(node for pack in packs(4000) for node in homes(pack, nodes(count), replicas))
        share = 4000 * replicas / count
        spread = 5 * (share * (1 - replicas / count)) ** 0.5
        assert all(abs(held[node] - share) < spread for node in nodes(count)), held


def test_a_node_that_comes_gets_its_share_and_nothing_else_moves() -> None:
    old, new, replicas = nodes(5), nodes(6), 2
    moved: Counter[int] = Counter()
    for pack in packs(3000):
        before, after = set(homes(pack, old, replicas)), set(homes(pack, new, replicas))
        assert after - before <= {new[-1]}
        moved[len(after - before)] += 1
    assert 0.8 / 6 < moved[1] / (3000 * replicas) < 1.2 / 6

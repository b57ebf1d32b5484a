"""Agreeing on a value: the nodes keep files in memory, so that many interleavings can be tried."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from llmos_cli.errors import LlmosError, NotFound, RemoteUnavailable
from llmos_cli.formats.ids import ObjectId, checksum
from llmos_cli.progress import Task
from llmos_cli.remote.pool.ballot import decide, forget_votes, learn, pending
from llmos_cli.remote.transports.transport import check_key

KEY = "refs/web/latest/0000000001"


class Died(BaseException):
    """The process that makes the calls is gone."""


class Node:
    """A node that keeps files in memory. `before` is called ahead of each call with the call's name."""

    def __init__(self, name: str, before: Callable[[str], None] = lambda call: None) -> None:
        self.url = name
        self.files: dict[str, bytes] = {}
        self.before = before
        self._lock = threading.Lock()

    def initialise(self) -> None:
        raise NotImplementedError

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        self.before("list")
        with self._lock:
            return iter([(key, len(data)) for key, data in self.files.items() if key.startswith(prefix)])

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.before("read")
        with self._lock:
            if key not in self.files:
                raise NotFound(f"{key} is not at {self.url}")
            return self.files[key][start:end]

    def size(self, key: str) -> int | None:
        self.before("size")
        with self._lock:
            return len(self.files[key]) if key in self.files else None

    def put_file(self, key: str, path: Path, name: ObjectId, task: Task) -> None:
        raise NotImplementedError

    def create(self, key: str, data: bytes) -> bool:
        self.before("create")
        with self._lock:
            return self.files.setdefault(check_key(key), data) is data

    def delete(self, key: str) -> None:
        self.before("delete")
        with self._lock:
            self.files.pop(key, None)


def no_fence(node: object) -> None:
    pass


def make(count: int) -> dict[str, Node]:
    return {f"n{number}": Node(f"n{number}") for number in range(count)}


def move(nodes: dict[str, Node], value: bytes | None, quorum: int | None = None) -> bytes | None:
    """What a pool does: decide, learn, forget."""
    majority = quorum or len(nodes) // 2 + 1
    chosen = decide(nodes, majority, KEY, value, no_fence)
    if chosen is not None:
        has = {name for name, answer in learn(nodes, KEY, chosen).items() if answer is True}
        if len(has) < majority:
            raise RemoteUnavailable("too few have learned it")
        forget_votes({name: nodes[name] for name in has}, KEY)
    return chosen


def values(nodes: dict[str, Node]) -> set[bytes]:
    return {node.files[KEY] for node in nodes.values() if KEY in node.files}


def test_one_mover_gets_its_value_everywhere_and_leaves_no_votes() -> None:
    nodes = make(3)
    assert move(nodes, b"mine") == b"mine"
    assert [node.files for node in nodes.values()] == [{KEY: b"mine"}] * 3
    assert move(nodes, b"yours") == b"mine"
    assert pending(nodes) == set()


def test_a_minority_may_be_away_and_a_majority_may_not() -> None:
    nodes = make(5)

    def away(call: str) -> None:
        raise RemoteUnavailable("it is away")

    nodes["n0"].before = nodes["n3"].before = away
    assert move(nodes, b"mine") == b"mine"
    nodes = make(4)
    nodes["n0"].before = nodes["n3"].before = away
    with pytest.raises(RemoteUnavailable, match=r"needs 3 nodes of the pool to agree, and 2 of 4 answer: it is away"):
        move(nodes, b"mine")
    assert values(nodes) == set()


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_of_many_racers_one_wins_and_all_learn_who(count: int) -> None:
    for seed in range(6):
        dice = random.Random(seed)
        nodes = make(count)
        for node in nodes.values():
            node.before = lambda call, dice=dice: time.sleep(dice.random() / 2000)
        with ThreadPoolExecutor(6) as pool:
            seen = set(pool.map(partial(move, nodes), [b"%d" % me for me in range(6)]))
        assert len(seen) == 1
        assert values(nodes) == seen


def test_racers_that_see_different_majorities_agree() -> None:
    """Each mover reaches only a majority, and each another one."""
    for seed in range(30):
        dice = random.Random(seed)
        nodes = make(5)
        for node in nodes.values():
            node.before = lambda call, dice=dice: time.sleep(dice.random() / 3000)
        parts = [dict(dice.sample(sorted(nodes.items()), 3)) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            seen = set(pool.map(move, parts, [b"%d" % me for me in range(4)], [3] * 4))
        assert len(seen) == 1
        assert values(nodes) == seen


def test_a_mover_that_dies_at_any_call_leaves_what_the_next_one_completes() -> None:
    """After each death somebody else moves; whatever any node had learned by then is what all have in the end."""
    outcomes = set()
    for deadly in range(1, 200):
        nodes = make(3)
        calls, lock = [0], threading.Lock()

        def count(call: str, calls: list[int] = calls, lock: threading.Lock = lock, deadly: int = deadly) -> None:
            with lock:
                calls[0] += 1
                if calls[0] >= deadly:
                    raise Died

        for node in nodes.values():
            node.before = count
        try:
            move(nodes, b"first")
            finished = True
        except Died:
            finished = False
        for node in nodes.values():
            node.before = lambda call: None
        learned = values(nodes)
        after = move(nodes, b"second")
        assert after in (b"first", b"second")
        assert not learned or learned == {after}, f"death at call {deadly} lost a value that readers may have seen"
        assert values(nodes) == {after}
        assert pending(nodes) == set()
        outcomes.add(after)
        if finished:
            break
    assert finished, "the sweep went through every call"
    assert outcomes == {b"first", b"second"}


@pytest.mark.parametrize("count", [3, 4, 5])
def test_nodes_that_die_between_the_calls_never_split_the_value(count: int) -> None:
    """Any minority dies for good, each node at a moment of its own, while three movers race."""
    for seed in range(25):
        dice = random.Random(seed)
        nodes = make(count)
        for name in dice.sample(sorted(nodes), (count - 1) // 2):
            left = [dice.randrange(0, 14)]

            def fail(call: str, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise RemoteUnavailable("it has died")

            nodes[name].before = fail
        with ThreadPoolExecutor(3) as pool:
            seen = set(pool.map(partial(move, nodes), [b"%d" % me for me in range(3)]))
        assert len(seen) == 1
        assert values(nodes) == seen, "a node that died may have learned nothing, or the same"


def test_completing_what_others_left_proposes_nothing() -> None:
    nodes = make(3)
    assert move(nodes, None) is None
    assert values(nodes) == set()
    vote = f"pool/votes/{KEY}.0000000007.{'a' * 32}.2"
    nodes["n1"].files[vote] = b"%016x\nleft" % 0  # its checksum is wrong: it was never written to its end
    assert move(nodes, None) is None
    nodes["n1"].files[vote] = b"%016x\nleft" % checksum(b"left")
    assert pending(nodes) == {KEY}
    assert move(nodes, None) == b"left"
    assert values(nodes) == {b"left"}


def test_of_values_that_were_left_the_one_of_the_highest_ballot_may_have_been_chosen() -> None:
    nodes = make(3)
    for name, number, value in (("n0", 3, b"old"), ("n1", 5, b"new"), ("n2", 4, b"old")):
        vote = f"pool/votes/{KEY}.{number:010d}.{'a' * 32}.2"
        nodes[name].files[vote] = b"%016x\n" % checksum(value) + value
    assert move(nodes, b"mine") == b"new"


def test_a_node_behind_the_fence_has_no_vote() -> None:
    nodes = make(3)

    def fence(node: object) -> None:
        if node is not nodes["n0"]:
            raise RemoteUnavailable("it has been emptied")

    with pytest.raises(RemoteUnavailable, match="needs 2 nodes"):
        decide(nodes, 2, KEY, b"mine", fence)


def test_a_silent_node_is_not_waited_for() -> None:
    nodes = make(3)
    wake = threading.Event()
    nodes["n2"].before = lambda call: wake.wait(60) and None
    assert decide(nodes, 2, KEY, b"mine", no_fence, stall=0.2) == b"mine"
    wake.set()


def test_a_bug_is_not_taken_for_a_node_that_is_away() -> None:
    nodes = make(3)

    def broken(call: str) -> None:
        raise ZeroDivisionError

    nodes["n1"].before = broken
    with pytest.raises(ZeroDivisionError):
        decide(nodes, 2, KEY, b"mine", no_fence)


def test_errors_of_nodes_are_told() -> None:
    nodes = make(2)

    def refuse(call: str) -> None:
        raise LlmosError("permission denied at n1", hint="look at its rights")

    nodes["n1"].before = refuse
    with pytest.raises(RemoteUnavailable, match="permission denied at n1") as caught:
        move(nodes, b"mine")
    assert caught.value.hint == "look at its rights"

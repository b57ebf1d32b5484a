"""Pools of folders: nodes go, come back empty, rot, fall silent, and lose the race against each other."""

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from llmos_cli.errors import Conflict, LlmosError, NotFound, RemoteUnavailable, Unsafe, UsageError
from llmos_cli.formats.ids import ObjectId, checksum, parse_id
from llmos_cli.formats.names import parse_ref
from llmos_cli.formats.pool import CARD_KEY
from llmos_cli.formats.reflog import RefEntry, encode_entry
from llmos_cli.progress import Silent, Task
from llmos_cli.remote.exchange.pull import execute_pull, plan_pull
from llmos_cli.remote.exchange.push import execute_push, plan_push
from llmos_cli.remote.exchange.refs import list_remote_refs, move_remote_ref, read_remote_ref
from llmos_cli.remote.open import Remote, open_transport
from llmos_cli.remote.pool.ballot import pending
from llmos_cli.remote.pool.heal import Healed, drain, execute_heal, fill_keys, plan_heal
from llmos_cli.remote.pool.members import create_pool, find_pool, let_go, let_in, open_pool
from llmos_cli.remote.pool.pool import PoolTransport, shortfall, tolerate
from llmos_cli.remote.pool.pools import PoolRemote, find_nodes
from llmos_cli.remote.pool.scrub import look, scrub
from llmos_cli.remote.transports.folder import FolderTransport
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.handle import Store

Exchange = Any
Overwrite = Callable[[Path, bytes], None]


@dataclass
class Pool:
    """A pool of folders as tests use it. Every `open` begins anew, as every command does; `wrap` stands between it and
    the nodes."""

    exchange: Exchange
    folder: Path
    warnings: list[str] = field(default_factory=list)
    wrap: Callable[[FolderTransport], Transport] = lambda node: node
    stall: float = 20.0

    def make(self, count: int, replicas: int) -> "Pool":
        self.folder.mkdir()
        create_pool([str(self.folder / f"n{number}") for number in range(count)], replicas, self.opener, self.warn)
        return self

    def opener(self, url: str) -> Transport:
        return self.wrap(FolderTransport(Path(url)))

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    @property
    def roots(self) -> list[Path]:
        return sorted(self.folder.glob("n*"))

    def open(self, *urls: str) -> PoolTransport:
        found = urls or [
            str(self.folder / f"n{number}") for number in range(9) if (self.folder / f"n{number}").exists()
        ]
        return open_pool(list(found), self.opener, self.warn, stall=self.stall)

    def remote(self) -> Remote:
        return Remote("pool", self.open())

    def push(self, store: Store, *refs: str, remote: Remote | None = None) -> None:
        remote = remote or self.remote()
        plan = plan_push(store, remote, [parse_ref(ref) for ref in refs] or None, force=False)
        execute_push(store, remote, plan, Silent())

    def pull(self, store: Store, remote: Remote | None = None) -> None:
        remote = remote or self.remote()
        execute_pull(store, remote, plan_pull(store, remote, None, force=False), Silent())

    def heal(self, store: Store, *, quick: bool = False) -> Healed:
        pool = self.open()
        return execute_heal(pool, plan_heal(pool, Silent(), quick=quick), store.tmp, Silent())[1]

    def copies(self) -> dict[str, list[str]]:
        """Which nodes have each pack, found without the pool's help."""
        found: dict[str, list[str]] = {}
        for path in sorted(self.folder.glob("n*/packs/*/*.pack")):
            found.setdefault(path.name, []).append(path.relative_to(self.folder).parts[0])
        return found

    def moves(self, node: Path) -> set[str]:
        return {str(path.relative_to(node)) for path in node.glob("refs/*/*/*")}


@pytest.fixture
def new_pool(exchange: Exchange, tmp_path: Path) -> Callable[[int, int], Pool]:
    return lambda count, replicas: Pool(exchange, tmp_path / "pool").make(count, replicas)


def fill(exchange: Exchange, store: Store, count: int = 6) -> dict[str, dict[str, bytes]]:
    """Some refs, each with a pack of its own, and what they must read as."""
    wanted = {}
    for seed in range(count):
        exchange.commit(store, f"web:v{seed}", a=exchange.noise(seed, 20_000), b=exchange.noise(100 + seed, 3_000))
        wanted[f"web:v{seed}"] = {"a.bin": exchange.noise(seed, 20_000), "b.bin": exchange.noise(100 + seed, 3_000)}
    return wanted


def same(exchange: Exchange, store: Store, wanted: dict[str, dict[str, bytes]]) -> bool:
    return all(exchange.files(store, ref) == files for ref, files in wanted.items())


def test_packs_lie_on_as_many_nodes_as_they_should_and_refs_on_all(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(4, 2), exchange.store("here")
    wanted = fill(exchange, here)
    pool.push(here)
    assert {len(nodes) for nodes in pool.copies().values()} == {2}
    assert len(pool.copies()) == 6
    assert {frozenset(pool.moves(node)) for node in pool.roots} == {
        frozenset(f"refs/web/v{seed}/0000000001" for seed in range(6))
    }
    there = exchange.store("there")
    pool.pull(there)
    assert same(exchange, there, wanted)
    assert exchange.problems(there) == []
    assert not list(pool.folder.glob("n*/pool/votes/**/*.*"))
    seen = look(pool.open())
    assert (seen.under_replicated, seen.lagging, seen.misplaced, seen.refs) == ((), (), (), 6)


@pytest.mark.parametrize(("count", "replicas"), [(4, 2), (5, 3)])
def test_any_nodes_but_one_copy_may_go_and_everything_reads_the_same(
    exchange: Exchange, new_pool: Any, count: int, replicas: int
) -> None:
    pool, here = new_pool(count, replicas), exchange.store("here")
    wanted = fill(exchange, here)
    pool.push(here)
    for number, gone in enumerate(itertools.combinations(pool.roots, replicas - 1)):
        for node in gone:
            node.rename(node.with_name(f"away-{node.name}"))
        there = exchange.store(f"there{number}")
        pool.pull(there)
        assert same(exchange, there, wanted), gone
        assert exchange.problems(there) == []
        for node in gone:
            node.with_name(f"away-{node.name}").rename(node)


@pytest.mark.parametrize(("count", "replicas"), [(4, 2), (5, 3)])
def test_wiped_nodes_are_filled_again_from_the_others(
    exchange: Exchange, new_pool: Any, count: int, replicas: int
) -> None:
    pool, here = new_pool(count, replicas), exchange.store("here")
    fill(exchange, here, 3)
    pool.push(here)
    before = pool.copies()
    for gone in list(itertools.combinations(pool.roots, replicas - 1))[::2]:
        lives = {node.member.id: node.member.life for node in pool.open().nodes.values()}
        for node in gone:
            shutil.rmtree(node)
        opened = pool.open(*map(str, set(pool.roots) | set(gone)))
        assert sum(node.state == "blank" for node in opened.nodes.values()) == replicas - 1
        plan = plan_heal(opened, Silent(), quick=True)
        execute_heal(opened, plan, here.tmp, Silent())
        assert pool.copies() == before, "each node keeps what its id stands for, in every life"
        assert {frozenset(pool.moves(node)) for node in pool.roots} == {frozenset(pool.moves(pool.roots[0]))}
        renewed = {node.member.id: node.member.life for node in pool.open().nodes.values()}
        assert renewed.keys() == lives.keys()
        assert sum(renewed[name] != lives[name] for name in lives) == replicas - 1


def test_of_two_nodes_the_one_that_is_left_can_fill_the_other(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(2, 2), exchange.store("here")
    wanted = fill(exchange, here, 3)
    pool.push(here)
    shutil.rmtree(pool.roots[0])
    exchange.commit(here, "more", a=b"more")
    with pytest.raises(RemoteUnavailable, match=r"2 nodes must answer to write, and 1 of 2 do \(.*n0 is blank\)"):
        pool.push(here)
    opened = pool.open(*[str(pool.folder / "n0"), str(pool.folder / "n1")])
    execute_heal(opened, plan_heal(opened, Silent(), quick=False), here.tmp, Silent())
    pool.push(here)
    shutil.rmtree(pool.roots[1])
    there = exchange.store("there")
    pool.pull(there)
    assert same(exchange, there, wanted)


class Dying:
    """A node that answers `left` more calls and then is gone for good."""

    def __init__(self, node: FolderTransport, left: int) -> None:
        self.node, self.left = node, left
        self.url = node.url
        self._lock = threading.Lock()

    def _count(self) -> None:
        with self._lock:
            self.left -= 1
            if self.left < 0:
                raise RemoteUnavailable(f"{self.url} has died")

    def initialise(self) -> None:
        self._count()
        self.node.initialise()

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        self._count()
        return self.node.list(prefix)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self._count()
        return self.node.read(key, start, end)

    def size(self, key: str) -> int | None:
        self._count()
        return self.node.size(key)

    def put_file(self, key: str, path: Path, name: ObjectId, task: Task) -> None:
        self._count()
        self.node.put_file(key, path, name, task)

    def create(self, key: str, data: bytes) -> bool:
        self._count()
        return self.node.create(key, data)

    def delete(self, key: str) -> None:
        self._count()
        self.node.delete(key)


def test_a_node_that_dies_at_any_call_of_a_push_costs_nothing(exchange: Exchange, tmp_path: Path) -> None:
    """What a push has confirmed is read back without the node that died, at every moment it could have died."""
    here = exchange.store("here")
    wanted = fill(exchange, here, 1)
    died = 0
    for calls in range(0, 200, 4):
        pool = Pool(exchange, tmp_path / f"pool{calls}").make(4, 2)
        mortal = str(pool.folder / f"n{calls % 4}")
        dying = Dying(FolderTransport(Path(mortal)), calls)
        pool.wrap = lambda node, mortal=mortal, dying=dying: dying if node.url == mortal else node  # type: ignore[misc]
        pool.push(here)
        shutil.rmtree(mortal)
        pool.wrap = lambda node: node
        there = exchange.store(f"there{calls}")
        pool.pull(there)
        assert same(exchange, there, wanted), f"it died at call {calls}"
        if dying.left >= 0:
            break
        died += 1
    assert died > 3
    assert dying.left >= 0, "the sweep went through the whole push"


def test_a_silent_node_is_passed_over(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(4, 2), exchange.store("here")
    wanted = fill(exchange, here, 2)
    pool.push(here)
    wake = threading.Event()

    class Silence(Dying):
        def _count(self) -> None:
            self.left -= 1
            if self.left < 0:
                wake.wait(60)

    pool.stall = 0.5
    pool.wrap = lambda node: Silence(node, 4) if node.url.endswith("n1") else node
    there = exchange.store("there")
    pool.pull(there)
    assert same(exchange, there, wanted)
    exchange.commit(here, "more", a=b"more")
    pool.push(here, "more")
    wake.set()
    assert any("no answer for" in message for message in pool.warnings)


def test_too_few_nodes_refuse_to_write_and_nothing_moves(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(4, 3), exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1))
    pool.push(here)
    exchange.commit(here, "web", a=exchange.noise(2))
    for node in pool.roots[:2]:
        node.rename(node.with_name(f"away-{node.name}"))
    with pytest.raises(RemoteUnavailable, match="2 of 4 do") as caught:
        pool.push(here)
    assert "llmos remote rm-node" in str(caught.value.hint)
    for node in list(pool.folder.glob("away-*")):
        node.rename(pool.folder / node.name.removeprefix("away-"))
    there = exchange.store("there")
    pool.pull(there)
    assert exchange.files(there, "web") == {"a.bin": exchange.noise(1)}


def test_fewer_copies_are_taken_only_when_told_so_and_a_repair_makes_them_up(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(3, 3), exchange.store("here")
    exchange.commit(here, "web", a=exchange.noise(1))
    away = pool.roots[0].rename(pool.folder / "away")
    with pytest.raises(RemoteUnavailable, match="3 nodes must answer to write, and 2 of 3 do"):
        pool.push(here)
    remote = pool.remote()
    tolerate(remote.transport)
    pool.push(here, remote=remote)
    assert shortfall(remote.transport) == 1
    assert {len(nodes) for nodes in pool.copies().values()} == {2}
    away.rename(pool.folder / "n0")
    assert pool.heal(here).copies == 1
    assert {len(nodes) for nodes in pool.copies().values()} == {3}
    assert pool.moves(pool.roots[0]) == pool.moves(pool.roots[1])
    with pytest.raises(UsageError, match="is not a pool"):
        tolerate(FolderTransport(pool.roots[0]))


def test_a_pack_whose_homes_are_away_gets_its_copies_elsewhere_and_moves_home(
    exchange: Exchange, new_pool: Any
) -> None:
    pool, here = new_pool(4, 2), exchange.store("here")
    away = pool.roots[1].rename(pool.folder / "away")
    fill(exchange, here, 8)
    pool.push(here)
    assert {len(nodes) for nodes in pool.copies().values()} == {2}
    away.rename(pool.folder / "n1")
    assert look(pool.open()).misplaced
    done = pool.heal(here)
    assert done.copies == done.removed > 0
    assert {len(nodes) for nodes in pool.copies().values()} == {2}
    assert look(pool.open()).misplaced == ()


def test_rot_makes_the_next_copy_answer_is_found_and_is_put_right(
    exchange: Exchange, new_pool: Any, overwrite: Overwrite
) -> None:
    """Every pack has one copy damaged in its frames, its index, its trailer or its length."""
    pool, here = new_pool(4, 2), exchange.store("here")
    wanted = fill(exchange, here, 8)
    pool.push(here)
    damaged = []
    for number, name in enumerate(sorted(pool.copies())):
        first = pool.open().rank(parse_id(name.removesuffix(".pack")))[0]
        path = next(Path(pool.open().nodes[first].url).glob(f"packs/*/{name}"))
        data = bytearray(path.read_bytes())
        at = (200, len(data) - 100, len(data) - 40, 20_000)[number % 4]
        data[at] ^= 4
        overwrite(path, bytes(data) if number != 7 else bytes(data[:-1000]))
        damaged.append(path)
    move = pool.roots[2] / "refs/web/v0/0000000001"
    move.write_bytes(move.read_bytes()[:-20])
    there = exchange.store("there")
    pool.pull(there)
    assert same(exchange, there, wanted)
    assert exchange.problems(there) == []
    assert any("another node is asked" in message for message in pool.warnings)
    bad = {(key, pool.open().nodes[node].url) for key, node, _ in scrub(pool.open(), Silent()).bad()}
    assert bad == {(str(path.relative_to(path.parents[2])), str(path.parents[2])) for path in damaged} | {
        ("refs/web/v0/0000000001", str(pool.roots[2]))
    }
    assert pool.heal(here).copies == 8
    assert list(scrub(pool.open(), Silent()).bad()) == []


def test_a_pack_without_a_whole_copy_is_reported_and_left_alone(
    exchange: Exchange, new_pool: Any, overwrite: Overwrite
) -> None:
    pool, here = new_pool(3, 2), exchange.store("here")
    fill(exchange, here, 1)
    pool.push(here)
    paths = list(pool.folder.glob("n*/packs/*/*.pack"))
    for path in paths:
        overwrite(path, path.read_bytes()[:-1] + b"!")
    plan = plan_heal(pool.open(), Silent(), quick=False)
    assert [pack.name for pack in plan.lost] == [parse_id(paths[0].stem)]
    assert plan.moves == ()
    pool.heal(here)
    assert all(path.exists() for path in paths)


def test_reading_a_share_reads_a_share(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(3, 2), exchange.store("here")
    fill(exchange, here, 10)
    pool.push(here)
    whole = scrub(pool.open(), Silent()).read
    assert whole == sum(path.stat().st_size for path in pool.folder.glob("n*/packs/*/*.pack"))
    assert scrub(pool.open(), Silent(), percent=30).read == pytest.approx(0.3 * whole, rel=0.01)


def test_nodes_that_come_and_go_move_their_share(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(4, 2), exchange.store("here")
    wanted = fill(exchange, here, 24)
    pool.push(here)
    before = pool.copies()
    opened = pool.open()
    (pool.folder / "n4").mkdir()
    let_in(opened, str(pool.folder / "n4"), FolderTransport(pool.folder / "n4"), fill_keys)
    assert pool.moves(pool.folder / "n4") == pool.moves(pool.roots[0])
    done = pool.heal(here)
    after = pool.copies()
    assert all(set(after[name]) - set(before[name]) <= {"n4"} for name in before)
    assert {len(nodes) for nodes in after.values()} == {2}
    assert done.copies == done.removed == sum("n4" in nodes for nodes in after.values())
    assert 3 <= done.copies <= 17, "about a fifth of 48 copies"
    opened = pool.open()
    leaving = next(name for name, node in opened.nodes.items() if node.url.endswith("n0"))
    let_go(opened, [leaving])
    pool.heal(here)
    kept = {name: [node for node in nodes if node != "n0"] for name, nodes in pool.copies().items()}
    assert {len(nodes) for nodes in kept.values()} == {2}
    shutil.rmtree(pool.folder / "n0")
    there = exchange.store("there")
    pool.pull(there)
    assert same(exchange, there, wanted)


def test_a_pack_that_lacks_copies_is_not_relied_on(exchange: Exchange, new_pool: Any) -> None:
    """Whoever sent it was stopped after the first copy; the next push must not take that for enough."""
    pool, here = new_pool(4, 2), exchange.store("here")
    wanted = fill(exchange, here, 4)
    pool.push(here)
    before = pool.copies()
    for name, nodes in before.items():
        next(pool.folder.glob(f"{nodes[0]}/packs/*/{name}")).unlink()
    exchange.commit(here, "web:v9", a=exchange.noise(0, 20_000), c=b"new")
    pool.push(here, "web:v9")
    assert sum(len(nodes) == 2 for nodes in pool.copies().values()) == len(pool.copies()) - len(before)
    pool.push(here)
    held = pool.copies()
    pool.wrap = lambda node: Dying(node, 0) if node.url.endswith("n0") else node
    pool.push(here)
    assert pool.copies() == held, "a node that does not answer is taken to have its copies"
    pool.wrap = lambda node: node
    for node in pool.roots:
        gone = node.rename(pool.folder / "away")
        there = exchange.store(f"without-{node.name}")
        pool.pull(there)
        assert same(exchange, there, wanted)
        gone.rename(node)


def test_a_node_that_leaves_gives_what_it_has_first(exchange: Exchange, new_pool: Any) -> None:
    """With one copy of each pack, nobody else has it."""
    pool, here = new_pool(3, 1), exchange.store("here")
    wanted = fill(exchange, here, 9)
    pool.push(here)
    held = {name for name, nodes in pool.copies().items() if nodes == ["n1"]}
    assert held
    opened = pool.open()
    leaving = [name for name, node in opened.nodes.items() if node.url.endswith("n1")]
    assert drain(opened, leaving, here.tmp, Silent()) == len(held)
    let_go(opened, leaving)
    shutil.rmtree(pool.folder / "n1")
    there = exchange.store("there")
    pool.pull(there)
    assert same(exchange, there, wanted)
    assert plan_heal(pool.open(), Silent(), quick=False).has_work is False


def test_when_most_nodes_are_lost_for_good_the_rest_goes_on(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(3, 3), exchange.store("here")
    wanted = fill(exchange, here, 3)
    pool.push(here)
    shutil.rmtree(pool.folder / "n0")
    shutil.rmtree(pool.folder / "n2")
    opened = pool.open()
    gone = [name for name, node in opened.nodes.items() if node.state == "blank"]
    with pytest.raises(UsageError, match="2 of 3 nodes cannot go at once") as caught:
        let_go(opened, gone)
    assert "rm-node --lost" in str(caught.value.hint)
    let_go(opened, gone, lost=True)
    for name in ("n3", "n4"):
        let_in(pool.open(), str(pool.folder / name), FolderTransport(pool.folder / name), fill_keys)
    assert pool.heal(here).copies == 6
    exchange.commit(here, "more", a=b"more")
    pool.push(here)
    there = exchange.store("there")
    pool.pull(there)
    assert same(exchange, there, {**wanted, "more": {"a.bin": b"more"}})


def test_a_node_that_cannot_be_filled_again_can_be_given_up(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(3, 2), exchange.store("here")
    fill(exchange, here, 2)
    pool.push(here)
    shutil.rmtree(pool.folder / "n0")
    (pool.folder / "n0").write_text("no folder any more")
    opened = pool.open(str(pool.folder / "n1"))
    gone = let_go(opened, [name for name, node in opened.nodes.items() if node.state != "up"], renewing=True)
    assert [node.member.url for node in gone.waiting.values()] == [str(pool.folder / "n0")]
    (name,) = find_nodes(PoolRemote("pool", gone), [str(pool.folder / "n0")], pool.folder)
    assert let_go(gone, [name]).waiting == {}
    assert pool.open(str(pool.folder / "n1")).waiting == {}
    assert pool.heal(here).failed == ()


def test_nodes_may_be_of_different_kinds(
    exchange: Exchange, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = request.getfixturevalue("moto")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    here = exchange.store("here")
    wanted = fill(exchange, here, 4)
    urls = [str(tmp_path / "n0"), str(tmp_path / "n1"), server.url(f"node-{tmp_path.name}")]
    pool = create_pool(urls, 2, open_transport, print)
    remote = Remote("pool", pool)
    execute_push(here, remote, plan_push(here, remote, None, force=False), Silent())
    shutil.rmtree(tmp_path / "n0")
    remote = Remote("pool", open_pool(urls[2:], open_transport, print))
    there = exchange.store("there")
    execute_pull(there, remote, plan_pull(there, remote, None, force=False), Silent())
    assert same(exchange, there, wanted)
    healed = execute_heal(remote.transport, plan_heal(remote.transport, Silent(), quick=False), here.tmp, Silent())
    assert look(healed[0]).under_replicated == ()


def test_any_node_tells_where_the_pool_is(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(4, 2), exchange.store("here")
    fill(exchange, here, 2)
    pool.push(here)
    found = find_pool(FolderTransport(pool.roots[2]), pool.opener, pool.warn)
    assert found is not None
    assert {node.url for node in found.nodes.values()} == {str(node) for node in pool.roots}
    assert find_pool(FolderTransport(pool.folder / "nothing"), pool.opener, pool.warn) is None
    one = pool.open(str(pool.roots[3]))
    assert len(list_remote_refs(one, Silent())) == 2


def test_a_list_of_long_ago_finds_the_members_of_today(exchange: Exchange, new_pool: Any) -> None:
    pool = new_pool(3, 2)
    old = [str(node) for node in pool.roots]
    for number in (3, 4):
        let_in(pool.open(), str(pool.folder / f"n{number}"), FolderTransport(pool.folder / f"n{number}"), fill_keys)
    for number in (0, 1):
        opened = pool.open()
        let_go(opened, [name for name, node in opened.nodes.items() if node.url.endswith(f"n{number}")])
        shutil.rmtree(pool.folder / f"n{number}")
    assert {Path(node.url).name for node in pool.open(*old).nodes.values()} == {"n2", "n3", "n4"}


def test_who_knows_old_members_only_cannot_write(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(3, 2), exchange.store("here")
    exchange.commit(here, "web", a=b"1")
    pool.push(here)
    old = pool.remote()
    let_in(pool.open(), str(pool.folder / "n3"), FolderTransport(pool.folder / "n3"), fill_keys)
    seen = read_remote_ref(pool.open(), parse_ref("web"), Silent())
    with pytest.raises(RemoteUnavailable, match="other members"):
        move_remote_ref(old.transport, seen, ObjectId(bytes(32)), message="")
    assert seen.id == read_remote_ref(pool.open(), parse_ref("web"), Silent()).id


def test_two_changes_of_members_at_once_do_not_both_win(new_pool: Any) -> None:
    pool = new_pool(4, 2)
    opened = [pool.open() for _ in range(4)]
    start, won, lost = threading.Barrier(4), [], []

    def leave(me: int) -> None:
        leaving = next(name for name, node in opened[me].nodes.items() if node.url.endswith(f"n{me}"))
        start.wait()
        try:
            let_go(opened[me], [leaving])
            won.append(me)
        except (Conflict, RemoteUnavailable) as exc:
            lost.append(exc)

    threads = [threading.Thread(target=leave, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert {Path(node.url).name for node in pool.open().nodes.values()} == {f"n{n}" for n in range(4)} - {f"n{won[0]}"}


def test_a_node_in_an_earlier_life_counts_for_nothing(exchange: Exchange, new_pool: Any) -> None:
    """It was not mounted when it was taken for wiped; a new one took its place, and now the old one is back."""
    pool, here = new_pool(3, 2), exchange.store("here")
    exchange.commit(here, "web", a=b"1")
    pool.push(here)
    away = pool.roots[0].rename(pool.folder / "away")
    opened = pool.open(*[str(pool.folder / f"n{number}") for number in range(3)])
    execute_heal(opened, plan_heal(opened, Silent(), quick=False), here.tmp, Silent())
    exchange.commit(here, "web", a=b"2")
    pool.push(here)
    shutil.rmtree(pool.folder / "n0")
    away.rename(pool.folder / "n0")
    node = next(node for node in pool.open().nodes.values() if node.url.endswith("n0"))
    assert (node.state, node.why) == ("blank", "it is as it was in an earlier life")
    pool.heal(here)
    assert pool.moves(pool.folder / "n0") == {"refs/web/latest/0000000001", "refs/web/latest/0000000002"}
    assert next(node for node in pool.open().nodes.values() if node.url.endswith("n0")).state == "up"


def test_a_move_that_was_left_half_made_is_completed(exchange: Exchange, new_pool: Any) -> None:
    """The mover dies at each of its calls; a repair completes what may count, and the next push goes on."""

    class Killed(BaseException):
        pass

    class Counting(Dying):
        calls: ClassVar[list[int]] = [0]
        deadly = 0

        def _count(self) -> None:
            with lock:
                self.calls[0] += 1
                if self.calls[0] >= self.deadly:
                    raise Killed

    lock = threading.Lock()
    pool, here = new_pool(3, 2), exchange.store("here")
    exchange.commit(here, "web", a=b"0")
    pool.push(here)
    finished = False
    for deadly in range(1, 120, 4):
        exchange.commit(here, "web", a=b"%d" % deadly)
        pool.push(here, remote=Remote("pool", _packs_only(pool, here)))
        seen = read_remote_ref(pool.open(), parse_ref("web"), Silent())
        opened = pool.open()
        Counting.calls, Counting.deadly = [0], deadly
        opened.nodes = {
            name: type(node)(node.member, Counting(node.transport, 0), node.state)  # type: ignore[arg-type]
            for name, node in opened.nodes.items()
        }
        try:
            move_remote_ref(opened, seen, exchange.value(here, "web"), message="")
            finished = True
        except Killed:
            pass
        visible = read_remote_ref(pool.open(), parse_ref("web"), Silent()).id
        pool.heal(here, quick=True)
        assert pending(pool.open().live) == set()
        after = read_remote_ref(pool.open(), parse_ref("web"), Silent())
        assert after.id in (seen.id, exchange.value(here, "web"))
        assert visible in (seen.id, after.id)
        assert {frozenset(pool.moves(node)) for node in pool.roots} == {frozenset(pool.moves(pool.roots[0]))}
        pool.push(here)
        assert read_remote_ref(pool.open(), parse_ref("web"), Silent()).id == exchange.value(here, "web")
        if finished:
            break
    assert finished


def test_a_push_that_died_half_way_is_made_again_without_a_conflict(exchange: Exchange, new_pool: Any) -> None:
    """Its move has been voted for at one node, with another time than the second push would give it."""
    pool, here = new_pool(3, 2), exchange.store("here")
    oid = exchange.commit(here, "web", a=b"1")
    entry = RefEntry(parse_ref("web"), 1, oid, None, "2026-11-25T00:00:00+00:00", "ann@host", "earlier")
    value = encode_entry(entry)
    vote = pool.roots[1] / f"pool/votes/refs/web/latest/0000000001.{1:010d}.{'a' * 32}.2"
    vote.parent.mkdir(parents=True)
    vote.write_bytes(b"%016x\n" % checksum(value) + value)
    pool.push(here)
    assert {(node / "refs/web/latest/0000000001").read_bytes() for node in pool.roots} == {value}
    other = exchange.store("other")
    exchange.commit(other, "web", a=b"2")
    with pytest.raises(Conflict):
        pool.push(other)


def test_a_damaged_copy_does_not_count_as_knowing_a_move(exchange: Exchange, new_pool: Any) -> None:
    pool, here = new_pool(3, 3), exchange.store("here")
    exchange.commit(here, "web", a=b"1")
    broken = pool.roots[0] / "refs/web/latest/0000000001"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"")
    opened = pool.open()
    with pytest.raises(RemoteUnavailable, match="3 nodes must know it, and 2 of 3 do"):
        opened.spread("refs/web/latest/0000000001", b"a move")
    assert broken.read_bytes() == b""


def _packs_only(pool: Pool, store: Store) -> Transport:
    """The pool, but every ref moves elsewhere: what a push that died before its refs moved has sent."""

    class Elsewhere(PoolTransport):
        def create(self, key: str, data: bytes) -> bool:
            raise Conflict("elsewhere")

    opened = pool.open()
    remote = Remote("pool", Elsewhere(opened.members, opened.nodes, pool.warn))
    with pytest.raises(Conflict, match="elsewhere"):
        pool.push(store, remote=remote)
    return pool.open()


def test_what_lies_there_is_never_made_a_pool_of(exchange: Exchange, tmp_path: Path) -> None:
    here = exchange.store("here")
    exchange.commit(here, "web", a=b"1")
    pool = Pool(exchange, tmp_path / "pool").make(2, 2)
    with pytest.raises(Unsafe, match="is not empty"):
        create_pool([str(tmp_path / "x"), str(here.root)], 2, pool.opener, pool.warn)
    assert not (here.root / CARD_KEY).exists()
    with pytest.raises(UsageError, match="3 copies need as many nodes"):
        create_pool([str(tmp_path / "x"), str(tmp_path / "y")], 3, pool.opener, pool.warn)
    other = Pool(exchange, tmp_path / "other").make(2, 2)
    with pytest.raises(Unsafe, match="different pools"):
        pool.open(str(pool.roots[0]), str(other.roots[0]))
    with pytest.raises(Unsafe, match="belongs to another pool"):
        let_in(pool.open(), str(other.roots[0]), FolderTransport(other.roots[0]), fill_keys)
    with pytest.raises(NotFound, match="no pool at"):
        pool.open(str(tmp_path / "x"))


def test_joining_a_pool_takes_its_own_number_of_copies(exchange: Exchange, new_pool: Any, tmp_path: Path) -> None:
    pool = new_pool(3, 2)
    urls = [str(node) for node in pool.roots]
    assert create_pool(urls[:1], 2, pool.opener, pool.warn).members == pool.open().members
    with pytest.raises(UsageError, match="this pool keeps 2 copies"):
        create_pool(urls, 3, pool.opener, pool.warn)
    with pytest.raises(UsageError, match=r"new is no member of the pool"):
        create_pool([*urls, str(tmp_path / "new")], 2, pool.opener, pool.warn)


def test_a_gc_at_a_node_removes_nothing(exchange: Exchange, new_pool: Any) -> None:
    """It has all refs and seldom all packs, which looks like damage: it refuses."""
    pool, here = new_pool(4, 2), exchange.store("here")
    fill(exchange, here, 6)
    pool.push(here)
    before, refused = pool.copies(), 0
    for node in pool.roots:
        store = exchange.store(f"pool/{node.name}")
        try:
            execute_gc(store, plan_gc(store, grace_seconds=0), Silent())
        except LlmosError:
            refused += 1
    assert refused > 0
    assert pool.copies() == before


def test_a_repair_that_is_stopped_anywhere_is_finished_by_the_next(exchange: Exchange, tmp_path: Path) -> None:
    """Also between taking a wiped node out and letting it in again."""

    class Stopped(BaseException):
        pass

    class Counting(Dying):
        def _count(self) -> None:
            with lock:
                calls[0] += 1
                if calls[0] >= deadly:
                    raise Stopped

    lock, here = threading.Lock(), exchange.store("here")
    wanted = fill(exchange, here, 2)
    outside = 0
    for deadly in range(10, 2000, 23):
        calls = [0]
        pool = Pool(exchange, tmp_path / f"pool{deadly}").make(3, 2)
        pool.push(here)
        before = pool.copies()
        shutil.rmtree(pool.folder / "n0")
        pool.wrap = lambda node: Counting(node, 0)
        try:
            pool.heal(here, quick=True)
            stopped = False
        except Stopped:
            stopped = True
        pool.wrap = lambda node: node
        opened = pool.open(str(pool.folder / "n1"), str(pool.folder / "n2"))
        outside += bool(opened.waiting)
        execute_heal(opened, plan_heal(opened, Silent(), quick=False), here.tmp, Silent())
        again = pool.open()
        assert {node.state for node in again.nodes.values()} == {"up"}
        assert (len(again.nodes), again.waiting, pool.copies()) == (3, {}, before), f"stopped at call {deadly}"
        if not stopped:
            break
    there = exchange.store("there")
    pool.pull(there)
    assert same(exchange, there, wanted)
    assert not stopped
    assert outside > 0

"""Rows of a dataset that lies in a pool of folders, read by a store that has none of it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llmos_cli.config import DataConfig
from llmos_cli.data import batches
from llmos_cli.data.batches import TokenRows
from llmos_cli.data.encode import Encoded
from llmos_cli.data.order import order_of, rows_of
from llmos_cli.data.shards import Shape, write_shards
from llmos_cli.errors import NotFound
from llmos_cli.formats import limits
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange import streamed
from llmos_cli.remote.exchange.anywhere import resolve_streamed
from llmos_cli.remote.exchange.push import execute_push, plan_push
from llmos_cli.remote.open import add_remote, find_remote
from llmos_cli.remote.pool.pools import add_pool
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs import cached
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.transaction import begin

SEQ_LEN, ROWS = 512, 256
BLOCK = 8 * 1024


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "WAITS", (0.0, 0.01, 0.02))


@pytest.fixture
def nodes(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of a pool with two copies of everything, which holds the dataset `web` in many small packs."""
    monkeypatch.setattr(limits, "CHUNK_BYTES", BLOCK)
    monkeypatch.setattr(limits, "PACK_TARGET_BYTES", 4 * BLOCK)
    monkeypatch.setattr(batches, "CHUNK_BYTES", BLOCK)
    ids = np.random.default_rng(0).integers(0, 60000, ROWS * SEQ_LEN).astype("<u2")
    run = Encoded(ids, np.arange(1, ROWS + 1) * SEQ_LEN, 1, np.zeros((ROWS, 3), np.int64))
    nodes = [tmp_path / name for name in ("a", "b", "c")]
    add_pool(store, "team", [str(node) for node in nodes], 2, tmp_path)
    with begin(store, purpose="test", ref=parse_ref("web")) as tx, Silent().task("x") as task:
        shape = Shape("lm", SEQ_LEN, 32 * SEQ_LEN * 2, np.dtype("<u2"), 0)
        made = write_shards(tx, iter([run]), shape, task=task)
        tokenizer = tx.add_bytes("tokenizer/tokenizer.json", b"{}")
        tx.commit(Manifest("dataset", (*made.files, tokenizer), made.facts(shape)), message="test")
    remote = find_remote(store, "team", tmp_path)
    execute_push(store, remote, plan_push(store, remote, None, force=False), Silent())
    return nodes


@pytest.fixture
def near(tmp_path: Path, nodes: list[Path]) -> Iterator[Store]:
    init_store(tmp_path / "near")
    with open_store(tmp_path / "near") as opened:
        add_remote(opened, "team", str(nodes[0]), tmp_path)
        yield opened


def epoch(store: Store, text: str, between: Callable[[int], None] = lambda step: None) -> np.ndarray:
    found = resolve_streamed(store, text)
    manifest = read_manifest(store, found.id)
    rows = TokenRows(store, manifest, cache_bytes=4 * BLOCK)
    order = order_of(rows_of(found.id, rows.rows, rows.row_bytes), 1)
    order.tell(rows.expect)
    seen = []
    for step in range(ROWS // 8):
        between(step)
        seen.append(rows.row_batch(order.batch(step, 8)))
    rows.close()
    return np.concatenate(seen)


def test_a_node_that_goes_while_rows_are_read_costs_nothing_but_time(
    store: Store, near: Store, nodes: list[Path]
) -> None:
    def lose(step: int) -> None:
        if step == 10:
            shutil.rmtree(nodes[1])

    wanted = epoch(store, "web")
    near.config = type(near.config)(remotes=near.config.remotes, data=DataConfig(0.0))  # so that all comes from there
    assert np.array_equal(epoch(near, "team/web", lose), wanted)
    assert not nodes[1].exists()


def test_a_pool_that_is_away_for_a_while_is_asked_again(
    store: Store, near: Store, nodes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = [node.with_name(f"{node.name}-aside") for node in nodes]

    def away(step: int) -> None:
        if step == 10:
            for node, place in zip(nodes, aside, strict=True):
                node.rename(place)

    def back(seconds: float) -> None:
        for node, place in zip(nodes, aside, strict=True):
            if place.exists():
                place.rename(node)

    monkeypatch.setattr("time.sleep", back)
    near.config = type(near.config)(remotes=near.config.remotes, data=DataConfig(0.0))
    assert np.array_equal(epoch(near, "team/web", away), epoch(store, "web"))


def test_what_is_gone_for_good_is_an_error_that_names_it(near: Store, nodes: list[Path]) -> None:
    def lose(step: int) -> None:
        if step == 10:
            for node in nodes:
                shutil.rmtree(node)

    near.config = type(near.config)(remotes=near.config.remotes, data=DataConfig(0.0))
    with pytest.raises(NotFound, match=f"no pool at {nodes[0]}"):
        epoch(near, "team/web", lose)


def test_once_read_a_dataset_needs_its_pool_no_more_for_what_is_cached(
    store: Store, near: Store, nodes: list[Path]
) -> None:
    wanted = epoch(near, "team/web")
    kept = [path for path in (near.root / cached.FOLDER).rglob("*") if path.is_file()]
    spoiled = kept[0].read_bytes()
    kept[0].write_bytes(bytes(len(spoiled)))
    assert np.array_equal(epoch(near, "team/web"), wanted)
    assert kept[0].read_bytes() == spoiled
    assert not list(near.packs.rglob("*.pack"))
    assert np.array_equal(epoch(store, "web"), wanted)


def test_files_that_the_result_will_hold_are_fetched(near: Store) -> None:
    found = resolve_streamed(near, "team/web", near="tokenizer/")
    entry = read_manifest(near, found.id).file("tokenizer/tokenizer.json")
    assert entry is not None
    near.elsewhere = ()
    assert near.index.locate(entry.chunks[0].id)

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_cli.data.batches import TokenRows
from llmos_cli.data.encode import Encoded
from llmos_cli.data.mixing import make_mix, mixed_order, parse_mix, training_order
from llmos_cli.data.order import Order, order_of, rows_of
from llmos_cli.data.shards import Shape, write_shards
from llmos_cli.errors import UsageError
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store
from llmos_cli.store.transaction import begin

U16 = np.dtype("<u2")


def put(
    store: Store, name: str, first: int, rows: int, *, seq_len: int = 4, tokenizer: bytes = b"{}", **facts: Json
) -> None:
    """A dataset of full rows of equal tokens, numbered from `first`."""
    ids = np.repeat(np.arange(first, first + rows), seq_len).astype(U16)
    run = Encoded(ids, np.arange(1, rows + 1) * seq_len, ids.size, np.zeros((rows, 3), np.int64))
    with begin(store, purpose="test", ref=parse_ref(name)) as tx, Silent().task("x") as bar:
        shape = Shape("lm", seq_len, 40, U16, 0)
        made = write_shards(tx, iter([run]), shape, task=bar)
        meta = {"task": "lm", "seq_len": seq_len, "dtype": "U16", "text_bytes": 8, **made.facts(shape), **facts}
        files = (*made.files, tx.add_bytes("tokenizer/tokenizer.json", tokenizer))
        tx.commit(Manifest("dataset", files, meta), message="test")


def test_a_mix_draws_from_each_in_proportion_and_copies_nothing(store: Store) -> None:
    put(store, "web", 100, 60)
    put(store, "code", 1000, 12)
    before = sum(pack.stat().st_size for pack in store.packs.rglob("*.pack"))
    commit, mix = make_mix(store, parse_ref("both"), parse_mix("web:3,code:1"))
    assert sum(pack.stat().st_size for pack in store.packs.rglob("*.pack")) - before < 8000  # the manifest
    rows = TokenRows(store, mix)
    assert rows.rows == mix.meta["rows"] == 72
    order = training_order(commit.id, mix, rows.row_bytes, seed=5)
    seen = np.concatenate([rows.row_batch(order.batch(step, 8))[:, 0] for step in range(256)])
    assert (seen >= 1000).sum() == 512
    web = seen[seen < 1000]
    for epoch in range(len(web) // 60):
        assert sorted(web[epoch * 60 : (epoch + 1) * 60].tolist()) == list(range(100, 160))


def test_a_slot_is_found_without_those_before_it(store: Store) -> None:
    parts = [rows_of(object_id(bytes([n])), 50 + n, 8, first=100 * n, among=3) for n in range(3)]

    def order() -> Order:
        return mixed_order(object_id(b"mix"), parts, [5, 2, 1], 9)

    straight = order()
    batches = [straight.batch(step, 12) for step in range(1000)]
    for step in (999, 3, 512, 341, 342):
        assert order().batch(step, 12).tolist() == batches[step].tolist()
    seen = np.concatenate(batches)[: 1024 * 11]
    assert [int(((seen >= low) & (seen < low + 100)).sum()) for low in (0, 100, 200)] == [640 * 11, 256 * 11, 128 * 11]


@pytest.mark.parametrize(
    ("text", "weights"),
    [("web:3,code:1", [3, 1]), ("web,code:v2:0.5", [1, Fraction(1, 2)]), ("a:1/3", [Fraction(1, 3)])],
)
def test_weights_are_numbers_and_one_if_left_out(text: str, weights: list[object]) -> None:
    assert [share.weight for share in parse_mix(text)] == weights


@pytest.mark.parametrize("text", ["", "web:0", "web:-1", ":3", "web:0.00001,code:1"])
def test_what_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_mix(text)


def test_datasets_that_do_not_fit_together_are_named(store: Store) -> None:
    put(store, "web", 100, 6)
    put(store, "long", 100, 6, seq_len=8)
    put(store, "other", 100, 6, tokenizer=b"[]")
    for name, why in (("long", "long has seq_len 8, web has 4"), ("other", "another tokenizer"), ("web", "twice")):
        with pytest.raises(UsageError, match=why):
            make_mix(store, parse_ref("both"), parse_mix(f"web,{name}"))


def test_labels_are_numbered_alike_and_stay_known(store: Store) -> None:
    for name, labels in (("one", ["a", "b"]), ("same", ["a", "b"]), ("turned", ["b", "a"])):
        put(store, name, len(name) * 100, 6, labels=labels, pad_token_id=3)
    mix = make_mix(store, parse_ref("both"), parse_mix("one,same"))[1]
    assert (mix.meta["labels"], mix.meta["pad_token_id"]) == (["a", "b"], 3)
    with pytest.raises(UsageError, match="turned numbers its labels otherwise than one"):
        make_mix(store, parse_ref("both"), parse_mix("one,turned"))


@settings(max_examples=20)
@given(count=st.integers(600, 5000), block=st.integers(1, 40), epoch=st.integers(0, 3))
def test_a_large_dataset_is_gone_through_window_by_window(count: int, block: int, epoch: int) -> None:
    rows = rows_of(object_id(b"x"), count, (4 << 20) // block)
    order = order_of(rows, 3)
    seen = np.concatenate([order.batch(step, 1) for step in range(epoch * count, (epoch + 1) * count)])
    assert sorted(seen.tolist()) == list(range(count))
    for first in range(0, count, rows.window * rows.block):
        window = seen[first : first + rows.window * rows.block]
        assert len(np.unique(window // rows.block)) <= rows.window + 1

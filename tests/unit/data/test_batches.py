from collections.abc import Sequence

import numpy as np
import pytest

from llmos_cli.data import batches
from llmos_cli.data.batches import TokenRows
from llmos_cli.data.encode import Encoded
from llmos_cli.data.order import batch_indices
from llmos_cli.data.shards import Shape, write_shards
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import Manifest
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store
from llmos_cli.store.transaction import Tensor, begin

NAMES = {2: "U16", 4: "U32"}


def tensor(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name, NAMES[array.dtype.itemsize], array.shape, array.tobytes)


def dataset(store: Store, shards: Sequence[np.ndarray], tail: np.ndarray | None = None) -> Manifest:
    entries = []
    with begin(store, purpose="test") as tx:
        for number, shard in enumerate(shards):
            tensors = [tensor("tokens", shard)]
            if tail is not None and number == len(shards) - 1:
                tensors.append(tensor("tail", tail))
            entries.append(tx.add_tensors(f"tokens-{number:05}-of-{len(shards):05}.safetensors", tensors))
        manifest = Manifest("dataset", tuple(entries), {"task": "lm"})
        tx.commit(manifest, message="test")
    return manifest


def numbered(rows: int, seq_len: int, dtype: str, first: int = 0) -> np.ndarray:
    return (np.arange(rows * seq_len) + first * seq_len).reshape(rows, seq_len).astype(dtype)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_rows_are_found_across_shards_in_any_order(store: Store, dtype: str) -> None:
    shards = [numbered(5, 4, dtype), numbered(5, 4, dtype, 5), numbered(2, 4, dtype, 10)]
    rows = TokenRows(store, dataset(store, shards))
    everything = np.concatenate(shards)
    assert (rows.rows, rows.seq_len) == (12, 4)
    for indices in ([0], [11, 0, 4, 5, 9, 10], [3, 3], []):
        batch = rows.row_batch(np.array(indices, np.int64))
        assert batch.dtype == np.int64
        assert batch.shape == (len(indices), 4)
        assert batch.tolist() == everything[np.array(indices, int)].tolist()


def test_in_order_gives_every_token_once_and_the_tail_last(store: Store) -> None:
    shards = [numbered(5, 4, "<u2"), numbered(2, 4, "<u2", 5)]
    rows = TokenRows(store, dataset(store, shards, np.array([90, 91, 92], "<u2")))
    parts = list(rows.in_order(3))
    assert [part.input_ids.shape for part in parts] == [(3, 4), (3, 4), (1, 4), (1, 3)]
    assert np.concatenate([part.input_ids.ravel() for part in parts]).tolist() == [*range(28), 90, 91, 92]


def test_a_tail_of_one_token_predicts_nothing_and_is_left_out(store: Store) -> None:
    rows = TokenRows(store, dataset(store, [numbered(1, 4, "<u2")], np.array([9], "<u2")))
    assert [part.input_ids.shape for part in rows.in_order(8)] == [(1, 4)]
    assert rows.tail().tolist() == [9]


def test_less_than_a_row_is_only_a_tail(store: Store) -> None:
    rows = TokenRows(store, dataset(store, [numbered(0, 4, "<u2")], np.array([1, 2], "<u2")))
    assert rows.rows == 0
    assert [part.input_ids.tolist() for part in rows.in_order(2)] == [[[1, 2]]]


def test_rows_that_lie_across_blocks_come_whole_and_memory_is_bounded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = numbered(200, 7, "<u4")
    manifest = dataset(store, [everything[:120], everything[120:]])
    monkeypatch.setattr(batches, "CHUNK_BYTES", 64)  # two rows of 28 bytes
    rows = TokenRows(store, manifest, cache_bytes=4 * 64)
    for step in range(40):
        indices = batch_indices(object_id(b"x"), 0, step, 16, 200)
        assert rows.row_batch(indices).tolist() == everything[indices].tolist()
    assert rows._tokens.held.nbytes <= 4 * 64


@pytest.mark.parametrize("index", [-1, 3])
def test_a_row_that_is_not_there_is_an_error(store: Store, index: int) -> None:
    rows = TokenRows(store, dataset(store, [numbered(3, 4, "<u2")]))
    with pytest.raises(IndexError, match="outside the 3 rows"):
        rows.row_batch(np.array([index]))


def test_other_kinds_are_refused(store: Store) -> None:
    with begin(store, purpose="test") as tx:
        manifest = Manifest("model", (tx.add_bytes("config.json", b"{}"),))
        tx.commit(manifest, message="test")
    with pytest.raises(UsageError, match="is a model without token shards"):
        TokenRows(store, manifest)


def test_shards_of_different_shape_are_damage(store: Store) -> None:
    with pytest.raises(Damaged, match="tokens-00001-of-00002"):
        TokenRows(store, dataset(store, [numbered(3, 4, "<u2"), numbered(3, 5, "<u2")]))


def test_a_tail_as_long_as_a_row_is_damage(store: Store) -> None:
    with pytest.raises(Damaged, match="malformed tail"):
        TokenRows(store, dataset(store, [numbered(3, 4, "<u2")], np.arange(4).astype("<u2"))).tail()


def test_a_flipped_bit_is_named_and_never_a_batch(store: Store) -> None:
    noise = np.random.default_rng(0).integers(0, 60000, (64, 32)).astype("<u2")
    manifest = dataset(store, [noise])
    rows = TokenRows(store, manifest)
    (pack,) = store.packs.rglob("*.pack")
    data = bytearray(pack.read_bytes())
    at = data.index(noise.tobytes()[:64]) if noise.tobytes()[:64] in data else len(data) // 2
    data[at + 5] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    with pytest.raises(Damaged, match="object"):
        rows.row_batch(np.arange(64))


def packed(
    store: Store, documents: Sequence[Sequence[int]], *, seq_len: int = 8, shard_rows: int = 3, loss: bool = False
) -> Manifest:
    """A dataset of these documents; with `loss`, even tokens are not to be learned."""
    ids = np.array([token for document in documents for token in document], "<u2")
    ends = np.cumsum([len(document) for document in documents])
    more = {"loss": (ids % 2).astype(np.uint8)} if loss else {}
    run = Encoded(ids, ends, 1, np.zeros((len(ends), 3), np.int64), **more)
    with begin(store, purpose="test") as tx, Silent().task("x") as task:
        shape = Shape("chat" if loss else "lm", seq_len, shard_rows * seq_len * 2, np.dtype("<u2"), 9999)
        made = write_shards(tx, iter([run]), shape, task=task)
        manifest = Manifest("dataset", made.files, made.facts(shape))
        tx.commit(manifest, message="test")
    return manifest


@pytest.mark.parametrize("loss", [False, True])
def test_a_batch_tells_documents_apart(store: Store, loss: bool) -> None:
    """Documents of which every token names document and position, so that a batch can be checked token by token."""
    sizes = np.random.default_rng(1).integers(1, 20, 30).tolist()
    documents = [[100 * (number + 1) + at for at in range(size)] for number, size in enumerate(sizes)]
    rows = TokenRows(store, packed(store, documents, loss=loss))
    seen = []
    for batch in rows.in_order(1000):
        assert batch.position_ids is not None
        assert batch.document_ids is not None
        assert batch.learned is not None
        for ids, positions, numbers, learned in zip(
            batch.input_ids, batch.position_ids, batch.document_ids, batch.learned, strict=True
        ):
            for number in range(numbers.max() + 1):
                (here,) = np.nonzero(numbers == number)
                segment = ids[here]
                assert np.unique(segment // 100).size == 1
                assert (np.diff(segment) == 1).all()
                assert positions[here].tolist() == list(range(len(here)))
                wanted = (segment % 2 == 1) if loss else np.ones(len(here), bool)
                wanted[0] = False
                assert learned[here].tolist() == wanted.tolist()
                seen += segment.tolist()
            assert (ids[numbers < 0] == 9999).all()
            assert not learned[numbers < 0].any()
    assert sorted(seen) == sorted(token for document in documents for token in document)


def test_of_whole_rows_nothing_more_is_told(store: Store) -> None:
    rows = TokenRows(store, packed(store, [list(range(16)), list(range(8)), [1, 2]]))
    assert rows.batch(np.arange(3)).learned is None
    assert rows.batch(np.arange(4)).learned is not None


def test_few_shards_are_opened(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = packed(store, [[n] * 8 for n in range(300)])
    opened: list[str] = []
    original = batches.open_shard
    monkeypatch.setattr(batches, "open_shard", lambda s, entry: opened.append(entry.path) or original(s, entry))
    rows = TokenRows(store, manifest)
    assert rows.batch(np.array([151])).input_ids.tolist() == [[151] * 8]
    assert opened == ["tokens-00000-of-00100.safetensors", "tokens-00050-of-00100.safetensors"]


def test_a_shard_with_fewer_rows_than_the_dataset_says_is_damage(store: Store) -> None:
    manifest = packed(store, [[n] * 8 for n in range(7)])
    lying = Manifest("dataset", manifest.files, {**manifest.meta, "splits": {"train": {"rows": 9}}})
    with pytest.raises(Damaged, match="tokens-00002-of-00003"):
        TokenRows(store, lying).row_batch(np.array([8]))

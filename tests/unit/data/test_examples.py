import numpy as np
import pytest

from llmos_cli.data.encode import Encoded
from llmos_cli.data.examples import Examples
from llmos_cli.data.shards import Shape, write_shards
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.manifest import Manifest
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store
from llmos_cli.store.transaction import begin

U16 = np.dtype("<u2")
TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


def dataset(store: Store, *, task: str = "pair", shard_size: int = 8) -> Manifest:
    ids = np.array([token for text in TEXTS for token in text], U16)
    ends = np.cumsum([len(text) for text in TEXTS])
    origins = np.zeros((len(TEXTS), 3), np.int64)
    run = Encoded(ids, ends, 1, origins, (ids % 2).astype(np.uint8), np.array([1, 0, 2, 1]), np.array([0, 1, 1, 0]))
    with begin(store, purpose="test") as tx, Silent().task("x") as bar:
        shape = Shape(task, 8, shard_size, U16, 0)
        made = write_shards(tx, iter([run]), shape, task=bar)
        manifest = Manifest("dataset", made.files, made.facts(shape))
        tx.commit(manifest, message="test")
    return manifest


@pytest.mark.parametrize("cache_bytes", [1, 1 << 20])
def test_examples_are_padded_to_the_longest_of_the_batch(store: Store, cache_bytes: int) -> None:
    examples = Examples(store, dataset(store), pad_id=0, cache_bytes=cache_bytes)
    assert examples.count == 4
    batch = examples.batch(np.array([3, 0, 1]))
    assert batch.input_ids.tolist() == [[10, 11, 0], [1, 2, 3], [4, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 0, 1]
    assert batch.parts is not None
    assert batch.parts.tolist() == [1, 1, 0]
    assert batch.learned is not None
    assert batch.learned.tolist() == [[False, True, False], [True, False, True], [False, False, False]]


def test_a_long_example_keeps_its_end(store: Store) -> None:
    batch = Examples(store, dataset(store), pad_id=0).batch(np.array([2]), longest=3)
    assert batch.input_ids.tolist() == [[5, 6, 9]]


def test_rows_are_no_examples(store: Store) -> None:
    with pytest.raises(UsageError, match="no train examples"):
        Examples(store, dataset(store, task="lm"), pad_id=0)


def test_an_example_that_is_not_there_is_an_error(store: Store) -> None:
    with pytest.raises(IndexError, match="outside the 4"):
        Examples(store, dataset(store), pad_id=0).batch(np.array([4]))


def test_what_is_expected_is_there_and_the_same(store: Store) -> None:
    manifest = dataset(store)
    wanted = Examples(store, manifest, pad_id=0).batch(np.arange(4)).input_ids.tolist()
    examples = Examples(store, manifest, pad_id=0, cache_bytes=1)
    for _ in range(20):
        examples.expect(np.array([3, 0, 2, 1]))
        assert examples.batch(np.arange(4)).input_ids.tolist() == wanted
    examples.close()


def test_a_shard_that_cannot_be_read_is_an_error_of_who_needs_it(store: Store) -> None:
    manifest = dataset(store, shard_size=1 << 20)
    examples = Examples(store, manifest, pad_id=0)
    (pack,) = store.packs.rglob("*.pack")
    whole = pack.read_bytes()
    pack.chmod(0o644)
    pack.write_bytes(bytes(len(whole)))
    examples.expect(np.arange(4))
    with pytest.raises(Damaged):
        examples.batch(np.arange(4))
    examples.close()

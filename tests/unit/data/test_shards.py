from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from llmos_cli.data.encode import Encoded
from llmos_cli.data.layout import dtype_name, shard_entries, token_dtype
from llmos_cli.data.shards import Shape, Shards, write_shards
from llmos_cli.formats.manifest import Manifest
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file
from llmos_cli.store.transaction import begin

U16 = np.dtype("<u2")
PAD = 65535
DocumentsOf = Callable[..., list[np.ndarray]]


def stream(documents: Sequence[int], batch: int, *, split: str = "train", extra: bool = False) -> Iterator[Encoded]:
    """Documents of these lengths, numbered tokens, in runs of `batch` tokens; `extra` tells all that a task may."""
    total = sum(documents)
    ids = (np.arange(total) % 60000).astype(U16)
    ends = np.cumsum(documents)
    for start in range(0, total, batch):
        stop = min(start + batch, total)
        here = np.flatnonzero((ends > start) & (ends <= stop))
        origins = np.column_stack([here % 3, here * 10, here + 1])
        more = {"loss": (ids[start:stop] % 2).astype(np.uint8), "labels": here % 4, "parts": here % 2} if extra else {}
        yield Encoded(ids[start:stop], ends[here] - start, stop - start, origins, split=split, **more)


def write(
    store: Store, runs: Iterator[Encoded], *, task: str = "lm", seq_len: int = 10, shard_size: int = 60
) -> tuple[Shards, Manifest]:
    with begin(store, purpose="test") as tx, Silent().task("x") as bar:
        shape = Shape(task, seq_len, shard_size, U16, PAD)
        made = write_shards(tx, runs, shape, task=bar)
        manifest = Manifest("dataset", made.files, made.facts(shape))
        tx.commit(manifest, message="test")
    return made, manifest


def shards_of(store: Store, made: Shards) -> list[dict[str, np.ndarray]]:
    return [load(read_file(store, entry)) for entry in made.files]


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=lengths, seq_len=st.integers(2, 9), shard_rows=st.integers(1, 5), batch=st.integers(1, 60))
def test_every_token_is_kept_where_the_plan_says(
    store: Store, documents_of: DocumentsOf, documents: list[int], seq_len: int, shard_rows: int, batch: int
) -> None:
    runs = stream(documents, batch, extra=True)
    made, manifest = write(store, runs, seq_len=seq_len, shard_size=shard_rows * seq_len * 2 + 1)
    total = sum(documents)
    found = documents_of(manifest)
    assert [ids.size for ids in found] == documents
    assert np.concatenate(found).tolist() == list(range(total))
    assert np.concatenate(documents_of(manifest, tensor="loss")).tolist() == [n % 2 for n in range(total)]
    assert (made.documents, made.tokens) == (len(documents), total)
    shards = shards_of(store, made)
    assert all(shard["tokens"].shape == (shard_rows, seq_len) for shard in shards[:-1])
    assert 1 <= len(shards[-1]["tokens"]) <= shard_rows
    assert sum(len(shard["tokens"]) for shard in shards) == made.rows
    padding = sum(int((shard["tokens"] == PAD).sum()) for shard in shards)
    assert padding == made.rows * seq_len - total
    assert np.concatenate([shard["documents"] for shard in shards]).tolist() == [
        [n % 3, n * 10, n + 1, length] for n, length in enumerate(documents)
    ]
    assert np.concatenate([shard["labels"] for shard in shards if "labels" in shard]).tolist() == [
        n % 4 for n in range(len(documents))
    ]


def test_no_more_shards_than_the_size_makes_needed(store: Store) -> None:
    made, _ = write(store, stream([7] * 1000, 500), seq_len=10, shard_size=2000)
    assert made.rows == 1000  # sevens do not pair up
    assert len(made.files) == -(-made.rows * 20 // 2000)


def test_rows_are_full_where_documents_allow_it(store: Store) -> None:
    documents = np.random.default_rng(0).integers(1, 200, 4000).tolist()
    made, manifest = write(store, stream(documents, 9999), seq_len=256, shard_size=1 << 16)
    assert manifest.meta["fill"] == round(made.tokens / (made.rows * 256), 6)
    assert made.tokens / (made.rows * 256) > 0.99


def test_the_same_documents_have_the_same_digests_in_any_rows(store: Store) -> None:
    documents = [5, 30, 1, 12, 9]
    one, _ = write(store, stream(documents, 7), seq_len=10, shard_size=60)
    two, _ = write(store, stream(documents, 100), seq_len=4, shard_size=600)
    three, _ = write(store, stream([6, 29, 1, 12, 9], 100), seq_len=4, shard_size=600)
    digests = [np.concatenate([shard["digests"] for shard in shards_of(store, made)]) for made in (one, two, three)]
    assert digests[0].tolist() == digests[1].tolist()
    assert (digests[0] == digests[2]).tolist() == [False, False, True, True, True]


def test_runs_of_other_lengths_make_the_same_shards(store: Store) -> None:
    documents = [5, 30, 1, 12, 9, 10, 20]
    made = [write(store, stream(documents, batch), shard_size=1000)[0] for batch in (1, 6, 87)]
    assert made[0].files == made[1].files == made[2].files


def test_splits_are_folders_with_counts_of_their_own(store: Store, documents_of: DocumentsOf) -> None:
    def runs() -> Iterator[Encoded]:
        yield from stream([5, 6], 4)
        yield from stream([3], 4, split="test")
        yield from stream([30, 2], 4)

    made, manifest = write(store, runs())
    assert [entry.path for entry in shard_entries(manifest, "test")] == ["test/tokens-00000-of-00001.safetensors"]
    assert [ids.size for ids in documents_of(manifest)] == [5, 6, 30, 2]
    assert [ids.size for ids in documents_of(manifest, "test")] == [3]
    assert made.splits["test"].as_json() == {"documents": 1, "tokens": 3, "rows": 1, "shards": 1, "lengths": {"4": 1}}
    assert made.rows == made.splits["train"].rows
    assert made.splits["train"].lengths == {1: 1, 3: 2, 5: 1}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=lengths, room=st.integers(1, 100), batch=st.integers(1, 60))
def test_ragged_shards_hold_whole_documents(store: Store, documents: list[int], room: int, batch: int) -> None:
    made, _ = write(store, stream(documents, batch, extra=True), task="pair", shard_size=room * 2)
    shards = shards_of(store, made)
    found = [
        shard[name][start:end].tolist()
        for name in ("tokens", "loss")
        for shard in shards
        for start, end in pairwise(shard["offsets"].tolist())
    ]
    starts = np.cumsum([0, *documents])
    expected = [list(range(start, end)) for start, end in pairwise(starts.tolist())]
    assert found == expected + [[token % 2 for token in ids] for ids in expected]
    assert all(len(shard["tokens"]) <= room or len(shard["offsets"]) == 2 for shard in shards)
    for name, values in (("labels", 4), ("parts", 2)):
        told = np.concatenate([shard[name] for shard in shards])
        assert told.tolist() == [number % values for number in range(len(documents))]
    assert made.rows == len(documents)
    assert sum(made.splits["train"].labels.values()) == len(documents)


def test_files_are_numbered_with_their_total(store: Store) -> None:
    made, _ = write(store, stream([100], 7))
    assert [entry.path for entry in made.files] == [f"tokens-{n:05}-of-00004.safetensors" for n in range(4)]


def test_a_shard_holds_at_least_one_row(store: Store) -> None:
    made, _ = write(store, stream([50], 7), shard_size=1)
    assert [shard["tokens"].shape for shard in shards_of(store, made)] == [(1, 10)] * 5


@pytest.mark.parametrize(("vocab_size", "name"), [(300, "U16"), (65536, "U16"), (65537, "U32")])
def test_tokens_take_four_bytes_only_when_they_must(vocab_size: int, name: str) -> None:
    assert dtype_name(token_dtype(vocab_size)) == name

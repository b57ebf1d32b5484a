from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from llmos_cli.data.encode import Tokens
from llmos_cli.data.shards import Shards, dtype_name, token_dtype, write_shards
from llmos_cli.formats.manifest import Manifest
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file
from llmos_cli.store.transaction import begin

U16 = np.dtype("<u2")


def stream(documents: list[int], batch: int) -> Iterator[Tokens]:
    """Documents of these lengths, numbered tokens, in runs of about `batch` tokens."""
    total = sum(documents)
    ids = (np.arange(total) % 60000).astype(U16)
    ends = np.cumsum(documents)
    for start in range(0, total, batch):
        stop = min(start + batch, total)
        yield Tokens(ids[start:stop], [int(end) - start for end in ends if start < end <= stop], stop - start)


def write(store: Store, documents: list[int], *, seq_len: int, shard_size: int, batch: int = 7) -> tuple[Shards, list]:
    with begin(store, purpose="test") as tx, Silent().task("x") as task:
        made = write_shards(tx, stream(documents, batch), seq_len=seq_len, shard_size=shard_size, dtype=U16, task=task)
        tx.commit(Manifest("dataset", made.files), message="test")
    return made, [load(read_file(store, entry)) for entry in made.files]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    seq_len=st.integers(2, 9),
    shard_rows=st.integers(1, 5),
    batch=st.integers(1, 60),
)
def test_the_stream_comes_back_whole(
    store: Store, documents: list[int], seq_len: int, shard_rows: int, batch: int
) -> None:
    made, shards = write(store, documents, seq_len=seq_len, shard_size=shard_rows * seq_len * 2 + 1, batch=batch)
    total, rows = sum(documents), sum(documents) // seq_len
    assert (made.documents, made.tokens, made.rows) == (len(documents), total, rows)
    assert len(shards) == max(1, -(-rows // shard_rows))
    assert all(shard["tokens"].shape == (shard_rows, seq_len) for shard in shards[:-1])
    assert all("tail" not in shard for shard in shards[:-1])
    parts = [shard["tokens"].ravel() for shard in shards] + [shards[-1].get("tail", np.empty(0, U16))]
    assert np.concatenate(parts).tolist() == [number % 60000 for number in range(total)]
    starts = np.concatenate([shard["document_offsets"] for shard in shards])
    assert starts.tolist() == [0, *np.cumsum(documents)[:-1].tolist()]
    for number, shard in enumerate(shards[:-1]):
        first = number * shard_rows * seq_len
        assert all(first <= start < first + shard_rows * seq_len for start in shard["document_offsets"])


def test_files_are_numbered_with_their_total(store: Store) -> None:
    made, _ = write(store, [100], seq_len=10, shard_size=60)
    assert [entry.path for entry in made.files] == [
        "tokens-00000-of-00004.safetensors",
        "tokens-00001-of-00004.safetensors",
        "tokens-00002-of-00004.safetensors",
        "tokens-00003-of-00004.safetensors",
    ]


def test_a_shard_holds_at_least_one_row(store: Store) -> None:
    made, shards = write(store, [50], seq_len=10, shard_size=1)
    assert len(made.files) == 5
    assert all(shard["tokens"].shape == (1, 10) for shard in shards)


def test_less_than_a_row_is_all_tail(store: Store) -> None:
    made, shards = write(store, [3], seq_len=10, shard_size=100)
    assert made.rows == 0
    assert shards[0]["tokens"].shape == (0, 10)
    assert shards[0]["tail"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("vocab_size", "name"), [(300, "U16"), (65536, "U16"), (65537, "U32")])
def test_tokens_take_four_bytes_only_when_they_must(vocab_size: int, name: str) -> None:
    assert dtype_name(token_dtype(vocab_size)) == name

"""Documents of a dataset: sampled, traced to where they came from, and compared with those of another."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.data.documents import _only, compare_documents, find_document, sample_documents
from llmos_cli.data.encode import Encoded
from llmos_cli.data.layout import DTYPES
from llmos_cli.data.shards import Shape, write_shards
from llmos_cli.errors import NotFound, UsageError
from llmos_cli.formats.canonical import encode
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import Manifest, Recipe, Source
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store
from llmos_cli.store.transaction import begin

LM = Shape("lm", 8, 64, DTYPES["U16"], 0)
PAIR = Shape("pair", 8, 64, DTYPES["U16"], 0)
SOURCES = (Source("a.jsonl", 10, object_id(b"a")), Source("b.jsonl", 20, object_id(b"b")))
TEXTS = [f"document {number} " + "word " * (number % 7) for number in range(30)]


@cache
def tokenizer_files() -> dict[str, bytes]:
    """Every byte is a token; 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": encode({"eos_token": "<|endoftext|>"}),
    }


def tokens(text: str) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_files()["tokenizer.json"].decode())
    return [*tokenizer.encode(text).ids, 0]


def run(texts: Sequence[str], first: int = 0, **more: Any) -> Encoded:
    """A run of whole documents; number k is record k + 1 of the first file, at byte 100 k."""
    parts = [tokens(text) for text in texts]
    ends = np.cumsum([len(part) for part in parts])
    numbers = np.arange(first, first + len(texts))
    origins = np.column_stack([0 * numbers, 100 * numbers, numbers + 1])
    return Encoded(np.concatenate(parts).astype(np.uint16), ends, sum(map(len, texts)), origins, **more)


def dataset(store: Store, stream: Iterable[Encoded], shape: Shape = LM, tokenizer: bytes = b"") -> Manifest:
    with begin(store, purpose="test") as tx, Silent().task("", total=1) as task:
        shards = write_shards(tx, stream, shape, task=task)
        held = tokenizer_files() | ({"tokenizer.json": tokenizer} if tokenizer else {})
        files = tuple(tx.add_bytes(f"tokenizer/{name}", data) for name, data in held.items())
        recipe = Recipe("shard", params={}, inputs={}, sources=SOURCES, tools={})
        manifest = Manifest("dataset", shards.files + files, {"task": shape.task, **shards.facts(shape)}, recipe)
        tx.commit(manifest, message="")
    return manifest


def test_every_document_is_found_whatever_rows_it_was_packed_into(store: Store) -> None:
    texts = [*TEXTS, "a long one, of many rows and several shards: " + "x" * 300, "the last"]
    made = dataset(store, [run(texts[:11]), run(texts[11:], first=11)])
    assert made.meta["shards"] > 2
    for number, text in enumerate(texts):
        found = find_document(store, made, number)
        assert (found.text, found.tokens) == (text, len(tokens(text)))
        assert (found.source, found.offset, found.record) == (SOURCES[0], 100 * number, number + 1)
        assert (found.split, found.number, found.cut) == ("train", number, False)


def test_pairs_come_back_as_two_texts_with_their_label(store: Store) -> None:
    questions, answers = ["who?", "what is it"], ["me", "a thing"]
    parts = np.array([len(tokens(text)) for text in questions])
    both = [[*tokens(one), *tokens(other)] for one, other in zip(questions, answers, strict=True)]
    origins = np.array([[1, 0, 1], [-1, -1, -1]])
    ids = np.concatenate(both).astype(np.uint16)
    ends = np.cumsum([len(part) for part in both])
    made = dataset(store, [Encoded(ids, ends, 1, origins, parts=parts, labels=np.array([1, 0]))], PAIR)
    first, second = sample_documents(store, made, 5)
    assert (first.text, first.second, first.label) == ("who?", "me", 1)
    assert (first.source, first.offset, first.record) == (SOURCES[1], 0, 1)
    assert (second.text, second.second, second.label) == ("what is it", "a thing", 0)
    assert (second.source, second.offset, second.record) == (None, None, None)


def test_samples_are_spread_and_the_same_each_time(store: Store) -> None:
    made = dataset(store, [run(TEXTS)])
    numbers = [document.number for document in sample_documents(store, made, 3)]
    assert numbers == [5, 15, 25]
    assert len(sample_documents(store, made, 1000)) == len(TEXTS)


def test_splits_are_numbered_each_for_itself(store: Store) -> None:
    made = dataset(store, [run(TEXTS[:4]), run(["held out"], split="valid")])
    assert find_document(store, made, 0, split="valid").text == "held out"
    with pytest.raises(NotFound, match="no document 1 in the valid split: it has 1"):
        find_document(store, made, 1, split="valid")
    with pytest.raises(NotFound, match="has no test split"):
        find_document(store, made, 0, split="test")
    with pytest.raises(UsageError, match="'dev' is no split"):
        sample_documents(store, made, 1, split="dev")


def test_only_a_dataset_has_documents(store: Store) -> None:
    made = dataset(store, [run(TEXTS[:4])])
    with pytest.raises(UsageError, match="is a model, not a dataset"):
        sample_documents(store, replace(made, kind="model"), 1)


def test_a_diff_names_what_came_and_went(store: Store) -> None:
    old = dataset(store, [run(TEXTS)])
    shuffled = [*reversed(TEXTS[3:]), "new one", TEXTS[9]]
    new = dataset(store, [run(shuffled)], replace(LM, seq_len=16, shard_size=200))
    found = compare_documents(store, old, new, shown=2)
    (split,) = found.splits
    assert (split.equal, split.added, split.removed) == (27, 2, 3)
    assert [document.text for document in split.examples_removed] == TEXTS[:2]
    assert [document.text for document in split.examples_added] == ["new one", TEXTS[9]]
    (same,) = compare_documents(store, old, old, shown=2).splits
    assert (same.equal, same.added, same.removed) == (30, 0, 0)


def test_a_document_that_changes_its_split_goes_and_comes(store: Store) -> None:
    old = dataset(store, [run(TEXTS)])
    new = dataset(store, [run(TEXTS[1:]), run(TEXTS[:1], split="valid")])
    train, valid = compare_documents(store, old, new, shown=1).splits
    assert (train.split, train.equal, train.added, train.removed) == ("train", 29, 0, 1)
    assert (valid.split, valid.equal, valid.added, valid.removed) == ("valid", 0, 1, 0)


def test_labels_are_part_of_what_a_document_is(store: Store) -> None:
    shape = replace(PAIR, task="classify")
    old, new = (dataset(store, [run(TEXTS[:2], labels=np.array(labels))], shape) for labels in ([0, 1], [0, 0]))
    (split,) = compare_documents(store, old, new, shown=1).splits
    assert (split.equal, split.added, split.removed) == (1, 1, 1)


def test_with_another_tokenizer_nothing_is_compared(store: Store) -> None:
    old = dataset(store, [run(TEXTS)])
    new = dataset(store, [run(TEXTS)], tokenizer=tokenizer_files()["tokenizer.json"] + b"\n")
    found = compare_documents(store, old, new, shown=1)
    assert found.splits == ()
    assert found.problem is not None
    assert "different tokenizers" in found.problem


@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)))
def test_what_one_has_more_often_is_counted_so(these: list[int], those: list[int]) -> None:
    mine, others = np.array(these, np.uint64), np.array(those, np.uint64)
    left = [these[at] for at in _only(mine, others)]
    for value in set(these):
        assert left.count(value) == max(0, these.count(value) - those.count(value))
    assert list(_only(mine, others)) == sorted(_only(mine, others))

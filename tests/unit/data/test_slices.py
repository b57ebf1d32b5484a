"""Slices of a job: each alone, after a kill, in another process; and what each task makes of a record."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.data import corpus as corpora
from llmos_cli.data import make as making
from llmos_cli.data.make import Made, Request, make_dataset, parse_splits
from llmos_cli.data.slices import Job, LeftOut, encode_kept, encode_slice, split_of
from llmos_cli.errors import LlmosError, NotFound, UsageError
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.objects import read_file


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make(store: Store, path: Path, name: str = "web", **options: Any) -> Made:
    request = Request((str(path),), options.pop("tokenizer", "train:300"), 16, 4096, **options)
    return make_dataset(store, RefName(name), request, progress=Silent())


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of several slices."""
    monkeypatch.setattr(corpora, "SLICE_BYTES", 2000)
    return write_lines(tmp_path / "many.jsonl", [{"text": f"document {n} says {n * n}"} for n in range(400)])


def job_of(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Job:
    jobs: list[Job] = []
    plan_job = making._plan_job

    def remember(*args: Any) -> Any:
        found = plan_job(*args)
        jobs.append(found[0])
        return found

    monkeypatch.setattr(making, "_plan_job", remember)
    make(store, path, **options)
    return jobs[0]


def test_a_slice_can_be_done_elsewhere_and_is_the_same(
    store: Store, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(store, many, monkeypatch, splits={"valid": 0.2})
    sent = pickle.loads(pickle.dumps(job))
    assert len(job.slices) > 3
    for number in reversed(range(len(job.slices))):
        here, there = list(encode_slice(job, number)), list(encode_slice(sent, number))
        for one, other in zip(here, there, strict=True):
            assert not isinstance(one, LeftOut)
            assert not isinstance(other, LeftOut)
            assert one.split == other.split
            assert np.array_equal(one.ids, other.ids)
            assert np.array_equal(one.origins, other.origins)


def test_what_is_kept_of_a_slice_is_what_it_gives(store: Store, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with many.open("a") as file:
        file.write("half a line\n")
    job = job_of(store, many, monkeypatch, skip_bad=True)
    last = len(job.slices) - 1
    first, again = list(encode_kept(store, job, last)), list(encode_kept(store, job, last))
    assert len(first) == len(again) > 1
    for one, other in zip(first, again, strict=True):
        if isinstance(one, LeftOut):
            assert one == other
        else:
            assert np.array_equal(one.ids, other.ids)  # type: ignore[union-attr]
            assert one.text_bytes == other.text_bytes  # type: ignore[union-attr]


def test_a_stopped_run_goes_on_and_ends_in_the_same_id(
    store: Store, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    encode = making.encode_kept

    def stop_at_the_third(store: Store, job: Job, number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return encode(store, job, number)

    monkeypatch.setattr(making, "encode_kept", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make(store, many)
    monkeypatch.setattr(making, "encode_kept", encode)
    assert len(list(store.tmp.glob("*.part"))) == 2

    from llmos_cli.data import slices

    encode_one = slices.encode_slice

    def count(job: Job, number: int) -> Any:
        done.append(number)
        return encode_one(job, number)

    monkeypatch.setattr(slices, "encode_slice", count)
    made = make(store, many)
    assert done
    assert 0 not in done
    assert 1 not in done
    assert not list(store.tmp.glob("*.part"))
    init_store(tmp_path / "other")
    with open_store(tmp_path / "other") as other:
        assert make(other, many).id == made.id


def test_a_kept_slice_that_is_damaged_is_done_anew(store: Store, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(store, many, monkeypatch)
    first = list(encode_kept(store, job, 0))
    (kept,) = store.tmp.glob("*.part")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    again = list(encode_kept(store, job, 0))
    assert np.array_equal(again[0].ids, first[0].ids)  # type: ignore[union-attr]


def test_documents_stay_in_their_split_when_others_come(store: Store, tmp_path: Path) -> None:
    shares = parse_splits("valid=0.2,test=0.1")
    found = [split_of(object_id(str(number).encode()), shares) for number in range(2000)]
    assert 300 < found.count("valid") < 500
    assert 130 < found.count("test") < 270
    wider = {"valid": 0.3, "test": 0.1}
    assert all(
        split_of(object_id(str(number).encode()), wider) == before
        for number, before in enumerate(found)
        if before != "train"
    )


@pytest.mark.parametrize("text", ["valid", "valid=2", "train=0.5", "valid=0.5,test=0.5", "valid=x", "valid=nan"])
def test_splits_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--split"):
        parse_splits(text)


def test_a_classifiers_labels_are_numbered_and_kept_for_a_test_set(store: Store, tmp_path: Path) -> None:
    rows = [{"text": f"film {n}", "label": ["bad", "good", "fair"][n % 3]} for n in range(30)]
    made = make(store, write_lines(tmp_path / "train.jsonl", rows), task="classify")
    assert made.manifest.meta["labels"] == ["bad", "fair", "good"]
    test = write_lines(tmp_path / "test.jsonl", rows[1:2])
    held = make(store, test, "held", task="classify", tokenizer="web", labels_from="web")
    assert held.manifest.meta["labels"] == ["bad", "fair", "good"]
    assert held.manifest.meta["splits"]["train"]["labels"] == {"2": 1}  # type: ignore[index,call-overload]
    odd = write_lines(tmp_path / "odd.jsonl", [rows[0], {"text": "x", "label": "superb"}])
    with pytest.raises(UsageError, match=r"line 2 of .*odd\.jsonl .* has the label 'superb', which .* does not know"):
        make(store, odd, "odd", task="classify", tokenizer="web", labels_from="web")


@pytest.mark.parametrize(
    ("task", "record", "why"),
    [
        ("classify", {"text": "x", "label": None}, "neither a word nor a whole number"),
        ("classify", {"text": 5, "label": 1}, "not a string"),
        ("classify", {"label": 1, "other": "x"}, "no field 'text'"),
        ("pair", {"first": "x", "second": ""}, "empty field 'second'"),
        ("seq2seq", {"source": "x"}, "no field 'target'"),
        ("chat", {"messages": "hello"}, "not a list of messages"),
        ("chat", {"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
        ("chat", {"messages": [{"role": "assistant", "content": "<|im_end|>"}]}, "control token"),
    ],
)
def test_a_record_that_does_not_suit_the_task_is_named(
    store: Store, tmp_path: Path, task: str, record: dict[str, Any], why: str
) -> None:
    good = {
        "classify": {"text": "a", "label": 1},
        "pair": {"first": "a", "second": "b"},
        "seq2seq": {"source": "a", "target": "b"},
        "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    }[task]
    path = write_lines(tmp_path / "a.jsonl", [good, record, good])
    with pytest.raises(UsageError, match=rf"line 2 of .*a\.jsonl \(at byte \d+\) .*{why}"):
        make(store, path, task=task)
    made = make(store, path, task=task, skip_bad=True)
    assert made.manifest.meta["documents"] == 2
    report = made.manifest.file("report/left-out.jsonl")
    assert report is not None
    line = json.loads(read_file(store, report))
    assert (line["file"], line["record"]) == ("a.jsonl", 2)
    assert line["offset"] == len(json.dumps(good)) + 1


def shard_of(store: Store, made: Made) -> dict[str, np.ndarray]:
    from safetensors.numpy import load

    (entry,) = (entry for entry in made.manifest.files if entry.path.startswith("tokens-"))
    return load(read_file(store, entry))


def test_pairs_and_translations_tell_where_the_second_text_begins(store: Store, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"question": "who is it", "passage": "it is me"}] * 3)
    shard = shard_of(store, make(store, path, task="pair", tokenizer="train:wordpiece:300"))
    first = shard["tokens"][: shard["offsets"][1]]
    assert (first[0], first[-1]) == (2, 3)  # [CLS] and [SEP]
    assert first[shard["parts"][0] - 1] == 3
    path = write_lines(tmp_path / "b.jsonl", [{"src": "one two", "tgt": "eins zwei"}] * 3)
    shard = shard_of(store, make(store, path, "mt", task="seq2seq"))
    at = shard["parts"][0]
    assert shard["loss"][: shard["offsets"][1]].tolist() == [0] * at + [1] * (shard["offsets"][1] - at)


def test_duplicates_go_and_are_reported(store: Store, tmp_path: Path) -> None:
    long = " ".join(f"word{n}" for n in range(100))
    rows = [{"text": long}, {"text": "other"}, {"text": long}, {"text": long.replace("word50", "else")}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert make(store, path).manifest.meta["documents"] == 4
    assert make(store, path, dedup="exact").manifest.meta["documents"] == 3
    made = make(store, path, dedup="near")
    assert made.manifest.meta["duplicates"] == {"kind": "near", "removed": 2, "equal": 1, "near": 1}
    report = made.manifest.file("report/duplicates.jsonl")
    assert report is not None
    lines = [json.loads(line) for line in read_file(store, report).splitlines()]
    assert [(line["record"], line["like"]["record"], line["how"]) for line in lines] == [
        (3, 1, "equal"),
        (4, 1, "near"),
    ]
    assert made.manifest.recipe is not None
    assert "rensa" in made.manifest.recipe.tools


def test_a_table_without_the_fields_names_those_it_has(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("stars,words,more\n1,x,y\n")
    with pytest.raises(UsageError, match="its fields are stars, words, more") as caught:
        make(store, tmp_path / "a.csv", task="classify")
    assert "--field text=KEY,label=KEY" in (caught.value.hint or "")
    made = make(store, tmp_path / "a.csv", task="classify", field="text=words,label=stars")
    assert made.manifest.meta["labels"] == ["1"]


def test_plain_text_has_no_records(store: Store, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.txt is plain text, and task classify needs records"):
        make(store, folder, task="classify")


def test_masked_words_need_a_mask(store: Store, folder: Path) -> None:
    with pytest.raises(UsageError, match="has no mask token") as caught:
        make(store, folder, task="mlm", tokenizer="train:bpe:300")
    assert "wordpiece" in (caught.value.hint or "")
    made = make(store, folder, task="mlm")
    assert made.manifest.meta["mask_token_id"] == 4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"task": "poetry"}, UsageError),
        ({"task": "classify", "field": "label=x,text"}, UsageError),
        ({"labels_from": "web"}, UsageError),
        ({"task": "classify", "labels_from": "gone"}, NotFound),
        ({"tokenizer": "train:magic:300"}, UsageError),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    store: Store, folder: Path, options: dict[str, Any], error: type[LlmosError]
) -> None:
    with pytest.raises(error):
        make(store, folder, **options)

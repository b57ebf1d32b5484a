"""What `llmos eval` measures of each task, and what it refuses; made by real, if tiny, runs."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmos_cli.data.make import Request, make_dataset
from llmos_cli.errors import LlmosError, NotFound, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.train.config import Options
from llmos_cli.train.evaluate import TaskReport, evaluate_task
from llmos_cli.train.plan import make_plan
from llmos_cli.train.run import run
from llmos_cli.train.scoring import macro_f1

SEQ = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes that one word tells, scores, digits to words; a model trained on each."""
    root = tmp_path_factory.mktemp("eval") / ".llmos"
    init_store(root)
    words = ["zero", "one", "two", "three"]
    lines = {
        "classify": [f"{'good' if n % 2 else 'bad'} {n % 5},{n % 2}" for n in range(80)],
        "other": [f"{'good' if n % 2 else 'bad'} {n % 5},{'up' if n % 2 else 'down'}" for n in range(80)],
        "pair": [f"say {n % 5},{'high' if n % 2 else 'low'},{0.25 + n % 2 / 2}" for n in range(80)],
        "seq2seq": [f"{n % 4},one {words[n % 4]} is {words[n % 4]} good" for n in range(32)],
    }
    heads = {"classify": "text,label", "other": "text,label", "pair": "first,second,label", "seq2seq": "source,target"}
    with open_store(root) as store:
        (root.parent / "bare.csv").write_text("text,label\nnone,0\nset aside,1\n")
        bare = Request((str(root.parent / "bare.csv"),), "train:270", SEQ, 1 << 20, task="classify")
        make_dataset(store, parse_ref("bare"), bare, progress=Silent())
        for name, rows in lines.items():
            source = root.parent / f"{name}.csv"
            source.write_text("\n".join([heads[name], *rows]) + "\n")
            task = "classify" if name == "other" else name
            tokenizer = "train:270" if name == "classify" else "classify"
            request = Request((str(source),), tokenizer, SEQ, 1 << 20, task=task, splits={"valid": 0.2})
            make_dataset(store, parse_ref(name), request, progress=Silent())
        for name in ("classify", "pair", "seq2seq"):
            options = Options(steps=150 if name == "seq2seq" else 40, batch=16, depth=1, lr=3e-3)
            plan = make_plan(store, f"{name}-model", data=name, model=None, options=options)
            run(store, plan, progress=Silent())
    return root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Iterator[Store]:
    shutil.copytree(made, tmp_path / ".llmos")
    with open_store(tmp_path / ".llmos") as opened:
        yield opened


def at(store: Store, name: str) -> ObjectId:
    entry = read_ref(store, parse_ref(name))
    assert entry is not None
    return entry.id


def scored(store: Store, name: str, data: str | None = None, **more: object) -> TaskReport:
    return evaluate_task(
        store,
        at(store, f"{name}-model"),
        at(store, data or name),
        progress=Silent(),
        **more,
    )  # type: ignore[arg-type]


def test_a_classifier_is_measured_and_the_answer_kept(store: Store) -> None:
    report = scored(store, "classify", split="valid")
    assert report.metrics["accuracy"] == report.metrics["macro_f1"] == 1.0
    assert 0 < report.metrics["loss"] < 0.3
    again = scored(store, "classify", split="valid")
    assert (again.id, again.made_before) == (report.id, True)
    assert scored(store, "classify", max_rows=7).rows == 7


def test_batches_do_not_change_what_is_measured(store: Store) -> None:
    assert scored(store, "classify", batch=1).metrics == pytest.approx(
        scored(store, "classify", batch=13).metrics, 1e-4
    )


def test_scores_are_correlated(store: Store) -> None:
    report = scored(store, "pair")
    assert report.metrics["pearson"] > 0.9
    assert report.metrics["loss"] < 0.05


def test_what_is_written_is_held_against_the_targets(store: Store) -> None:
    report = scored(store, "seq2seq")
    assert report.metrics["exact_match"] > 0.7
    assert report.metrics["bleu"] > 70
    assert report.metrics["accuracy"] > 0.9


def test_what_would_be_a_wrong_answer_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="labels down, up, the model knows 0, 1"):
        scored(store, "classify", "other")
    with pytest.raises(LlmosError, match="is not trained for the task classify"):
        evaluate_task(store, at(store, "seq2seq-model"), at(store, "classify"), progress=Silent())


def test_a_split_set_aside_is_scored_while_training_and_changes_nothing(store: Store) -> None:
    options = Options(steps=6, batch=8, depth=1, seed=5)
    plan = make_plan(store, "watched-model", data="classify", model=None, options=options, eval_every=3)
    watched = run(store, plan, progress=Silent())
    assert watched.log is not None
    lines = [json.loads(line) for line in watched.log.read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert {"eval_loss", "eval_accuracy", "eval_macro_f1"} <= set(lines[-1])
    alone = make_plan(store, "alone", data="classify", model=None, options=options)
    assert alone.made == watched.id
    assert run(store, dataclasses.replace(alone, made=None), progress=Silent()).id == watched.id
    assert scored(store, "watched", "classify", split="valid").metrics["loss"] == pytest.approx(0.7, abs=0.3)
    with pytest.raises(NotFound, match="has no valid split"):
        make_plan(store, "x", data="bare", model=None, options=options, eval_every=3)


def test_macro_f1_counts_labels_alike() -> None:
    true, said = np.array([0, 0, 0, 0, 1, 2]), np.array([0, 0, 0, 1, 1, 0])
    assert macro_f1(said, true) == pytest.approx(np.mean([2 * 3 / 8, 2 * 1 / 3, 0]))

"""What is left of a run's checkpoints, and when."""

import dataclasses
from typing import Any

import pytest

from llmos_cli.errors import LlmosError, UsageError
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.models.load import load_model
from llmos_cli.progress import Silent
from llmos_cli.store.fsck.fsck import check
from llmos_cli.store.gc.gc import plan_gc
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.point import point
from llmos_cli.store.refs.refs import ref_history, ref_names
from llmos_cli.store.refs.resolve import resolve
from llmos_cli.train.checkpoints import retention
from llmos_cli.train.config import Options, Retention
from llmos_cli.train.plan import make_plan
from llmos_cli.train.result import Trained
from llmos_cli.train.run import run

OPTIONS = Options(steps=12, batch=4, depth=1)


def train(store: Store, options: Options = OPTIONS, **more: Any) -> Trained:
    more = {"save_every": 2} | more
    return run(store, make_plan(store, "a", data="text", model=None, options=options, **more), progress=Silent())


def steps(store: Store, ref: str) -> list[object]:
    """The steps that a ref's log still reaches, newest first."""
    history = ref_history(store, parse_ref(ref))
    ids = [move.id for move in history] + ([history[-1].previous] if history[-1].previous else [])
    return [read_manifest(store, oid).meta["step"] for oid in ids if oid]


def test_without_being_asked_every_checkpoint_stays_in_the_log(store: Store) -> None:
    train(store)
    assert steps(store, "a:checkpoint") == [12, 10, 8, 6, 4, 2]


def test_the_newest_few_stay_and_the_space_of_the_others_is_given_back(store: Store) -> None:
    done = train(store, keep=Retention(last=3))
    assert steps(store, "a:checkpoint") == [12, 10, 8]
    assert resolve(store, "a:checkpoint~2").id
    with pytest.raises(LlmosError):
        resolve(store, "a:checkpoint~3")
    left = plan_gc(store, grace_seconds=0)
    assert left.unreachable_bytes < 0.1 * left.live_bytes
    assert not check(store, quick=False, progress=Silent()).problems
    assert load_model(store, read_manifest(store, done.id))


def test_the_newest_two_are_the_least(store: Store) -> None:
    train(store, keep=Retention(last=2))
    assert steps(store, "a:checkpoint") == [12, 10]
    with pytest.raises(UsageError, match="fall back"):
        Retention(last=1)


def test_the_log_of_another_run_is_not_shortened(store: Store) -> None:
    train(store)
    train(store, dataclasses.replace(OPTIONS, lr=0.5), keep=Retention(last=2))
    assert [move.sequence for move in ref_history(store, parse_ref("a:checkpoint"))] == [12, 6, 5, 4, 3, 2, 1]


def test_every_so_many_steps_the_weights_stay_without_the_state(store: Store) -> None:
    done = train(store, keep=Retention(last=2, every=3), save_every=5)
    assert steps(store, "a:checkpoint") == [12, 10]
    kept = {ref.tag for ref in ref_names(store) if ref.name == "a"}
    assert kept == {"latest", "checkpoint", "step-3", "step-6", "step-9", "step-12"}
    model = read_manifest(store, resolve(store, "a:step-9").id)
    assert model.kind == "model"
    assert not [entry.path for entry in model.files if entry.path.startswith("training/")]
    assert load_model(store, model).num_parameters() == model.meta["parameters"]
    assert read_manifest(store, resolve(store, "a:step-12").id).files == read_manifest(store, done.id).files


def test_the_best_is_the_one_with_the_least_loss_since_the_checkpoint_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that makes the loss fall and then rise; resumed, the best of before still counts."""
    seen: dict[int, float] = {}
    keep = retention.keep_by_role

    def note(store: Store, plan: Any, step: int, manifest: Any, metric: float | None) -> None:
        assert metric is not None
        seen[step] = metric
        keep(store, plan, step, manifest, metric)

    monkeypatch.setattr("llmos_cli.train.checkpoints.saver.keep_by_role", note)
    train(store, dataclasses.replace(OPTIONS, steps=24, lr=0.3, warmup=12), keep=Retention(best="loss"))
    model = read_manifest(store, resolve(store, "a:best").id)
    least = min(seen, key=lambda step: seen[step])
    assert len(seen) == 12
    assert model.meta["step"] == least != 24
    assert (model.meta["metric"], model.meta["loss"]) == ("loss", seen[least])


def test_a_name_that_is_taken_is_refused_before_training(store: Store) -> None:
    text = resolve(store, "text").id
    point(store, RefName("a", "step-4"), text, expected=None, message="mine")
    with pytest.raises(UsageError, match=r"a:step-4 is a dataset"):
        train(store, keep=Retention(every=4))
    assert train(store, keep=Retention(best="loss")).step == 12


@pytest.mark.parametrize("wrong", [{"last": 0}, {"every": 0}, {"best": "accurracy"}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--keep-"):
        Retention(**wrong)

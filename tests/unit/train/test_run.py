import dataclasses
import json
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_safetensors

from llmos_cli.errors import Interrupted, LlmosError, NoSpace, NotFound, Unsafe, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, encode_manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.load import load_model
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store, open_store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.refs import read_ref, ref_history
from llmos_cli.store.transaction import begin
from llmos_cli.train.checkpoints.saver import Saved, Saver
from llmos_cli.train.config import Options
from llmos_cli.train.loop import Diverged
from llmos_cli.train.origin import read_checkpoint
from llmos_cli.train.plan import Plan, make_plan
from llmos_cli.train.result import Trained, publish_model, use_made
from llmos_cli.train.run import Started, run

STEPS = 6
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}


def plan_of(store: Store, name: str, options: Options, **more: Any) -> Plan:
    more = {"data": "text", "model": None} | more
    return make_plan(store, name, options=options, **more)


def train(
    store: Store, name: str, options: Options, saved: Callable[[Saved], None] = lambda _: None, **more: Any
) -> Trained:
    return run(store, plan_of(store, name, options, **more), progress=Silent(), saved=saved)


class PressesCtrlC(Silent):
    """Presses it while the `at`-th step is reported."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def task(self, label: str, *, total: int | None = None, unit: str = "B") -> AbstractContextManager[Any]:
        return nullcontext(self) if label == "training" else super().task(label, total=total, unit=unit)

    def advance(self, amount: int = 1) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

    def note(self, text: str) -> None:
        pass


def interrupted(store: Store, name: str, options: Options, *, after: int, **more: Any) -> None:
    with pytest.raises(Interrupted):
        run(store, plan_of(store, name, options, **more), progress=PressesCtrlC(after))


def head(store: Store, name: str) -> ObjectId:
    entry = read_ref(store, parse_ref(name))
    assert entry is not None
    return entry.id


SCRATCH = Options(steps=STEPS, batch=4, depth=1)


@pytest.mark.parametrize(
    ("options", "model"),
    [
        (SCRATCH, None),
        (dataclasses.replace(SCRATCH, precision="bf16", accumulate=2), None),
        (Options(steps=STEPS, batch=4, config=LLAMA, seed=4), None),
        (Options(steps=STEPS, batch=4, lr=1e-3), "parent"),
    ],
    ids=["scratch", "bf16", "dropout", "from-model"],
)
def test_stopped_and_resumed_gives_the_same_ids(store: Store, options: Options, model: str | None) -> None:
    interrupted(store, "a", options, after=3, model=model, save_every=2)
    interrupted(store, "a", options, after=1, model=model, save_every=1, resume=True)
    resumed = train(store, "a", options, model=model, resume=True)
    # In a store without the run's refs, and told that nothing was made: it really trains again.
    root = store.root.with_name("fresh")
    shutil.copytree(store.root, root, ignore=shutil.ignore_patterns("a", "index.db*"))
    with open_store(root, Silent()) as fresh:
        plan = dataclasses.replace(plan_of(fresh, "b", options, model=model), made=None)
        straight = run(fresh, plan, progress=Silent())
    assert (resumed.id, resumed.checkpoint) == (straight.id, straight.checkpoint)
    assert (resumed.loss, resumed.tokens) == (straight.loss, straight.tokens)


def test_what_is_committed(store: Store) -> None:
    events: list[Saved] = []
    done = train(store, "a:v1", SCRATCH, events.append, save_every=4)
    assert [event.step for event in events] == [4, 6]
    model, checkpoint = read_manifest(store, done.id), read_manifest(store, head(store, "a:checkpoint"))
    assert head(store, "a:v1") == done.id
    assert (model.kind, checkpoint.kind) == ("model", "checkpoint")
    assert {entry.path for entry in model.files} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {entry.path for entry in checkpoint.files} - {entry.path for entry in model.files} == {
        "training/state.json",
        "training/state.safetensors",
    }
    assert done.tokens == STEPS * 4 * 31
    entry = model.file("config.json")
    assert entry is not None
    config = json.loads(read_file(store, entry))
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert load_model(store, model).num_parameters() == model.meta["parameters"]
    weights = model.file("model.safetensors")
    assert weights is not None
    assert all(tensor.dtype == torch.float32 for tensor in load_safetensors(read_file(store, weights)).values())


def test_ids_do_not_depend_on_how_often_it_was_saved(store: Store) -> None:
    often = train(store, "a", SCRATCH, save_every=1)
    plan = plan_of(store, "b", SCRATCH)
    assert plan.made == often.id
    seldom = run(store, dataclasses.replace(plan, made=None), progress=Silent())
    assert (often.id, often.checkpoint) == (seldom.id, seldom.checkpoint)


def test_the_same_again_is_there_at_once(store: Store) -> None:
    done = train(store, "a", SCRATCH)
    plan = plan_of(store, "b", SCRATCH)
    assert plan.made is not None
    again = use_made(store, plan, plan.made)
    assert (again.id, again.unchanged, again.loss) == (done.id, True, done.loss)
    assert head(store, "b") == done.id
    assert use_made(store, plan, plan.made).checkpoint is None
    assert len(ref_history(store, parse_ref("b"))) == 1


def test_a_crash_before_the_model_was_committed_costs_nothing(store: Store) -> None:
    done = train(store, "a", SCRATCH)
    plan = dataclasses.replace(plan_of(store, "a", SCRATCH), made=None)
    checkpoint = read_manifest(store, head(store, "a:checkpoint"))
    assert publish_model(store, plan, head(store, "a:checkpoint"), checkpoint).id == done.id


def test_metrics_and_progress(store: Store) -> None:
    plan = plan_of(store, "a", SCRATCH)
    started: list[Started] = []
    done = run(store, plan, progress=Silent(), started=started.append)
    assert done.log is not None
    lines = [json.loads(line) for line in done.log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    told = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "time", "seconds", "data_wait"}
    assert set(lines[0]) == told | {"memory_bytes", "goodput", "elapsed", "eta_seconds"}
    assert lines[-1]["loss"] == done.loss
    assert started[0].tokens_per_step == 4 * 31
    assert started[0].parameters > 0


def test_a_log_that_cannot_be_written_does_not_stop_training(store: Store) -> None:
    shutil.rmtree(store.root / "logs" / "train")
    (store.root / "logs" / "train").write_text("a file where the folder should be")
    progress = Silent()
    assert run(store, plan_of(store, "a", SCRATCH), progress=progress).step == STEPS
    assert any("training goes on" in warning for warning in progress.warnings)


def test_an_unfinished_run_is_neither_lost_nor_mixed(store: Store) -> None:
    interrupted(store, "a", SCRATCH, after=3, save_every=2)
    with pytest.raises(UsageError, match="already holds step 3 of 6") as caught:
        plan_of(store, "a", SCRATCH)
    assert "--resume" in (caught.value.hint or "")
    for options, data in ((dataclasses.replace(SCRATCH, lr=0.5, seed=9), "text"), (SCRATCH, "other")):
        with pytest.raises(UsageError, match=r"seed|data") as caught:
            plan_of(store, "a", options, data=data, resume=True)
    with pytest.raises(UsageError, match="depth"):
        plan_of(store, "a", Options(depth=2), resume=True)
    with pytest.raises(UsageError, match="model"):
        plan_of(store, "a", Options(), model="parent", resume=True)
    # A new run under the name starts from its beginning and says what happens to the old one.
    other = plan_of(store, "a", dataclasses.replace(SCRATCH, lr=0.5))
    assert other.resume is None
    assert "stays in its log" in other.notes[0]


def test_resume_needs_nothing_but_the_name(store: Store) -> None:
    interrupted(store, "a", SCRATCH, after=3, save_every=2)
    plan = plan_of(store, "a", Options(), data=None, resume=True)
    assert plan.start == 3
    assert plan.recipe == plan_of(store, "a", SCRATCH, resume=True).recipe


def test_resume_without_a_checkpoint_starts_and_says_so(store: Store) -> None:
    plan = plan_of(store, "a", SCRATCH, resume=True)
    assert (plan.start, plan.resume) == (0, None)
    assert "starting at step 0" in plan.notes[0]


def test_ctrl_c_before_the_first_step_leaves_nothing(store: Store) -> None:
    def press(_: Started) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(store, plan_of(store, "a", SCRATCH), progress=Silent(), started=press)
    assert read_ref(store, parse_ref("a:checkpoint")) is None


def test_a_run_that_diverges_keeps_its_last_checkpoint(store: Store) -> None:
    options = Options(steps=40, batch=4, depth=1, lr=1e30, warmup=0, clip=0.0)
    with pytest.raises(Diverged, match=r"at step \d+; the step was not applied") as caught:
        train(store, "a", options, save_every=1)
    checkpoint = read_manifest(store, head(store, "a:checkpoint"))
    assert f"holds step {checkpoint.meta['step']}" in (caught.value.hint or "")
    assert read_ref(store, parse_ref("a")) is None


def test_a_full_disk_is_known_before_the_save(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(store.root)

    def full(_: object) -> Any:
        return usage._replace(free=0)

    def fill(_: Saved) -> None:
        monkeypatch.setattr(shutil, "disk_usage", full)

    with pytest.raises(NoSpace, match="a:checkpoint holds step 2") as caught:
        train(store, "a", SCRATCH, fill, save_every=2)
    assert "llmos train a --resume" in (caught.value.hint or "")
    assert read_manifest(store, head(store, "a:checkpoint")).meta["step"] == 2
    monkeypatch.undo()
    assert train(store, "a", SCRATCH, resume=True).step == STEPS


def test_steps_go_on_while_a_checkpoint_is_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is written is the state of its step, not of those that were taken meanwhile."""
    interrupted(store, "b", SCRATCH, after=2, save_every=9)
    at_two = head(store, "b:checkpoint")
    far, write, events = threading.Event(), Saver._write, list[Saved]()

    class Runs(PressesCtrlC):
        def advance(self, amount: int = 1) -> None:
            self.left -= 1
            if self.left == 0:
                far.set()

    def write_late(*arguments: Any) -> Any:
        assert far.wait(60), "training waits for its checkpoint"
        return write(*arguments)

    monkeypatch.setattr(Saver, "_write", write_late)
    plan = plan_of(store, "a", SCRATCH, save_every=2)
    done = run(store, plan, progress=Runs(3), saved=events.append)
    assert [event.step for event in events] == [2, 4, 6]
    assert events[0].commit.id == at_two
    assert head(store, "a:checkpoint") == done.checkpoint == events[-1].commit.id


def test_what_stops_the_writer_stops_training(store: Store) -> None:
    packs, away = store.root / "packs", store.root / "away"

    def take_away(_: Saved) -> None:
        packs.rename(away)
        packs.write_text("a file where the folder should be")

    options = dataclasses.replace(SCRATCH, steps=40)
    with pytest.raises(LlmosError, match=r"step 4 could not be saved: .*; a:checkpoint holds step 2") as caught:
        train(store, "a", options, take_away, save_every=2)
    assert "llmos train a --resume" in (caught.value.hint or "")
    packs.unlink()
    away.rename(packs)
    assert read_manifest(store, head(store, "a:checkpoint")).meta["step"] == 2
    assert train(store, "a", options, resume=True).step == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "--data"),
        ({"data": "parent"}, "not a dataset"),
        ({"model": "text", "options": Options()}, "not a model"),
        ({"name": "text"}, "choose another name|is a dataset"),
        ({"name": "a:checkpoint"}, "names the checkpoints"),
        ({"save_every": 0}, "--save-every"),
        ({"model": "parent", "options": Options(depth=1)}, "both say"),
        ({"model": "parent", "data": "other", "options": Options()}, "another tokenizer"),
        ({"options": Options(config=LLAMA | {"vocab_size": 100})}, "vocabulary"),
        ({"options": Options(config=LLAMA | {"max_position_embeddings": 16})}, "rows of 32"),
    ],
)
def test_what_does_not_fit_is_refused_before_torch(store: Store, change: dict[str, Any], message: str) -> None:
    arguments = {"name": "a", "data": "text", "model": None, "options": SCRATCH} | change
    with pytest.raises(UsageError, match=message):
        make_plan(store, arguments.pop("name"), **arguments)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "no-such"},
        LLAMA | {"hidden_size": 33},
        {"model_type": "t5"},
        # It would look at the answer: every token sees the ones after it.
        {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    ],
)
def test_a_config_that_makes_no_model(store: Store, config: dict[str, Any]) -> None:
    with pytest.raises(LlmosError):
        train(store, "a", Options(steps=2, batch=2, config=config))
    assert read_ref(store, parse_ref("a")) is None


def test_a_model_with_code_of_its_own_is_unsafe(store: Store) -> None:
    parent = read_manifest(store, head(store, "parent"))
    with begin(store, purpose="test", ref=parse_ref("evil")) as tx:
        entry = tx.add_bytes("config.json", b'{"auto_map": {"AutoModel": "evil.Model"}, "model_type": "llama"}')
        files = (entry, *(other for other in parent.files if other.path != "config.json"))
        tx.commit(Manifest("model", files), message="test")
    with pytest.raises(Unsafe):
        plan_of(store, "a", Options(steps=2), model="evil")


def test_the_trained_model_keeps_what_its_parent_had(store: Store) -> None:
    done = read_manifest(store, train(store, "a", Options(steps=2, batch=2), model="parent").id)
    parent = read_manifest(store, head(store, "parent"))
    assert done.recipe is not None
    assert done.recipe.inputs["model"] == head(store, "parent")
    assert {entry.path for entry in done.files} == {entry.path for entry in parent.files}
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        assert done.file(name) == parent.file(name)


def test_manifests_say_nothing_of_the_machine(store: Store) -> None:
    done = train(store, "a", SCRATCH)
    for oid in (done.id, head(store, "a:checkpoint")):
        text = encode_manifest(read_manifest(store, oid)).decode()
        assert str(store.root) not in text
        assert "seconds" not in text


def test_steps_that_are_passed_over_are_part_of_the_recipe(store: Store) -> None:
    straight = train(store, "b", dataclasses.replace(SCRATCH, skip_steps=((3, 4), (6, 6))))
    assert straight.log is not None
    assert [json.loads(line)["step"] for line in straight.log.read_text().splitlines()] == [1, 2, 5]
    assert straight.id != train(store, "c", SCRATCH).id
    recipe = read_manifest(store, straight.id).recipe
    assert recipe is not None
    assert recipe.params["skip_steps"] == [[3, 4], [6, 6]]
    # Known only once it went wrong: the checkpoint before is of the same run, of whichever steps are passed over next.
    interrupted(store, "a", SCRATCH, after=2, save_every=9)
    assert plan_of(store, "a", Options(skip_steps=((3, 4), (6, 6))), data=None, resume=True).made == straight.id
    plan = plan_of(store, "a", Options(skip_steps=((3, 4), (6, 6))), data=None, resume=True)
    again = dataclasses.replace(plan, made=None, resume=read_checkpoint(store, plan.checkpoint_ref))
    assert again.start == 2
    done = run(store, again, progress=Silent())
    assert (done.id, done.checkpoint) == (straight.id, straight.checkpoint)
    with pytest.raises(UsageError, match="skip_steps"):
        plan_of(store, "a", dataclasses.replace(SCRATCH, lr=0.5, skip_steps=((1, 1),)), resume=True)


def test_a_fork_begins_with_the_state_of_any_checkpoint(store: Store) -> None:
    done = train(store, "a", SCRATCH, save_every=2)
    plan = plan_of(store, "b", Options(lr=0.5), data=None, fork="a@4", save_every=1)
    assert (plan.start, plan.config.lr, plan.config.depth) == (4, 0.5, 1)
    forked = run(store, plan, progress=Silent())
    assert forked.id != done.id
    recipe = read_manifest(store, forked.id).recipe
    assert recipe is not None
    assert recipe.inputs["checkpoint"] == ref_history(store, parse_ref("a:checkpoint"))[1].id
    # The state went with it: at the same settings it gives the very weights of the run it came from.
    same = train(store, "c", Options(), data=None, fork="a:checkpoint~2")
    assert same.id != done.id
    assert read_manifest(store, same.id).files == read_manifest(store, done.id).files
    # Stopped and resumed it stays the fork it is.
    interrupted(store, "d", Options(lr=0.5), after=1, data=None, fork="a@4", save_every=9)
    plan = plan_of(store, "d", Options(), data=None, resume=True)
    assert plan.recipe == recipe


@pytest.mark.parametrize(
    ("fork", "more", "error", "message"),
    [
        ("a@5", {}, NotFound, "no checkpoint of step 5"),
        ("a:latest", {}, UsageError, "is not a training checkpoint but a model"),
        ("text:latest", {}, UsageError, "is not a training checkpoint but a dataset"),
        ("none", {}, NotFound, "none:checkpoint"),
        ("a@4", {"model": "parent"}, UsageError, "--fork"),
        ("a@4", {"options": Options(depth=2)}, UsageError, "--fork"),
        ("a@4", {"data": "other"}, UsageError, "another tokenizer"),
        ("a", {}, UsageError, "nothing left of 6 steps"),
    ],
)
def test_what_cannot_be_forked_is_refused(
    store: Store, fork: str, more: dict[str, Any], error: type[LlmosError], message: str
) -> None:
    train(store, "a", SCRATCH, save_every=2)
    arguments = {"options": Options(), "data": None} | more
    with pytest.raises(error, match=message):
        plan_of(store, "b", arguments.pop("options"), fork=fork, **arguments)


def test_what_is_allowed_may_differ_and_is_recorded(store: Store) -> None:
    interrupted(store, "a", SCRATCH, after=3, save_every=9)
    checkpoint = head(store, "a:checkpoint")
    with pytest.raises(UsageError, match="lr") as caught:
        plan_of(store, "a", Options(lr=0.5), data=None, resume=True, allow=("data",))
    assert "--allow config" in (caught.value.hint or "")
    plan = plan_of(store, "a", Options(lr=0.5), data=None, resume=True, allow=("config",))
    assert any("lr (0.5 asked" in note for note in plan.notes)
    done = run(store, plan, progress=PressesCtrlC(99))
    recipe = read_manifest(store, done.id).recipe
    assert recipe is not None
    assert (recipe.params["lr"], recipe.inputs["checkpoint"]) == (0.5, checkpoint)
    assert len(ref_history(store, parse_ref("a:checkpoint"))) == 2
    # Once it has a checkpoint of its own, that is what is resumed, and nothing is left to allow.
    again = plan_of(store, "a", Options(), data=None, resume=True)
    assert (again.recipe, again.made) == (recipe, done.id)

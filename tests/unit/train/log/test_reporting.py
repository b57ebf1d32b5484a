"""What a run tells of itself: one curve, however often it was stopped."""

import json
import signal
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from llmos_cli.errors import Interrupted, UsageError
from llmos_cli.progress import Silent
from llmos_cli.store.local import Store
from llmos_cli.train.config import Options, Retention
from llmos_cli.train.log import trackers
from llmos_cli.train.log.peaks import peak_flops, peak_of
from llmos_cli.train.plan import make_plan
from llmos_cli.train.result import Trained
from llmos_cli.train.run import run

OPTIONS = Options(steps=8, batch=4, depth=1)


def train(store: Store, progress: Silent | None = None, **more: Any) -> Trained:
    more = {"data": "text", "model": None, "options": OPTIONS, "save_every": 3} | more
    return run(store, make_plan(store, "a", **more), progress=progress or Silent())


class Interrupts(Silent):
    """Presses Ctrl-C while the `at`-th step is reported; then the lines of later steps come from a kill."""

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


def log_of(store: Store) -> Path:
    (path,) = (store.root / "logs" / "train").glob("a-*.jsonl")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_tells_of_its_checkpoint_and_a_later_one_of_its_bytes(store: Store) -> None:
    train(store)
    lines = lines_of(log_of(store))
    assert {3, 6} <= {line["step"] for line in lines if "checkpoint_stall_ms" in line} <= {3, 4, 6, 7}
    told = [line for line in lines if "checkpoint_new_bytes" in line]
    assert told
    assert all(line["checkpoint_step"] < line["step"] for line in told)
    assert sum(line["checkpoint_new_bytes"] for line in told) > 0
    assert all(0 <= line["data_wait"] <= 1 and 0 < line["goodput"] <= 1 for line in lines)
    assert all(line["memory_bytes"] > 1 << 20 for line in lines)
    assert lines[-1]["eta_seconds"] == 0 < lines[0]["eta_seconds"]
    assert "mfu" not in lines[0]  # the peak of a processor is not known


def test_goodput_counts_what_came_before_a_resume_and_what_it_cost(store: Store) -> None:
    with pytest.raises(Interrupted):
        train(store, Interrupts(4))
    path = log_of(store)
    before = lines_of(path)
    # As if it had been started an hour ago, and killed after two more steps that no checkpoint holds.
    for line in before:
        line["elapsed"] += 3600
        line["goodput"] = 0.25
    lost = [{**before[-1], "step": step, "goodput": 0.9} for step in (5, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in before + lost))
    train(store, resume=True)
    after = lines_of(path)
    assert [line["step"] for line in after] == list(range(1, 9))
    assert after[4]["elapsed"] >= before[-1]["elapsed"]
    assert 0.2 < after[4]["goodput"] < 0.26


def test_a_run_that_is_begun_anew_does_not_inherit_a_past(store: Store) -> None:
    train(store)
    path = log_of(store)
    path.write_text("".join(json.dumps({**line, "elapsed": 1e6}) + "\n" for line in lines_of(path)))
    plan = make_plan(store, "b", data="text", model=None, options=OPTIONS, anew=True)
    fresh = path.with_name(f"b-{plan.key}.jsonl")
    path.rename(fresh)
    run(store, plan, progress=Silent())
    assert lines_of(fresh)[0]["elapsed"] < 1e5


def test_tensorboard_shows_one_curve_of_a_run_that_was_stopped(store: Store) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(Interrupted):
        train(store, Interrupts(5), log="tensorboard", save_every=2)
    done = train(store, resume=True, log="tensorboard")
    (folder,) = (store.root / "logs" / "train" / "tensorboard").iterdir()
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    losses = found.Scalars("loss")
    assert [point.step for point in losses] == list(range(1, 9))
    assert losses[-1].value == pytest.approx(done.loss)
    assert {"grad_norm", "lr", "tokens_per_second", "goodput"} <= set(found.Tags()["scalars"])


def test_a_tracker_that_fails_costs_a_warning(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def log(self, values: Any, step: int) -> None:
            raise ConnectionError("no network")

    monkeypatch.setattr(trackers, "_start", lambda *_: Broken())
    progress = Silent()
    assert train(store, progress, log="tensorboard").step == 8
    assert [warning for warning in progress.warnings if "no network" in warning] == [
        "tensorboard failed (no network); the run's own log goes on without it"
    ]


def test_a_tracker_that_is_not_there_is_refused_by_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--log tensorbord is not offered") as caught:
        train(store, log="tensorbord")
    assert "tensorboard" in (caught.value.hint or "")
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    for name, line in (("wandb", "pip install wandb"), ("tensorboard", "pip install 'llmos[tensorboard]'")):
        with pytest.raises(UsageError, match=f"--log {name} needs {name}") as caught:
            train(store, log=name)
        assert caught.value.hint == line


def test_the_best_may_go_by_the_score_of_a_split_set_aside(store: Store) -> None:
    with pytest.raises(UsageError, match="valid split") as caught:
        train(store, keep=Retention(best="eval_loss"))
    assert "--eval-every" in (caught.value.hint or "")


def test_peaks_are_those_of_the_card_and_the_precision() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_of("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_of("NVIDIA L40S", "fp32") == 91.6e12
    assert peak_of("NVIDIA L4", "bf16") == 121e12
    assert peak_of("Some Card", "bf16") is None
    assert peak_flops(torch.device("cpu"), "fp32") is None

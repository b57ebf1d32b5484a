import itertools
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from llmos_cli.errors import UsageError
from llmos_cli.train.average import average_of
from llmos_cli.train.checkpoints.checkpoint import capture, restore
from llmos_cli.train.config import TrainConfig
from llmos_cli.train.device import open_accelerator
from llmos_cli.train.loop import StepDone, run_steps
from llmos_cli.train.optimizer import Together, build_optimizer, learning_rate
from llmos_cli.train.tasks.language import next_tokens
from llmos_cli.train.tasks.work import Work


def rates(steps: int, warmup: int) -> list[float]:
    return [learning_rate(step, steps=steps, warmup=warmup, peak=1.0) for step in range(steps)]


def test_warms_up_to_the_peak_then_falls_to_a_tenth() -> None:
    curve = rates(100, 10)
    assert curve[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert max(curve) == 1.0
    assert curve[10] == 1.0
    assert curve[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(curve[10:]))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (2, 2), (5, 5), (3, 0)])
def test_short_runs_have_a_rate_at_every_step(steps: int, warmup: int) -> None:
    assert all(0.1 <= rate <= 1.0 for rate in rates(steps, warmup))


def test_only_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    model[0].weight.requires_grad_(True)
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1)
    decay = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {(4, 4): 0.1, (4,): 0.0}


class Run:
    """A tiny run in memory: what run.py puts together, without a store."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        torch.manual_seed(3)
        shape = LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, tie_word_embeddings=True, attention_dropout=0.1,
        )  # fmt: skip
        self.config, self.accelerator = config, accelerator
        self.model = LlamaForCausalLM(shape)
        self.raw = build_optimizer(self.model, lr=config.lr, weight_decay=config.weight_decay, name=config.optimizer)
        self.prepared, self.optimizer = accelerator.prepare(self.model, self.raw)
        self.average = average_of(self.model, self.raw, ema=config.ema)
        torch.manual_seed(config.seed)
        self.losses: list[float] = []

    def go(self, start: int, stop: int) -> None:
        enough = len(self.losses) + stop - start

        def work(step: int) -> Work:
            ids = np.random.default_rng(step % 4).integers(0, 61, (8, 16), dtype=np.int64)
            return next_tokens({"input_ids": ids}, None)

        def done(event: StepDone) -> None:
            self.average.update(event.step)
            self.losses.append(event.loss)

        run_steps(
            self.accelerator, self.prepared, self.optimizer, self.config,
            start=start, work=work, done=done, stop=lambda: len(self.losses) >= enough,
        )  # fmt: skip

    def checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What model.safetensors and training/state.safetensors would hold."""
        with self.average.shown():
            shown = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        return shown, {
            name: value.detach().clone() for name, value in capture(self.model, self.raw, self.average).items()
        }


METHODS = [
    {"optimizer": name, "lr": lr}
    for name, lr in (("adamw", 1e-2), ("muon", 1e-2), ("adafactor", 5e-2), ("sgd", 0.3), ("schedule-free", 1e-2))
] + [{"ema": 0.8, "lr": 1e-2}, {"optimizer": "muon", "ema": 0.9, "schedule": "wsd", "lr": 1e-2}]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
def test_stopped_and_restored_is_bit_equal(method: dict[str, Any]) -> None:
    config = TrainConfig(**{"steps": 9, "batch": 8, "warmup": 2, "seed": 11} | method)
    with open_accelerator("fp32") as accelerator:
        straight = Run(accelerator, config)
        straight.go(0, 9)
        first = Run(accelerator, config)
        first.go(0, 4)
        saved = first.checkpoint()
        first.go(4, 5)  # a checkpoint changes nothing for who goes on
        second = Run(accelerator, config)
        second.model.load_state_dict(saved[0])
        restore(second.model, second.raw, saved[1], "test", second.average)
        assert equal(second.checkpoint(), saved)
        second.go(4, 9)
        assert first.losses + second.losses[1:] == straight.losses
        assert equal(second.checkpoint(), straight.checkpoint())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
def test_every_method_learns_and_shows_its_average(method: dict[str, Any]) -> None:
    config = TrainConfig(**{"steps": 40, "batch": 8, "warmup": 4} | method)
    with open_accelerator("fp32") as accelerator:
        run = Run(accelerator, config)
        run.go(0, 40)
        trained = run.model.model.layers[0].mlp.up_proj.weight.detach().clone()
        with run.average.shown():
            shown = run.model.model.layers[0].mlp.up_proj.weight.detach().clone()
        assert torch.equal(run.model.model.layers[0].mlp.up_proj.weight, trained)
        assert torch.equal(shown, trained) == (config.ema is None and config.optimizer != "schedule-free")
    assert run.losses[-1] < 0.9 * run.losses[0]


def equal(one: tuple[dict[str, torch.Tensor], ...], other: tuple[dict[str, torch.Tensor], ...]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def test_muon_is_for_matrices_inside_the_body() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    )
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, name="muon")
    assert isinstance(optimizer, Together)
    names = {id(value): name for name, value in model.named_parameters()}
    held = [{names[id(p)] for group in part.param_groups for p in group["params"]} for part in optimizer.parts]
    assert held[0] == {name for name in names.values() if "proj" in name}
    assert held[1] == {name for name in names.values() if "proj" not in name}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("wsd", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    found = [learning_rate(step, steps=10, warmup=2, peak=1.0, schedule=schedule) for step in range(10)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "--optimizer lion is not offered"),
        ({"schedule": "step"}, "--schedule step is not offered"),
        ({"ema": 1.5}, "--ema 1.5 is not a number between 0 and 1"),
        ({"ema": 0.9, "optimizer": "schedule-free"}, "averages by itself"),
        ({"schedule": "wsd", "optimizer": "schedule-free"}, "which needs none"),
    ],
)
def test_what_is_not_there_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(10, 8, 1e-3, **options)

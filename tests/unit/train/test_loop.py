import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from llmos_cli.models.packed import keeps_apart
from llmos_cli.train.checkpoints.checkpoint import capture, restore
from llmos_cli.train.config import TrainConfig
from llmos_cli.train.device import open_accelerator
from llmos_cli.train.loop import Diverged, StepDone, accumulate_gradients, run_steps
from llmos_cli.train.optimizer import build_optimizer
from llmos_cli.train.tasks.language import next_tokens
from llmos_cli.train.tasks.work import Work

VOCAB, SEQ = 61, 16


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with open_accelerator("fp32") as built:
        yield built


def tiny_model(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=SEQ,
            tie_word_embeddings=True,
            attention_dropout=dropout,
        )
    )


def rows(step: int, batch: int = 8) -> Work:
    return next_tokens(
        {"input_ids": np.random.default_rng(step).integers(0, VOCAB, (batch, SEQ), dtype=np.int64)}, None
    )


def train(
    accelerator: Accelerator, config: TrainConfig, state: Any = None, start: int = 0, stop_after: int | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[StepDone]]:
    model = tiny_model(dropout=0.1)
    if state is not None:
        model.load_state_dict(state[0])
    raw = build_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    prepared, optimizer = accelerator.prepare(model, raw)
    torch.manual_seed(config.seed)
    if state is not None:
        restore(model, raw, state[1], "test")
    events: list[StepDone] = []
    run_steps(
        accelerator,
        prepared,
        optimizer,
        config,
        start=start,
        work=lambda step: rows(step, config.batch),
        done=events.append,
        stop=lambda: stop_after is not None and len(events) >= stop_after,
    )
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return weights, {name: value.clone() for name, value in capture(model, raw).items()}, events


def alone(document: np.ndarray) -> Work:
    return next_tokens({"input_ids": document[None]}, None)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_accumulation_does_not_change_the_gradient(accelerator: Accelerator) -> None:
    grads, losses = [], []
    for parts in (1, 2, 4, 8):
        model = accelerator.prepare(tiny_model())
        loss = accumulate_gradients(accelerator, model, rows(0), parts)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        losses.append(loss.item())
        assert rows(0).tokens == 8 * (SEQ - 1)
    for grad, loss in zip(grads, losses, strict=True):
        torch.testing.assert_close(grad, grads[0], rtol=1e-6, atol=1e-6)
        assert loss == pytest.approx(losses[0], abs=1e-6)


def test_the_loss_is_what_transformers_computes(accelerator: Accelerator) -> None:
    model, ids = tiny_model().train(), torch.from_numpy(rows(0).inputs["input_ids"])
    expected = model(input_ids=ids, labels=ids).loss.item()
    loss = accumulate_gradients(accelerator, model, rows(0), 4)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_documents_in_one_row_are_as_good_as_a_row_each(accelerator: Accelerator) -> None:
    """Loss and gradient: no document sees another, and none's first token is predicted from the one before."""
    documents = [np.random.default_rng(n).integers(0, VOCAB, size) for n, size in enumerate((7, 5, 3, 9, 16))]
    model = accelerator.prepare(tiny_model())
    assert keeps_apart(model, SEQ)
    total, tokens = torch.zeros(()), sum(len(document) - 1 for document in documents)
    for document in documents:
        total += accumulate_gradients(accelerator, model, alone(document), 1) * (len(document) - 1) / tokens
    grads = []
    for document in documents:  # the mean over all tokens, one row at a time
        model.zero_grad()
        accumulate_gradients(accelerator, model, alone(document), 1)
        own = torch.cat([p.grad.flatten() for p in model.parameters()])
        grads.append(own * (len(document) - 1) / tokens)
    ids, positions = np.full((3, SEQ), 1), np.zeros((3, SEQ), np.int64)
    learned = np.zeros((3, SEQ), bool)
    for row, held in enumerate(((0, 1, 2), (3,), (4,))):
        at = 0
        for document in (documents[number] for number in held):
            ids[row, at : at + len(document)] = document
            positions[row, at : at + len(document)] = np.arange(len(document))
            learned[row, at + 1 : at + len(document)] = True
            at += len(document)
        positions[row, at:] = np.arange(SEQ - at)
    model.zero_grad()
    work = next_tokens({"input_ids": ids, "position_ids": positions}, learned)
    packed = accumulate_gradients(accelerator, model, work, 3)
    assert work.counted == tokens
    assert packed.item() == pytest.approx(total.item(), abs=1e-5)
    torch.testing.assert_close(
        torch.cat([p.grad.flatten() for p in model.parameters()]), torch.stack(grads).sum(0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("accumulate", [1, 4])
def test_stopped_and_restored_is_bit_equal(accelerator: Accelerator, accumulate: int) -> None:
    config = TrainConfig(9, 8, 1e-2, warmup=2, accumulate=accumulate, seed=11)
    weights, state, events = train(accelerator, config)
    half_weights, half_state, before = train(accelerator, config, stop_after=4)
    resumed_weights, resumed_state, after = train(accelerator, config, (half_weights, half_state), start=4)
    assert equal(resumed_weights, weights)
    assert equal(resumed_state, state)
    assert [event.loss for event in before + after] == [event.loss for event in events]
    assert [event.step for event in events] == list(range(1, 10))


def test_a_stop_inside_a_step_drops_that_step(accelerator: Accelerator) -> None:
    config = TrainConfig(5, 8, 1e-2, accumulate=4, seed=1)
    model = tiny_model(dropout=0.1)
    raw = build_optimizer(model, lr=config.lr, weight_decay=0.1)
    prepared, optimizer = accelerator.prepare(model, raw)
    torch.manual_seed(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    polls = iter([False, False, False, True])
    reached = run_steps(
        accelerator, prepared, optimizer, config, start=0, work=rows, done=lambda _: None, stop=lambda: next(polls)
    )
    assert reached == 0
    assert equal(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_nothing_is_applied_when_the_loss_is_not_finite(accelerator: Accelerator) -> None:
    config = TrainConfig(5, 8, 1e-2)
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    raw = build_optimizer(model, lr=config.lr, weight_decay=0.1)
    prepared, optimizer = accelerator.prepare(model, raw)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(Diverged, match="loss became nan at step 3"):
        run_steps(accelerator, prepared, optimizer, config, start=2, work=rows, done=lambda _: None)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_clip_0_turns_clipping_off(accelerator: Accelerator) -> None:
    norms = []
    for clip in (0.0, 1e-3):
        _, _, events = train(accelerator, TrainConfig(2, 8, 1e-3, clip=clip))
        norms.append(events[0].grad_norm)
    assert norms[0] == norms[1] > 1e-3


def test_it_learns(accelerator: Accelerator) -> None:
    config = TrainConfig(30, 8, 1e-2, warmup=3)
    model = tiny_model()
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, lr=config.lr, weight_decay=0.0))
    losses: list[float] = []
    run_steps(
        accelerator,
        prepared,
        optimizer,
        config,
        start=0,
        work=lambda step: rows(0),
        done=lambda event: losses.append(event.loss),
    )
    assert losses[-1] < losses[0] / 2


def test_bf16_trains_with_fp32_weights() -> None:
    config = TrainConfig(2, 4, 1e-3, precision="bf16")
    with open_accelerator("bf16") as accelerator:
        weights, _, events = train(accelerator, config)
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert all(math.isfinite(event.loss) for event in events)

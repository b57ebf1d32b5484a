"""What a checkpoint holds is the state of its step, whatever the next step does meanwhile."""

import threading

import pytest
import torch
from torch import nn

from llmos_cli.train.checkpoints.staging import Staging


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step(model)
    optimizer.step()
    return model, optimizer


def step(model: nn.Module) -> None:
    model(torch.randn(8, 4)).square().sum().backward()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    moments = {f"{key}.{at}": value for at, held in enumerate(optimizer.state.values()) for key, value in held.items()}
    return {"weights": dict(model.state_dict()), "state": moments}


def take(staging: Staging, state: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    return {file: staging.take(file, tensors) for file, tensors in state.items()}


def test_a_copy_is_of_the_moment_it_was_begun() -> None:
    model, optimizer = trained()
    staging = Staging(model, optimizer)
    live = state_of(model, optimizer)
    before = {file: {name: tensor.clone() for name, tensor in held.items()} for file, held in live.items()}
    copies = take(staging, live)
    assert not staging.is_done
    step(model)  # changes the buffers of the norm, not what the optimizer updates
    assert not torch.equal(live["weights"]["1.running_mean"], before["weights"]["1.running_mean"])
    thread = threading.Thread(target=staging.copy)
    thread.start()
    staging.wait()
    optimizer.step()
    thread.join()
    for file, held in before.items():
        for name, tensor in held.items():
            assert torch.equal(copies[file][name], tensor), name
    assert not torch.equal(live["weights"]["0.weight"], before["weights"]["0.weight"])


def test_the_next_copy_lies_in_the_memory_of_the_one_before() -> None:
    model, optimizer = trained()
    staging = Staging(model, optimizer)
    first = take(staging, state_of(model, optimizer))
    staging.copy()
    second = take(staging, state_of(model, optimizer))
    staging.copy()
    assert staging.is_done
    assert first["weights"]["0.weight"].data_ptr() == second["weights"]["0.weight"].data_ptr()


def test_any_dtype_and_shape_is_copied_as_it_is() -> None:
    model = nn.Module()
    values = {
        "scalar": torch.tensor(3.5),
        "brief": torch.randn(3, 5).bfloat16(),
        "turned": torch.randn(4, 6).T,
        "empty": torch.zeros(0, 3),
        "whole": torch.arange(7),
    }
    for name, value in values.items():
        model.register_parameter(name, nn.Parameter(value, requires_grad=False))
    staging = Staging(model, torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    copies = take(staging, {"file": dict(model.named_parameters())})
    staging.copy()
    for name, value in values.items():
        assert torch.equal(copies["file"][name], value)
        assert copies["file"][name].dtype == value.dtype


def test_a_copy_that_fails_does_not_stop_the_next_step_for_ever() -> None:
    model, optimizer = trained()
    staging = Staging(model, optimizer)
    take(staging, state_of(model, optimizer))
    staging._late[0] = (torch.zeros(1), torch.zeros(2))
    with pytest.raises(ValueError, match="broadcast"):
        staging.copy()
    assert staging.is_done


def test_what_is_there_for_a_moment_is_copied_at_once() -> None:
    model, optimizer = trained()
    staging = Staging(model, optimizer)
    weights = dict(model.named_parameters())
    before = weights["0.weight"].detach().clone()
    copies = staging.take("weights", weights, at_once=True)
    with torch.no_grad():
        weights["0.weight"].zero_()
    staging.copy()
    assert torch.equal(copies["0.weight"], before)

import pytest
import torch

from llmos_cli.errors import Damaged
from llmos_cli.train.checkpoints.checkpoint import Position, capture, decode_position, encode_position, restore
from llmos_cli.train.optimizer import build_optimizer


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
    return model, build_optimizer(model, lr=1e-2, weight_decay=0.1)


def test_state_comes_back_bit_for_bit() -> None:
    model, optimizer = trained()
    state = {name: value.clone() for name, value in capture(model, optimizer).items()}
    drawn = torch.rand(3)
    other, again = fresh()
    restore(other, again, state, "test")
    assert torch.equal(torch.rand(3), drawn)
    back = capture(other, again)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state if not name.startswith("rng."))


def test_restored_state_has_memory_of_its_own() -> None:
    state = capture(*trained())
    other, again = fresh()
    restore(other, again, state, "test")
    ours = capture(other, again)
    assert all(ours[name].data_ptr() != state[name].data_ptr() for name in state if not name.startswith("rng."))


def test_state_of_another_model_is_damaged() -> None:
    state = dict(capture(*trained()))
    other, again = fresh()
    for broken in (
        {name: value for name, value in state.items() if not name.startswith("rng.")},
        {name: value for name, value in state.items() if name != "exp_avg.0.weight"},
        state | {"exp_avg.0.weight": torch.zeros(2, 2)},
        state | {"exp_avg.0.weight": state["exp_avg.0.weight"].double()},
        state | {"exp_avg.9.weight": torch.zeros(2, 2)},
    ):
        with pytest.raises(Damaged, match="run:checkpoint"):
            restore(other, again, broken, "run:checkpoint")


def test_position_reads_back() -> None:
    position = Position(7, 1234, 3.5)
    data = encode_position(position, {"steps": 9}, 0, "ab")
    assert decode_position(data, "x") == position
    assert encode_position(position, {"steps": 9}, 0, "ab") == data


@pytest.mark.parametrize("data", [b"", b"{}", b'{"version":2}', b'{"loss":1,"step":"3","tokens":1,"version":1}'])
def test_a_malformed_position_is_damaged(data: bytes) -> None:
    with pytest.raises(Damaged, match=r"state\.json"):
        decode_position(data, "state.json")

import pytest
import torch

from llmos_cli.errors import LlmosError
from llmos_cli.serve.sampling import Picker, Sampling

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def picks(count: int = 300, **options) -> list[int]:
    picker = Picker(Sampling(seed=3, **options))
    return [picker.pick(LOGITS) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(picks(temperature=0)) == {0}


def test_the_smallest_temperature_is_greedy_and_no_overflow() -> None:
    assert set(picks(temperature=5e-324)) == {0}


def test_the_same_seed_gives_the_same_tokens_and_another_others() -> None:
    assert picks() == picks()
    other = Picker(Sampling(seed=4))
    assert [other.pick(LOGITS) for _ in range(300)] != picks()


def test_without_a_seed_requests_differ() -> None:
    first, second = Picker(Sampling()), Picker(Sampling())
    assert [first.pick(LOGITS) for _ in range(100)] != [second.pick(LOGITS) for _ in range(100)]


def test_the_shares_are_the_probabilities() -> None:
    found = picks(4000)
    assert abs(found.count(0) / 4000 - 0.5) < 0.03


def test_top_k_draws_from_so_many() -> None:
    assert set(picks(top_k=2)) == {0, 1}
    assert set(picks(top_k=0)) == {0, 1, 2, 3}
    assert set(picks(top_k=100)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.0, {0}), (0.5, {0}), (0.51, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_draws_from_the_smallest_set_with_that_mass(top_p: float, expected: set[int]) -> None:
    assert set(picks(top_p=top_p)) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(LlmosError, match="not finite"):
        Picker(Sampling(temperature=0)).pick(torch.tensor([0.0, bad]))


def test_a_token_ruled_out_by_the_model_is_never_taken() -> None:
    picker = Picker(Sampling(seed=0))
    assert {picker.pick(torch.tensor([0.0, -torch.inf, 0.0])) for _ in range(200)} == {0, 2}

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


def test_min_p_rules_out_what_is_far_less_likely() -> None:
    assert set(picks(min_p=0.25)) == {0, 1, 2}
    assert set(picks(min_p=0.31)) == {0, 1}
    assert set(picks(min_p=0.31, top_k=1)) == {0}


def test_presence_and_frequency_count_what_was_made() -> None:
    once = Picker(Sampling(temperature=0, presence_penalty=0.8))
    assert [once.pick(LOGITS) for _ in range(4)] == [0, 1, 0, 0]  # 1 is 0.51 behind, 2 1.2: a second time costs nothing
    often = Picker(Sampling(temperature=0, frequency_penalty=0.8))
    assert [often.pick(LOGITS) for _ in range(4)] == [0, 1, 0, 2]


def test_repetition_counts_the_prompt_too() -> None:
    picker = Picker(Sampling(temperature=0, repetition_penalty=2.0), prompt=[0])
    assert picker.pick(LOGITS) == 1  # log 0.5 becomes log 0.25
    assert picker.pick(LOGITS) == 0


def test_a_bias_is_added() -> None:
    assert Picker(Sampling(temperature=0, logit_bias={3: 5.0})).pick(LOGITS) == 3
    assert set(picks(logit_bias={0: -100.0})) == {1, 2, 3}


def test_only_what_is_allowed_is_taken() -> None:
    allowed = torch.tensor([False, True, False, True])
    picker = Picker(Sampling(seed=1))
    assert {picker.pick(LOGITS, allowed) for _ in range(200)} == {1, 3}


def test_top_p_of_a_large_vocabulary_is_the_same_set_sorted_or_not() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    probabilities = logits.double().softmax(0)
    for share in (0.1, 0.95):  # within the likeliest 256, and beyond
        order = probabilities.argsort(descending=True)
        mass = probabilities[order].cumsum(0)
        expected = set(order[: int((mass < share).sum()) + 1].tolist())
        picker = Picker(Sampling(seed=2, top_p=share))
        assert {picker.pick(logits) for _ in range(2000)} <= expected


def test_log_probabilities_are_of_the_logits_as_they_are() -> None:
    picker = Picker(Sampling(logprobs=2, temperature=0.1, logit_bias={3: 50.0}, seed=1))
    token = picker.pick(LOGITS)
    told = picker.describe(LOGITS, token)
    assert token == 3
    assert told.logprob == pytest.approx(float(LOGITS[3]))
    assert [index for index, _ in told.top] == [0, 1]

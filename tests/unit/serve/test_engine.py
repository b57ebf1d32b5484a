import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from llmos_cli.errors import LlmosError
from llmos_cli.serve.engine import Engine
from llmos_cli.serve.refusal import Refused
from llmos_cli.serve.runner.spans import Span
from llmos_cli.serve.sampling import Sampling
from llmos_cli.serve.scheduler import PREFILL_TOKENS


def answer(engine: Engine, prompt: str, **options) -> tuple[str, str | None, int]:
    found = list(engine.generate(engine.encoder.text(prompt), Sampling(**options)))
    return "".join(piece.text for piece in found), found[-1].finish_reason, found[-1].tokens


@contextmanager
def steps(engine: Engine) -> Iterator[list[int]]:
    """The number of tokens of each step of the model."""
    seen: list[int] = []
    run = engine.runner.run

    def noted(spans: Sequence[Span]) -> torch.Tensor:
        seen.append(sum(len(span.tokens) for span in spans))
        return run(spans)

    engine.runner.run = noted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        engine.runner.run = run  # type: ignore[method-assign]


def test_greedy_text_is_what_transformers_generates(engine: Engine, build_model) -> None:
    ids = engine.encoder.text("the quick brown")
    expected = build_model(engine.encoder.size).generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=0, pad_token_id=0
    )[0, len(ids) :]
    text, _, _ = answer(engine, "the quick brown", max_tokens=20, temperature=0)
    assert text == engine.encoder.decode(expected.tolist())


def test_the_same_seed_gives_the_same_text_and_another_another(engine: Engine) -> None:
    first = answer(engine, "the fox", max_tokens=30, seed=1)
    assert answer(engine, "the fox", max_tokens=30, seed=1) == first
    assert answer(engine, "the fox", max_tokens=30, seed=2) != first


def test_one_token_is_computed_a_step(engine: Engine) -> None:
    with steps(engine) as seen:
        _, reason, tokens = answer(engine, "the quick brown fox", max_tokens=6, temperature=0)
    assert (reason, tokens) == ("length", 6)
    assert seen[1:] == [1] * 5


def test_a_long_prompt_is_computed_in_parts_and_gives_the_same_text(endless_engine: Engine, build_model) -> None:
    ids = list(itertools.islice(itertools.cycle(endless_engine.encoder.text("the lazy dog ")), PREFILL_TOKENS + 100))
    with steps(endless_engine) as seen:
        found = list(endless_engine.generate(ids, Sampling(max_tokens=5, temperature=0)))
    assert seen[:2] == [PREFILL_TOKENS, 100]
    model = build_model(endless_engine.encoder.size, context=8192)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    assert "".join(piece.text for piece in found) == endless_engine.encoder.decode(expected.tolist())


def test_the_end_token_stops_and_has_no_text(build_model, build_tokenizer) -> None:
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    plain = Engine(model, tokenizer)
    ids = plain.encoder.text("the fox")
    third = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=0, pad_token_id=0)[
        0, -1
    ]
    before, _, _ = answer(plain, "the fox", max_tokens=2, temperature=0)
    model.generation_config.eos_token_id = [int(third)]
    text, reason, tokens = answer(Engine(model, tokenizer), "the fox", max_tokens=20, temperature=0)
    assert (text, reason, tokens) == (before, "stop", 3)


def test_a_stop_string_across_tokens_ends_the_text_before_it(engine: Engine) -> None:
    whole, _, _ = answer(engine, "the quick", max_tokens=30, temperature=0)
    for size in (1, 3, 7):
        for start in range(0, len(whole) - size, 5):
            stop = whole[start : start + size]
            found = list(engine.generate(engine.encoder.text("the quick"), Sampling(30, 0.0, stop=(stop,))))
            text = "".join(piece.text for piece in found)
            assert text == whole[: whole.find(stop)]
            assert found[-1].finish_reason == "stop"


def test_a_stop_string_that_is_a_control_token_stops_as_that_token(build_model, build_tokenizer) -> None:
    tokenizer = build_tokenizer(eos=False)
    model = build_model(len(tokenizer))
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    model.lm_head.bias.data[turn] = 1e6
    engine = Engine(model, tokenizer)
    assert answer(engine, "fox", max_tokens=5, temperature=0) == ("", "length", 5)
    assert answer(engine, "fox", max_tokens=5, temperature=0, stop=("<|turn|>",)) == ("", "stop", 1)


def test_joined_pieces_are_the_decoded_tokens(engine: Engine) -> None:
    for seed in range(5):
        found = list(engine.generate(engine.encoder.text("the"), Sampling(max_tokens=60, seed=seed)))
        text = "".join(piece.text for piece in found)
        assert text.encode("utf-8").decode("utf-8") == text
        assert [piece.tokens for piece in found] == sorted({piece.tokens for piece in found})


def test_a_prompt_as_long_as_the_context_is_refused_with_both_lengths(engine: Engine) -> None:
    prompt = [5] * engine.context
    with pytest.raises(Refused, match=rf"length is {engine.context} tokens.*context is {engine.context}") as caught:
        engine.generate(prompt, Sampling(max_tokens=1))
    assert (caught.value.field, caught.value.reason) == ("prompt", "context_length_exceeded")


def test_more_tokens_than_the_context_leaves_are_refused(engine: Engine) -> None:
    with pytest.raises(Refused, match=r"max_tokens is 55, together 65.*context is 64") as caught:
        engine.generate([5] * 10, Sampling(max_tokens=55))
    assert caught.value.field == "max_tokens"
    assert caught.value.hint == "ask for at most 54"


def test_the_context_can_be_filled_to_the_last_token(endless_engine: Engine, build_model, build_tokenizer) -> None:
    tokenizer = build_tokenizer(eos=False)
    engine = Engine(build_model(len(tokenizer), context=16), tokenizer)
    found = list(engine.generate([5] * 10, Sampling(max_tokens=None, temperature=0)))
    assert (found[-1].tokens, found[-1].finish_reason) == (6, "length")
    assert list(engine.generate([5] * 15, Sampling(max_tokens=1)))[-1].tokens == 1


def test_cancelling_stops_before_the_next_step(endless_engine: Engine) -> None:
    cancelled = threading.Event()
    with steps(endless_engine) as seen:
        for piece in endless_engine.generate([5], Sampling(max_tokens=4000, temperature=0), cancelled.is_set):
            assert piece.finish_reason is None
            cancelled.set()
            done = len(seen)
        assert len(seen) <= done + 1


def test_cancelling_stops_a_prompt_between_its_parts(endless_engine: Engine) -> None:
    with steps(endless_engine) as seen:
        answers = iter([False, True, True, True])
        prompt = [5] * (3 * PREFILL_TOKENS)
        assert list(endless_engine.generate(prompt, Sampling(max_tokens=5), lambda: next(answers))) == []
    assert seen == [PREFILL_TOKENS]


def test_a_padded_vocabulary_gives_only_tokens_with_a_name(build_model, build_tokenizer) -> None:
    tokenizer = build_tokenizer(eos=False)
    model = build_model(len(tokenizer) + 64)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer) + 64))
    model.lm_head.bias.data[len(tokenizer) :] = 1e6
    text, _, tokens = answer(Engine(model, tokenizer), "fox", max_tokens=10, seed=1)
    assert tokens == 10
    assert text


def test_other_architectures_answer_too(build_tokenizer) -> None:
    tokenizer = build_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    engine = Engine(GPT2LMHeadModel(config), tokenizer)
    assert engine.context == 32
    assert answer(engine, "the fox", max_tokens=4, seed=1)[2] >= 1


def test_a_model_that_does_not_say_its_context_length_is_refused(build_tokenizer) -> None:
    tokenizer = build_tokenizer()
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(LlmosError, match="context length"):
        Engine(BloomForCausalLM(config), tokenizer)


def test_warming_up_leaves_nothing_behind(engine: Engine) -> None:
    before = answer(engine, "the", max_tokens=8, seed=1)
    assert engine.warm_up() > 0
    assert answer(engine, "the", max_tokens=8, seed=1) == before

"""Many texts at once, each as if it were alone: slots, prefixes, guesses and memory must not show in what is said."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmos_cli.errors import LlmosError
from llmos_cli.serve.engine import Engine
from llmos_cli.serve.lookup import guess
from llmos_cli.serve.prefix import BLOCK, PrefixCache
from llmos_cli.serve.runner.lean import LeanRunner, unfit
from llmos_cli.serve.runner.linears import Kernels
from llmos_cli.serve.runner.spans import Span
from llmos_cli.serve.sampling import Sampling
from llmos_cli.serve.sequence import Piece

PROMPTS = ["the fox", "the quick brown", "Grüße an", "dog. the lazy", "你好", "jumps over the lazy dog. the quick"]


class Asked:
    """One of several texts that an engine makes."""

    def __init__(self, engine: Engine, prompt: list[int], sampling: Sampling, **how: Any) -> None:
        self.pieces: list[Piece] = []
        self.errors: list[Exception] = []
        self.over = False
        self.request = engine.request(
            prompt, sampling, self.pieces.append, failed=self.errors.append, left=self._leave, **how
        )
        engine.add(self.request)

    def _leave(self) -> None:
        self.over = True

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def alone(engine: Engine, prompt: list[int], sampling: Sampling) -> str:
    return "".join(piece.text for piece in engine.generate(prompt, sampling))


@pytest.fixture
def fresh(build_engine: Callable[..., Engine], build_model: Any, build_tokenizer: Any) -> Callable[..., Engine]:
    """An engine that has computed nothing yet."""

    def build(**options: Any) -> Engine:
        tokenizer = build_tokenizer(eos=False)
        return build_engine(build_model(len(tokenizer), context=512), tokenizer, **options)

    return build


def test_texts_computed_together_are_those_computed_alone(fresh: Callable[..., Engine]) -> None:
    one, many = fresh(), fresh(slots=4)
    how = [Sampling(20 + 3 * number, 0.0 if number % 2 else 1.0, seed=number) for number in range(len(PROMPTS))]
    asked = []
    for prompt, sampling in zip(PROMPTS, how, strict=True):
        asked.append(Asked(many, many.encoder.text(prompt), sampling))
        many.step()
    while many.step():
        pass
    for prompt, sampling, found in zip(PROMPTS, how, asked, strict=True):
        assert found.text == alone(one, one.encoder.text(prompt), sampling)
        assert found.over
        assert not found.errors
    assert not many.scheduler.running
    assert not many.scheduler.waiting


def test_one_step_serves_all_texts(fresh: Callable[..., Engine]) -> None:
    engine = fresh(slots=8)
    sizes = []
    run = engine.runner.run
    engine.runner.run = lambda spans: sizes.append(len(spans)) or run(spans)  # type: ignore[method-assign, func-returns-value]
    asked = [Asked(engine, [5 + number], Sampling(10, 0.0)) for number in range(8)]
    while engine.step():
        pass
    assert len(sizes) == 10
    assert set(sizes) == {8}
    assert all(found.over for found in asked)


def test_a_long_prompt_does_not_hold_up_the_others(fresh: Callable[..., Engine]) -> None:
    engine = fresh(slots=2)
    short = Asked(engine, [5], Sampling(50, 0.0))
    engine.step()
    long = Asked(engine, [7] * 500, Sampling(1, 0.0))
    before = short.request.text.made
    engine.step()
    assert short.request.text.made == before + 1
    assert not long.over
    engine.step()
    assert long.over


def test_a_known_beginning_is_not_computed_again_and_changes_nothing(fresh: Callable[..., Engine]) -> None:
    engine = fresh()
    prompt = list(itertools.islice(itertools.cycle(engine.encoder.text("the lazy dog jumps over ")), 3 * BLOCK + 5))
    sampling = Sampling(12, 0.0)
    computed = []
    run = engine.runner.run
    engine.runner.run = lambda spans: computed.append(len(spans[0].tokens)) or run(spans)  # type: ignore[method-assign, func-returns-value]
    first = alone(engine, prompt, sampling)
    assert computed[0] == len(prompt)
    computed.clear()
    assert alone(engine, prompt, sampling) == first
    assert computed[0] == 5
    assert engine.prefixes.hits == 3 * BLOCK
    other = [*prompt[: BLOCK + 9], 9, *prompt[BLOCK + 10 :]]
    computed.clear()
    assert alone(engine, other, sampling) == alone(fresh(), other, sampling)
    assert computed[0] == len(other) - BLOCK


def test_prefixes_stay_within_their_memory() -> None:
    block = torch.zeros(1000)
    cache = PrefixCache(3 * block.nbytes)
    for start in range(5):
        cache.offer([start] * BLOCK, lambda *_: block)
        assert cache.size <= 3 * block.nbytes
    assert not cache.find([0] * (BLOCK + 1))
    assert len(cache.find([4] * (BLOCK + 1))) == 1
    assert not cache.find([4] * BLOCK)  # one token is left to compute
    PrefixCache(10).offer([1] * BLOCK, lambda *_: block)


def test_guessed_tokens_are_checked_and_save_steps(
    build_engine: Callable[..., Engine], build_model: Any, build_tokenizer: Any
) -> None:
    tokenizer = build_tokenizer(eos=False)

    def build(*, lean: bool) -> Engine:
        model = build_model(len(tokenizer), context=512)
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        model.lm_head.bias.data[40:42] = 30.0  # it says these two again and again
        return build_engine(model, tokenizer, lean=lean)

    engine, plain = build(lean=True), build(lean=False)
    prompt = engine.encoder.text("the lazy dog. the lazy dog. the lazy dog. the")
    steps = []
    run = engine.runner.run
    engine.runner.run = lambda spans: steps.append(1) or run(spans)  # type: ignore[method-assign, func-returns-value]
    sampling = Sampling(200, 0.0)
    assert alone(engine, prompt, sampling) == alone(plain, prompt, sampling)
    assert 0 < engine.scheduler.guessed_right < engine.scheduler.guessed
    assert len(steps) == 200 - engine.scheduler.guessed_right


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([], []), ([1, 2, 3], []), ([1, 2, 3, 4, 1, 2], [3, 4, 1, 2]), ([7, 8, 5, 6, 7, 8, 9, 9, 7, 8], [9, 9, 7, 8])],
)
def test_a_guess_is_what_followed_last_time(tokens: list[int], expected: list[int]) -> None:
    assert guess(tokens) == expected


def test_texts_wait_for_memory_and_all_are_made(build_model: Any, build_tokenizer: Any) -> None:
    tokenizer = build_tokenizer(eos=False)
    model = build_model(len(tokenizer), context=512)
    runner = LeanRunner(model, Kernels("fp32"), slots=8, budget=2 * 100 * 2 * 2 * 32 * 4)  # two texts of 100 tokens
    engine = Engine(model, tokenizer, runner=runner)
    asked = [Asked(engine, [5 + number], Sampling(90, 0.0)) for number in range(5)]
    most = 0
    while engine.step():
        most = max(most, len(engine.scheduler.running))
    assert most == 2
    assert all(found.over and len(found.text) for found in asked)


def test_a_cancelled_text_gives_its_slot_to_the_next(fresh: Callable[..., Engine]) -> None:
    engine = fresh(slots=1)
    gone: list[bool] = []
    first = Asked(engine, [5], Sampling(400, 0.0), cancelled=lambda: bool(gone))
    second = Asked(engine, [6], Sampling(3, 0.0))
    for _ in range(5):
        engine.step()
    assert not second.pieces
    gone.append(True)
    while engine.step():
        pass
    assert first.over
    assert first.pieces[-1].finish_reason is None
    assert second.pieces[-1].finish_reason == "length"


def test_an_error_of_one_text_is_its_own(fresh: Callable[..., Engine]) -> None:
    engine = fresh(slots=2)
    bad = Asked(engine, [5], Sampling(20, 0.0, logit_bias={0: float("nan")}))
    good = Asked(engine, [6], Sampling(20, 0.0))
    while engine.step():
        pass
    assert isinstance(bad.errors[0], LlmosError)
    assert good.pieces[-1].finish_reason == "length"
    assert not good.errors


def test_an_error_of_the_model_ends_what_was_in_the_step_and_nothing_else(fresh: Callable[..., Engine]) -> None:
    engine = fresh(slots=2)
    run = engine.runner.run

    def fail(spans: Any) -> torch.Tensor:
        engine.runner.run = run  # type: ignore[method-assign]
        raise RuntimeError("no memory")

    asked = [Asked(engine, [5 + number], Sampling(5, 0.0)) for number in range(3)]
    engine.runner.run = fail  # type: ignore[method-assign]
    while engine.step():
        pass
    assert [bool(found.errors) for found in asked] == [True, True, False]
    assert asked[2].pieces[-1].tokens == 5


SHAPE = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_logits_are_those_of_transformers(kind: str, dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind == "mistral":
            model: Any = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=24))
        texts = torch.randint(0, 90, (3, 40))
    model = model.to(dtype).eval()
    with torch.inference_mode():
        expected = model(texts).logits.float()
    runner = LeanRunner(model, Kernels("bf16" if dtype == torch.bfloat16 else "fp32"), budget=1 << 24)
    found = [torch.empty(0, 90)] * 3
    cuts = ((0, 7, 8, 9, 40), (0, 1, 2, 30, 40), (0, 20, 21, 22, 40))
    for step in range(4):
        spans = [
            Span(slot, cuts[slot][step], texts[slot, cuts[slot][step] : cuts[slot][step + 1]].tolist(), 1)
            for slot in (2, 0, 1)
        ]
        for span, row in zip(spans, runner.run(spans), strict=True):
            found[span.slot] = torch.cat((found[span.slot], row.unsqueeze(0)))
    ends = torch.tensor(cuts)[:, 1:] - 1
    wanted = expected[torch.arange(3).unsqueeze(1), ends]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.stack(found), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_what_the_lean_decoder_does_not_know_runs_as_it_is() -> None:
    window = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16))
    assert "window" in str(unfit(window))
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "dynamic" in str(unfit(Qwen3ForCausalLM(Qwen3Config(**SHAPE, rope_parameters=rope))))
    assert unfit(Qwen3ForCausalLM(Qwen3Config(**SHAPE))) is None

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from llmos_cli.errors import LlmosError
from llmos_cli.models.load import new_model
from llmos_cli.models.perplexity import perplexity
from llmos_cli.progress import Silent


@pytest.fixture
def model(sizes: dict[str, Any]) -> PreTrainedModel:
    return new_model(LlamaConfig(**sizes), seed=2).eval()


def rows(*shapes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 512, shape) for shape in shapes]


def test_it_is_the_mean_over_all_predicted_tokens(model: PreTrainedModel) -> None:
    batches = rows((4, 32), (2, 32), (1, 5))
    found = perplexity(model, batches, progress=Silent(), bytes_per_token=2.0)
    total, tokens = 0.0, 0
    for batch in batches:
        for row in torch.from_numpy(batch):
            chances = torch.log_softmax(model(row[None]).logits[0].detach().double(), dim=-1)
            total -= sum(float(chances[at, row[at + 1]]) for at in range(len(row) - 1))
            tokens += len(row) - 1
    assert found.tokens == tokens
    assert found.loss == pytest.approx(total / tokens, rel=1e-6)
    assert found.perplexity == math.exp(found.loss)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / 2)


def test_batching_does_not_change_what_is_measured(model: PreTrainedModel) -> None:
    (batch,) = rows((6, 32))
    whole = perplexity(model, [batch], progress=Silent())
    single = perplexity(model, [row[None] for row in batch], progress=Silent())
    assert single.loss == pytest.approx(whole.loss, rel=1e-6)
    assert whole.bits_per_byte is None


def test_a_row_of_one_token_predicts_nothing(model: PreTrainedModel) -> None:
    (batch,) = rows((2, 16))
    with_short = perplexity(model, [batch, batch[:1, :1]], progress=Silent())
    assert with_short.tokens == 30
    with pytest.raises(LlmosError, match="no row"):
        perplexity(model, [batch[:1, :1]], progress=Silent())


def test_a_token_outside_the_vocabulary_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(LlmosError, match="512"):
        perplexity(model, [np.array([[1, 512]])], progress=Silent())


def test_a_model_that_overflows_is_an_error(model: PreTrainedModel) -> None:
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(LlmosError, match="finite"):
        perplexity(model, rows((1, 8)), progress=Silent())

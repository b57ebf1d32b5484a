"""How the next token is chosen: greedy, or drawn with temperature, top-k and top-p from a generator of the request.

Knows one row of logits at a time; nothing of models, text or requests. The same seed and the same logits give the
same tokens: every request has its own generator, so that requests cannot disturb each other.
"""

from dataclasses import dataclass

import torch

from llmos_cli.errors import LlmosError


@dataclass(frozen=True)
class Sampling:
    """`max_tokens` None means as many as the context leaves; `top_k` 0 and `top_p` 1 switch their filter off."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Picker:
    """Chooses tokens for one request."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def pick(self, logits: torch.Tensor) -> int:
        """The next token for `logits` (one row, float, on the CPU)."""
        best = logits.max()
        if not torch.isfinite(best):
            raise LlmosError("the model computed logits that are not finite numbers")
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        # float64 and the maximum taken off first: the smallest temperature cannot overflow
        scores = (logits.double() - best) / self._sampling.temperature
        probabilities = torch.softmax(self._filter(scores), dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _filter(self, scores: torch.Tensor) -> torch.Tensor:
        top_k, top_p = self._sampling.top_k, self._sampling.top_p
        if 0 < top_k < scores.numel():
            scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
        if top_p < 1:
            ordered, index = scores.sort(descending=True, stable=True)
            mass = torch.softmax(ordered, dim=-1)
            beyond = mass.cumsum(dim=-1) - mass >= top_p
            beyond[0] = False
            scores = scores.scatter(0, index, ordered.masked_fill(beyond, -torch.inf))
        return scores

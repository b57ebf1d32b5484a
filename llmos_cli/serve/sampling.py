"""How the next token is chosen: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

Knows one row of logits at a time; nothing of models, text or requests. The same seed and the same logits give the
same tokens: every request has its own generator, so that requests cannot disturb each other.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from llmos_cli.errors import LlmosError

_STEP: Final = 0x9E3779B97F4A7C15  # between the seeds of one request's texts: far from those of the next seed
_SHORT: Final = 256  # tokens that are nearly always enough for top-p: sorting a whole vocabulary takes milliseconds


@dataclass(frozen=True)
class Sampling:
    """`max_tokens` None: as many as the context leaves; `top_k` 0, `top_p` 1 and `min_p` 0 switch their filter off.

    `presence_penalty` and `frequency_penalty` count the tokens that were made, as OpenAI defines them;
    `repetition_penalty` (1 is off) those of the prompt, too (Keskar et al., arXiv:1909.05858). `logit_bias` is added to
    the logits of its tokens. `logprobs` asks for the log probability of each token made and of so many likeliest
    ones, before any of this; None for none.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def of_text(self, index: int) -> "Sampling":
        """For one of several texts of a request: those after the first draw with seeds of their own."""
        return self if self.seed is None or not index else replace(self, seed=(self.seed + index * _STEP) % (1 << 63))


@dataclass(frozen=True)
class Chosen:
    """A token, its log probability, and the likeliest tokens with theirs, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Picker:
    """Chooses tokens for one request, and remembers what it chose."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._made: Counter[int] = Counter()
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._plain = not (
            sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.logit_bias
            or sampling.repetition_penalty != 1
        )

    @property
    def greedy(self) -> bool:
        """Whether the choice depends on the logits alone: only then may tokens be guessed ahead."""
        return self._sampling.temperature == 0 and self._plain and self._sampling.logprobs is None

    def pick(self, logits: torch.Tensor, allowed: torch.Tensor | None = None) -> int:
        """The next token for `logits` (one row, float, on the CPU), of those `allowed` (bool, one for each)."""
        if not self._plain:
            logits = self._adjusted(logits)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        best, token = logits.max(dim=0)
        if not torch.isfinite(best):
            raise LlmosError("the model computed logits that are not finite numbers")
        if self._sampling.temperature == 0:
            return self._noted(int(token))
        # the maximum is taken off before the division, in float64: the smallest temperature cannot overflow
        index, scores = self._filtered((logits - best).double() / self._sampling.temperature)
        mass = scores.exp_().cumsum(0)
        drawn = torch.rand(1, generator=self._generator, dtype=torch.float64) * mass[-1]
        # rounding must not end beyond the last token, nor on one of no probability
        place = min(int(torch.searchsorted(mass, drawn, right=True)), int(torch.searchsorted(mass, mass[-1])))
        return self._noted(place if index is None else int(index[place]))

    def describe(self, logits: torch.Tensor, token: int) -> Chosen:
        """The log probability of a token that was picked, and of the likeliest ones."""
        row = torch.log_softmax(logits.float(), dim=-1)
        top = row.topk(min(self._sampling.logprobs or 0, len(row)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Chosen(token, float(row[token]), tuple(pairs))

    def _noted(self, token: int) -> int:
        if not self._plain:
            self._made[token] += 1
        return token

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        sampling, logits = self._sampling, logits.clone()
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._seen | self._made.keys()))
            seen = seen[seen < len(logits)]
            scores = logits[seen]
            logits[seen] = torch.where(
                scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty
            )
        if self._made:
            made = torch.tensor(list(self._made))
            counts = torch.tensor([float(self._made[token]) for token in self._made])
            logits[made] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.logit_bias:
            logits[torch.tensor(list(sampling.logit_bias))] += torch.tensor(list(sampling.logit_bias.values()))
        return logits

    def _filtered(self, scores: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The tokens that may be drawn (None for all) and their scores, which are logarithms of no certain sum."""
        top_k, top_p, min_p = self._sampling.top_k, self._sampling.top_p, self._sampling.min_p
        index: torch.Tensor | None = None
        if 0 < top_k < len(scores):
            scores, index = scores.topk(top_k)
        if top_p < 1:
            scores, index = _most_likely(scores, index, top_p)
        if min_p > 0:
            kept = scores >= scores.max() + torch.log(torch.tensor(min_p, dtype=torch.float64))
            scores, index = scores[kept], kept.nonzero()[:, 0] if index is None else index[kept]
        return index, scores


def _most_likely(scores: torch.Tensor, index: torch.Tensor | None, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest tokens that have this share of the probability, the likeliest first; one at least."""
    total = torch.logsumexp(scores, dim=0)
    ordered, order = scores.topk(min(_SHORT, len(scores)))
    if len(ordered) < len(scores) and float((ordered - total).exp().sum()) < share:
        ordered, order = scores.sort(descending=True, stable=True)
    mass = (ordered - total).exp()
    kept = max(int((mass.cumsum(0) - mass < share).sum()), 1)
    return ordered[:kept], order[:kept] if index is None else index[order[:kept]]

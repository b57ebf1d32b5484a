"""One text being made: its tokens, how the next is chosen, and the pieces of text that become certain.

It knows nothing of slots or models: it is given logits and says whether it goes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from llmos_cli.serve.encoder import Encoder
from llmos_cli.serve.sampling import Chosen, Picker, Sampling
from llmos_cli.serve.text import TextStream


@dataclass(frozen=True)
class Piece:
    """Text that may be shown; `tokens` made so far; the last piece has the finish reason, "stop" or "length".

    `chosen` are the tokens since the piece before with their log probabilities, if these were asked for; `index` tells
    the texts of one request apart.
    """

    text: str
    tokens: int
    finish_reason: str | None = None
    chosen: tuple[Chosen, ...] = ()
    index: int = 0


class Grammar(Protocol):
    """What a text must look like."""

    @property
    def over(self) -> bool:
        """Whether nothing may follow."""
        ...

    def allowed(self) -> torch.Tensor:
        """One bool for each token that may come next."""
        ...

    def take(self, token: int) -> None:
        """A token has come."""
        ...


class Text:
    """`tokens` are prompt and answer; `made` of them are the answer."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        room: int,
        encoder: Encoder,
        emit: Callable[[Piece], None],
        *,
        grammar: Grammar | None = None,
        index: int = 0,
    ) -> None:
        self.tokens, self.made, self.room = list(prompt), 0, room
        self.prompt_length = len(self.tokens)
        self.finish_reason: str | None = None
        self._emit, self._grammar, self._index = emit, grammar, index
        self._vocabulary = encoder.size  # a padded vocabulary has rows that no token stands for
        self._picker = Picker(sampling, prompt)
        self._wants_logprobs = sampling.logprobs is not None
        self._text = TextStream(encoder.decode, prompt, sampling.stop)
        # a stop string that is a control token has no text to be found in: it stops as the token that it is
        controls = encoder.controls
        self._ends = encoder.ends | {controls[stop] for stop in sampling.stop if stop in controls}
        self._chosen: list[Chosen] = []

    @property
    def predictable(self) -> bool:
        """Whether tokens may be guessed ahead."""
        return self._picker.greedy and self._grammar is None

    def take(self, logits: torch.Tensor) -> int | None:
        """Choose the next token from a row of logits; None when the text has ended with it."""
        logits = logits[: self._vocabulary]
        allowed = None if self._grammar is None else self._grammar.allowed()
        token = self._picker.pick(logits, allowed)
        self.made += 1
        if self._wants_logprobs and token not in self._ends:
            self._chosen.append(self._picker.describe(logits, token))
        if token in self._ends:
            self._finish(self._text.flush(), "stop")
            return None
        if self._grammar is not None:
            self._grammar.take(token)
        self.tokens.append(token)
        shown = self._text.push(token)
        if self._grammar is not None and self._grammar.over and not self._text.stopped:
            self._finish(shown + self._text.flush(), "stop")
            return None
        if self._text.stopped:
            self._finish(shown, "stop")
            return None
        if self.made == self.room:
            shown += self._text.flush()
            self._finish(shown, "stop" if self._text.stopped else "length")
            return None
        if shown:
            self._say(shown, None)
        return token

    def _finish(self, text: str, reason: str) -> None:
        self.finish_reason = reason
        self._say(text, reason)

    def _say(self, text: str, reason: str | None) -> None:
        chosen, self._chosen = tuple(self._chosen), []
        self._emit(Piece(text, self.made, reason, chosen, self._index))

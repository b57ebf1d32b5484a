"""What the texts of one request amount to so far, and each new piece in the words of the wire."""

from collections.abc import Mapping
from typing import Any

from llmos_cli.serve import wire
from llmos_cli.serve.encoder import Encoder
from llmos_cli.serve.sampling import Chosen
from llmos_cli.serve.sequence import Piece


class Answers:
    """Collects the pieces of `texts` texts; `logprobs` if they were asked for."""

    def __init__(self, encoder: Encoder, texts: int, *, logprobs: bool) -> None:
        self._encoder, self._logprobs = encoder, logprobs
        self._texts = [""] * texts
        self._reasons: list[str | None] = [None] * texts
        self._made = [0] * texts
        self._tokens: list[tuple[wire.TokenText, ...]] = [()] * texts
        self._offsets = [0] * texts  # characters of the tokens told so far

    def add(self, piece: Piece) -> wire.Answer:
        """Take note of a piece; gives it as the next part of its text."""
        index = piece.index
        tokens = tuple(self._token(chosen) for chosen in piece.chosen) if self._logprobs else None
        offset = self._offsets[index]
        self._texts[index] += piece.text
        self._reasons[index], self._made[index] = piece.finish_reason, piece.tokens
        if tokens is not None:
            self._tokens[index] += tokens
            self._offsets[index] += sum(len(token.text) for token in tokens)
        return wire.Answer(index, piece.text, piece.finish_reason, tokens, offset)

    @property
    def texts(self) -> int:
        return len(self._texts)

    @property
    def made(self) -> int:
        """Tokens of all texts."""
        return sum(self._made)

    @property
    def over(self) -> bool:
        return None not in self._reasons

    def whole(self) -> list[wire.Answer]:
        return [
            wire.Answer(index, text, self._reasons[index], self._tokens[index] if self._logprobs else None)
            for index, text in enumerate(self._texts)
        ]

    def usage(self, prompt_tokens: int) -> Mapping[str, Any]:
        return wire.usage(prompt_tokens, self.made)

    def _token(self, chosen: Chosen) -> wire.TokenText:
        top = tuple(wire.TokenText(*self._encoder.token(token), logprob) for token, logprob in chosen.top)
        return wire.TokenText(*self._encoder.token(chosen.token), chosen.logprob, top)

"""Answers that keep to a JSON schema, a regular expression or a grammar: llguidance says which tokens may come next.

A grammar is checked when the request comes, so that a bad one is refused by name; each text has a matcher of its own.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from llguidance import LLMatcher, LLTokenizer

from llmos_cli.errors import LlmosError
from llmos_cli.serve.refusal import Refused

_ANY_OBJECT: Final = {"type": "object"}
_BITS: Final = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)


class Grammars:
    """Makes matchers for one tokenizer. Reading a tokenizer takes a second: it is done for the first grammar."""

    def __init__(self, tokenizer: Any, *, size: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._size, self._ends = tokenizer, size, sorted(ends)
        self._read: LLTokenizer | None = None

    def compile(self, wanted: Mapping[str, Any], *, field: str) -> str:
        """A grammar in llguidance's words from {"json": schema}, {"regex": text}, {"grammar": Lark text} or
        {"choice": texts}; raises Refused, naming the field, where it is none."""
        ((kind, value),) = wanted.items()
        try:
            if kind == "json":
                grammar = LLMatcher.grammar_from_json_schema(
                    json.dumps(value), overrides={"whitespace_flexible": False}
                )
            elif kind == "regex":
                grammar = LLMatcher.grammar_from_regex(value)
            elif kind == "choice":
                texts = " | ".join(json.dumps(text) for text in value)
                grammar = LLMatcher.grammar_from_lark(f"start: {texts}")
            else:
                grammar = LLMatcher.grammar_from_lark(value)
        except ValueError as exc:
            raise Refused(f"{field}: {_one_line(exc)}", field=field) from exc
        if problem := LLMatcher.validate_grammar(grammar, self._known()):
            raise Refused(f"{field}: {_one_line(problem)}", field=field)
        return grammar

    def matcher(self, grammar: str) -> "Matcher":
        return Matcher(LLMatcher(self._known(), grammar, log_level=0), self._size)

    def _known(self) -> LLTokenizer:
        if self._read is None:
            from llguidance.hf import from_tokenizer

            self._read = from_tokenizer(self._tokenizer, n_vocab=self._size, eos_token=self._ends or None)
        return self._read


class Matcher:
    """What may come next in one text."""

    def __init__(self, matcher: LLMatcher, size: int) -> None:
        self._matcher, self._size = matcher, size

    @property
    def over(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> torch.Tensor:
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise LlmosError(f"the grammar cannot be followed further: {_one_line(self._matcher.get_error())}")
        return (mask.unsqueeze(1) & _BITS).bool().view(-1)[: self._size]

    def take(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise LlmosError(f"the grammar cannot be followed further: {_one_line(self._matcher.get_error())}")


def any_object() -> dict[str, Any]:
    """The schema of a JSON object of any kind."""
    return dict(_ANY_OBJECT)


def _one_line(problem: Any) -> str:
    return " ".join(str(problem).split())[:300]

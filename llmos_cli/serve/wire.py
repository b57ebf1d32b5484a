"""OpenAI's words on the wire: answers, chunks of a stream, errors. Values in, plain dictionaries and bytes out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

DONE = b"data: [DONE]\n\n"


class ApiError(Exception):
    """An HTTP answer that is an error, in OpenAI's envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True)
class TokenText:
    """A token as clients see it: its text (with replacement characters where it is none), its bytes, and its log
    probability; `top` are the likeliest tokens in its place."""

    text: str
    data: bytes
    logprob: float
    top: tuple["TokenText", ...] = ()


@dataclass(frozen=True)
class Answer:
    """One of the texts of a request, whole or the next part of it; `tokens` if log probabilities were asked for."""

    index: int
    text: str
    finish_reason: str | None = None
    tokens: tuple[TokenText, ...] | None = None
    offset: int = 0  # characters of this text before this part


@dataclass(frozen=True)
class Completion:
    """The answers of /v1/completions."""

    id: str
    created: int
    model: str
    fingerprint: str
    with_usage: bool = field(default=False, kw_only=True)
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def whole(self, answers: Sequence[Answer], used: Mapping[str, int]) -> dict[str, Any]:
        choices = [self._choice(answer) for answer in answers]
        return {**self._head(self.whole_object), "choices": choices, "usage": dict(used)}

    def opening(self, texts: int) -> dict[str, Any] | None:
        """The chunk before any text, where the protocol has one."""
        return None

    def chunk(self, answer: Answer) -> dict[str, Any]:
        return self._chunk([self._delta(answer)])

    def closing(self, used: Mapping[str, int]) -> dict[str, Any] | None:
        """The chunk after the text, if the client asked for its usage."""
        return {**self._head(self.chunk_object), "choices": [], "usage": dict(used)} if self.with_usage else None

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        unknown = {"usage": None} if self.with_usage else {}
        return {**self._head(self.chunk_object), "choices": choices, **unknown}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        logprobs = self._logprobs(answer)
        return {"index": answer.index, "text": answer.text, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _delta(self, answer: Answer) -> dict[str, Any]:
        return self._choice(answer)

    def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if answer.tokens is None:
            return None
        offsets, at = [], answer.offset
        for token in answer.tokens:
            offsets.append(at)
            at += len(token.text)
        return {
            "tokens": [_name(token) for token in answer.tokens],
            "token_logprobs": [token.logprob for token in answer.tokens],
            "top_logprobs": [{_name(top): top.logprob for top in token.top} for token in answer.tokens],
            "text_offset": offsets,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class Chat(Completion):
    """The answers of /v1/chat/completions."""

    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def opening(self, texts: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return self._chunk(
            [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for index in range(texts)]
        )

    def _choice(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = self._logprobs(answer)
        return {"index": answer.index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _delta(self, answer: Answer) -> dict[str, Any]:
        delta = {"content": answer.text} if answer.text else {}
        logprobs = self._logprobs(answer) if answer.tokens else None
        return {"index": answer.index, "delta": delta, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if answer.tokens is None:
            return None
        content = [{**_token(token), "top_logprobs": [_token(top) for top in token.top]} for token in answer.tokens]
        return {"content": content, "refusal": None}


def _name(token: TokenText) -> str:
    """Part of a character has no text of its own: OpenAI spells its bytes."""
    if token.text.encode("utf-8") == token.data:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}

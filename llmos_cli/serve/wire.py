"""OpenAI's words on the wire: answers, chunks of a stream, errors. Values in, plain dictionaries and bytes out."""

import json
from collections.abc import Mapping
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
class Completion:
    """The answers of /v1/completions."""

    id: str
    created: int
    model: str
    fingerprint: str
    with_usage: bool = field(default=False, kw_only=True)
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def whole(self, text: str, finish_reason: str, used: Mapping[str, int]) -> dict[str, Any]:
        choice = self._choice(text, finish_reason)
        return {**self._head(self.whole_object), "choices": [choice], "usage": dict(used)}

    def opening(self) -> dict[str, Any] | None:
        """The chunk before any text, where the protocol has one."""
        return None

    def chunk(self, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        return self._chunk([self._delta(text, finish_reason)])

    def closing(self, used: Mapping[str, int]) -> dict[str, Any] | None:
        """The chunk after the text, if the client asked for its usage."""
        return {**self._head(self.chunk_object), "choices": [], "usage": dict(used)} if self.with_usage else None

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        unknown = {"usage": None} if self.with_usage else {}
        return {**self._head(self.chunk_object), "choices": choices, **unknown}

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _delta(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return self._choice(text, finish_reason)

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

    def opening(self) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def _delta(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

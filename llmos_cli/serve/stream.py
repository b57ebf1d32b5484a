"""The body of a streamed answer: server-sent events, one a piece of text, as the model makes them."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final

from fastapi.responses import Response

from llmos_cli.serve import wire
from llmos_cli.serve.answers import Answers
from llmos_cli.serve.guard import Receive, Send, fault_text, internal_error, shutting_down
from llmos_cli.serve.sequence import Piece
from llmos_cli.serve.worker import Job

SEND_SECONDS: Final = 60.0  # a client that takes nothing for so long is let go


class EventStream(Response):
    """Owns the job from here on. `first` is its first piece: a fault before it could still have a status of its own."""

    def __init__(
        self,
        job: Job,
        first: Piece,
        answers: Answers,
        reply: wire.Completion,
        prompt_tokens: int,
        fault: Callable[[str], None],
        headers: Mapping[str, str],
        told: dict[str, Any],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", **headers}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._job = job
        self._first = first
        self._answers, self._told = answers, told
        self._reply = reply
        self._prompt_tokens = prompt_tokens
        self._fault = fault

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._events(scope["state"]["request_id"])) as events:
                async for event in events:
                    async with asyncio.timeout(SEND_SECONDS):
                        await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            return
        finally:
            self._job.close()

    async def _events(self, request_id: str) -> AsyncGenerator[bytes, None]:
        try:
            opening = self._reply.opening(self._answers.texts)
            if opening is not None:
                yield wire.event(opening)
            piece: Piece | None = self._first
            while piece is not None:
                answer = self._answers.add(piece)
                self._told["completion_tokens"] = self._answers.made
                if answer.text or answer.tokens:
                    yield wire.event(self._reply.chunk(dataclasses.replace(answer, finish_reason=None)))
                if answer.finish_reason is not None:
                    yield wire.event(self._reply.chunk(wire.Answer(answer.index, "", answer.finish_reason)))
                if self._answers.over:
                    closing = self._reply.closing(self._answers.usage(self._prompt_tokens))
                    if closing is not None:
                        yield wire.event(closing)
                    yield wire.DONE
                    return
                piece = await self._job.next()
            yield wire.event(shutting_down().body)
        except Exception as exc:  # noqa: BLE001 - the status is sent already: the fault becomes the last event, without [DONE]
            self._fault(fault_text(request_id, exc))
            yield wire.event(internal_error(request_id).body)

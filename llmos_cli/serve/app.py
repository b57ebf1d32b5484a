"""The routes: OpenAI's models, completions and chat completions over one engine, and /health.

A route checks everything that can be checked before the request waits for the model, so that bad input is answered at
once. Streams and whole answers end the same way: the place of the request is given back, whoever went away first.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from llmos_cli.errors import Busy
from llmos_cli.formats.ids import ObjectId
from llmos_cli.serve import wire
from llmos_cli.serve.answers import Answers
from llmos_cli.serve.guard import CLOSE, RETRY, Answered, App, Guard, internal_error, read_json, shutting_down
from llmos_cli.serve.metrics import CONTENT_TYPE, Metrics
from llmos_cli.serve.refusal import Refused
from llmos_cli.serve.schema import ChatRequest, CompletionRequest, read_chat, read_completion
from llmos_cli.serve.stream import EventStream
from llmos_cli.serve.wire import ApiError
from llmos_cli.serve.worker import Worker

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """The model on offer: `label` is "name:tag" or "@id", `id` the manifest it was loaded from."""

    label: str
    id: ObjectId
    created: int

    def names(self) -> frozenset[str]:
        """What clients may call it. A bare name means name:latest, as everywhere in llmos."""
        return frozenset({self.label, self.label.removesuffix(":latest"), f"@{self.id}", f"@{self.id.short}"})


def build_app(
    worker: Worker,
    served: Served,
    *,
    hosts: frozenset[str] | None,
    fault: Callable[[str], None],
    key: bytes | None = None,
    answered: Callable[[Answered], None] = lambda _: None,
    seconds: Mapping[str, float] | None = None,
    draining: Callable[[], bool] = lambda: False,
) -> App:
    """The ASGI application; `worker` must be started.

    `key` is asked of every request but those of /health. `fault` gets a text each time something is wrong inside,
    `answered` hears of every request that is over. `seconds` are the parts of the start. Once `draining` says so, the
    server is not ready, and what comes new is refused.
    """
    metrics = Metrics(served.label, worker.engine, seconds=seconds)
    service = _Service(worker, served, fault, metrics, draining)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_api_route("/health", service.health, methods=["GET"], response_model=None)
    app.add_api_route("/ready", service.ready, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", service.numbers, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models", service.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", service.model, methods=["GET"], response_model=None)
    app.add_api_route("/v1/completions", service.completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], response_model=None)
    app.add_exception_handler(ApiError, _show_api_error)
    app.add_exception_handler(Refused, _show_refused)
    app.add_exception_handler(Busy, _show_busy)
    app.add_exception_handler(404, _show_http_error)
    app.add_exception_handler(405, _show_http_error)
    app.add_exception_handler(Exception, _show_fault)
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)}

    def over(request: Answered) -> None:
        metrics.answered(request.path if request.path in paths else "other", request.method, request.status)
        answered(request)

    return Guard(app, hosts=hosts, key=key, fault=fault, answered=over)


class _Service:
    def __init__(
        self,
        worker: Worker,
        served: Served,
        fault: Callable[[str], None],
        metrics: Metrics,
        draining: Callable[[], bool],
    ) -> None:
        self._metrics, self._draining = metrics, draining
        self._worker = worker
        self._engine = worker.engine
        self._served = served
        self._names = served.names()
        self._fault = fault
        # tokenizing a long prompt takes seconds: off the event loop, and one at a time, to leave cores to the model
        self._encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmos-encode")

    async def health(self) -> Response:
        status = "ok" if self._worker.alive else "stopped"
        body = {"status": status, "model": self._served.label, "id": str(self._served.id)}
        return JSONResponse(body, 200 if self._worker.alive else 503)

    async def ready(self) -> Response:
        if self._worker.alive and not self._draining():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "draining" if self._worker.alive else "stopped"}, 503)

    async def numbers(self) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def model(self, name: str) -> Response:
        self._check_name(name)
        return JSONResponse(self._entry())

    async def completions(self, request: Request) -> Response:
        ask = read_completion(await read_json(request.headers, request.receive))
        self._check_name(ask.model)
        encoder, prompt = self._engine.encoder, ask.prompt
        reply = wire.Completion("cmpl-" + uuid.uuid4().hex, *self._about(), with_usage=ask.with_usage)
        encode = (lambda: encoder.text(prompt)) if isinstance(prompt, str) else (lambda: encoder.ids(prompt))
        return await self._answer(request, ask, encode, reply, "prompt")

    async def chat(self, request: Request) -> Response:
        ask = read_chat(await read_json(request.headers, request.receive))
        self._check_name(ask.model)
        messages = [message.model_dump() for message in ask.messages]
        reply = wire.Chat("chatcmpl-" + uuid.uuid4().hex, *self._about(), with_usage=ask.with_usage)
        return await self._answer(request, ask, lambda: self._engine.encoder.chat(messages), reply, "messages")

    async def _answer(
        self,
        request: Request,
        ask: CompletionRequest | ChatRequest,
        encode: Callable[[], list[int]],
        reply: wire.Completion,
        field: str,
    ) -> Response:
        if self._draining():
            raise shutting_down()
        job = self._worker.admit(ask.texts)
        told: dict[str, Any] = {"stream": bool(ask.stream), "texts": ask.texts}
        request.state.told = told
        try:
            sampling = ask.sampling()
            self._engine.encoder.check_tokens(sampling.logit_bias, "logit_bias")
            prompt = await self._aside(encode)
            self._engine.room(prompt, sampling, field=field)
            matcher = None
            if ask.shape is not None:
                where, wanted = ask.shape
                grammar = await self._aside(lambda: self._engine.grammars.compile(wanted, field=where))
                matcher = partial(self._engine.grammars.matcher, grammar)
            told["prompt_tokens"] = len(prompt)
            job.start(prompt, sampling, matcher)
            job.watch(request.receive)
            answers = Answers(self._engine.encoder, ask.texts, logprobs=sampling.logprobs is not None)
            headers = {"x-model-id": f"@{self._served.id}"}
            while (piece := await job.next()) is not None:
                if ask.stream:
                    # only now, so that a fault in the first step still has its status
                    return EventStream(job, piece, answers, reply, len(prompt), self._fault, headers, told)
                answers.add(piece)
                told["completion_tokens"] = answers.made
                if answers.over:
                    job.close()
                    whole = reply.whole(answers.whole(), answers.usage(len(prompt)))
                    return JSONResponse(whole, headers=headers)
        except BaseException:
            job.close()
            raise
        job.close()
        raise shutting_down()

    def _entry(self) -> dict[str, Any]:
        return {
            "id": self._served.label,
            "object": "model",
            "created": self._served.created,
            "owned_by": "llmos",
            "root": f"@{self._served.id}",
            "max_model_len": self._engine.context,
        }

    async def _aside(self, work: Callable[[], T]) -> T:
        """Off the event loop, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, work)

    def _about(self) -> tuple[int, str, str]:
        return int(time.time()), self._served.label, self._served.id.short

    def _check_name(self, name: str) -> None:
        if name not in self._names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist here; this server has {self._served.label!r}",
                param="model",
                code="model_not_found",
            )


async def _show_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _show_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return await _show_api_error(request, ApiError(400, error.message, param=error.field, code=error.reason))


async def _show_busy(request: Request, error: Exception) -> Response:
    return await _show_api_error(
        request, ApiError(503, str(error), kind="server_error", code="overloaded", headers=RETRY)
    )


async def _show_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]} is not served here"
    return await _show_api_error(
        request, ApiError(error.status_code, message, code="unknown_url", headers={**(error.headers or {}), **CLOSE})
    )


async def _show_fault(request: Request, error: Exception) -> Response:
    return await _show_api_error(request, internal_error(request.state.request_id))

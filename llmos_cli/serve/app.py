"""The routes of a model that writes: OpenAI's completions and chat completions over one engine.

A route checks everything that can be checked before the request waits for the model, so that bad input is answered at
once. Streams and whole answers end the same way: the place of the request is given back, whoever went away first.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from llmos_cli.serve import wire
from llmos_cli.serve.answers import Answers
from llmos_cli.serve.front import Front, Served, guarded
from llmos_cli.serve.guard import Answered, App, read_json, shutting_down
from llmos_cli.serve.metrics import Metrics
from llmos_cli.serve.schema import ChatRequest, CompletionRequest, read_chat, read_completion
from llmos_cli.serve.stream import EventStream
from llmos_cli.serve.worker import Worker

T = TypeVar("T")


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
    service = _Service(worker, served, fault, draining)
    front = Front(served, worker.engine.context, lambda: worker.alive, draining, metrics.text)
    app = front.open()
    app.add_api_route("/v1/completions", service.completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], response_model=None)
    return guarded(app, hosts=hosts, key=key, fault=fault, count=metrics.answered, answered=answered)


class _Service:
    def __init__(
        self,
        worker: Worker,
        served: Served,
        fault: Callable[[str], None],
        draining: Callable[[], bool],
    ) -> None:
        self._draining = draining
        self._worker = worker
        self._engine = worker.engine
        self._served = served
        self._fault = fault
        # tokenizing a long prompt takes seconds: off the event loop, and one at a time, to leave cores to the model
        self._encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmos-encode")

    async def completions(self, request: Request) -> Response:
        ask = read_completion(await read_json(request.headers, request.receive))
        self._served.check_name(ask.model)
        encoder, prompt = self._engine.encoder, ask.prompt
        reply = wire.Completion("cmpl-" + uuid.uuid4().hex, *self._about(), with_usage=ask.with_usage)
        encode = (lambda: encoder.text(prompt)) if isinstance(prompt, str) else (lambda: encoder.ids(prompt))
        return await self._answer(request, ask, encode, reply, "prompt")

    async def chat(self, request: Request) -> Response:
        ask = read_chat(await read_json(request.headers, request.receive))
        self._served.check_name(ask.model)
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
            headers = self._served.headers
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

    async def _aside(self, work: Callable[[], T]) -> T:
        """Off the event loop, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, work)

    def _about(self) -> tuple[int, str, str]:
        return int(time.time()), self._served.label, self._served.id.short

"""The routes of a model that reads: OpenAI's embeddings, and vLLM's classify and rerank."""

import asyncio
import base64
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Final, Literal

import torch
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import generate_latest
from pydantic import Field

from llmos_cli.serve.front import Front, Served, guarded
from llmos_cli.serve.guard import Answered, App, read_json, shutting_down
from llmos_cli.serve.reader import Read, ReadingRoom
from llmos_cli.serve.refusal import Refused
from llmos_cli.serve.schema import ModelName, Strict, User, read_body

TEXTS: Final = 1024  # in a request
Text = Annotated[str, Field(max_length=1 << 20)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=TEXTS)]
Ids = Annotated[list[int], Field(min_length=1, max_length=1 << 16)]


class EmbeddingRequest(Strict):
    """`dimensions` is not taken: a vector is as wide as the model."""

    model: ModelName
    input: Text | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=TEXTS)]
    encoding_format: Literal["float", "base64"] | None = None
    user: User | None = None


class ClassifyRequest(Strict):
    model: ModelName
    input: Text | Texts
    user: User | None = None


class RerankRequest(Strict):
    model: ModelName
    query: Text
    documents: Texts
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    user: User | None = None


def build_reading_app(
    room: ReadingRoom,
    served: Served,
    *,
    hosts: frozenset[str] | None,
    fault: Callable[[str], None],
    key: bytes | None = None,
    answered: Callable[[Answered], None] = lambda _: None,
    draining: Callable[[], bool] = lambda: False,
) -> App:
    """The ASGI application; `room` must be started. Parameters are those of `app.build_app`."""
    numbers = _Numbers(served.label, room)
    service = _Service(room, served, numbers, draining)
    app = Front(served, room.reader.context, lambda: room.alive, draining, numbers.text).open()
    if room.reader.classifies:
        app.add_api_route("/v1/classify", service.classify, methods=["POST"], response_model=None)
        app.add_api_route("/v1/rerank", service.rerank, methods=["POST"], response_model=None)
    else:
        app.add_api_route("/v1/embeddings", service.embeddings, methods=["POST"], response_model=None)
    return guarded(app, hosts=hosts, key=key, fault=fault, count=numbers.answered, answered=answered)


class _Service:
    def __init__(self, room: ReadingRoom, served: Served, numbers: "_Numbers", draining: Callable[[], bool]) -> None:
        self._room, self._reader, self._served = room, room.reader, served
        self._numbers, self._draining = numbers, draining
        self._encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmos-encode")

    async def embeddings(self, request: Request) -> Response:
        ask = read_body(EmbeddingRequest, await read_json(request.headers, request.receive))
        rows, tokens = await self._read(request, ask.model, lambda: self._inputs(ask.input))
        vector = _base64 if ask.encoding_format == "base64" else torch.Tensor.tolist
        data = [{"object": "embedding", "index": index, "embedding": vector(row)} for index, row in enumerate(rows)]
        return self._answer({"object": "list", "data": data, "usage": _usage(tokens)})

    async def classify(self, request: Request) -> Response:
        ask = read_body(ClassifyRequest, await read_json(request.headers, request.receive))
        rows, tokens = await self._read(request, ask.model, lambda: self._inputs(ask.input))
        data = [
            {
                "index": index,
                "label": None if self._reader.scores else self._reader.labels[int(row.argmax())],
                "probs": row.tolist(),
                "num_classes": len(row),
            }
            for index, row in enumerate(rows)
        ]
        return self._answer({"object": "list", "data": data, "labels": self._reader.labels, "usage": _usage(tokens)})

    async def rerank(self, request: Request) -> Response:
        ask = read_body(RerankRequest, await read_json(request.headers, request.receive))
        if not self._reader.scores and len(self._reader.labels) != 2:
            raise Refused("this model does not say how well two texts fit: it has more than two labels", field="model")
        rows, tokens = await self._read(
            request,
            ask.model,
            lambda: [
                self._reader.text(ask.query, text, field=f"documents[{index}]")
                for index, text in enumerate(ask.documents)
            ],
        )
        scores = [float(row[-1]) for row in rows]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: ask.top_n or len(scores)]
        results = [
            {
                "index": index,
                "relevance_score": scores[index],
                **({"document": {"text": ask.documents[index]}} if ask.return_documents is not False else {}),
            }
            for index in order
        ]
        return self._answer({"results": results, "usage": _usage(tokens)})

    def _inputs(self, given: Any) -> list[Read]:
        if isinstance(given, str):
            return [self._reader.text(given, field="input")]
        if isinstance(given[0], int):
            return [self._reader.ids(given, field="input")]
        return [
            self._reader.text(item, field=f"input[{index}]")
            if isinstance(item, str)
            else self._reader.ids(item, field=f"input[{index}]")
            for index, item in enumerate(given)
        ]

    async def _read(
        self, request: Request, model: str, encode: Callable[[], list[Read]]
    ) -> tuple[list[torch.Tensor], int]:
        self._served.check_name(model)
        if self._draining():
            raise shutting_down()
        texts = await asyncio.get_running_loop().run_in_executor(self._encoding, encode)
        tokens = sum(len(text.ids) for text in texts)
        request.state.told = {"texts": len(texts), "prompt_tokens": tokens}
        futures = self._room.hand_in(texts)
        try:
            rows = await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            for future in futures:  # of a request that ended before they were computed
                future.cancel()
        self._numbers.read(len(texts), tokens)
        return rows, tokens

    def _answer(self, body: dict[str, Any]) -> Response:
        return JSONResponse({"model": self._served.label, **body}, headers=self._served.headers)


class _Numbers:
    """For Prometheus, in vLLM's names where it has them."""

    def __init__(self, label: str, room: ReadingRoom) -> None:
        self._registry = CollectorRegistry()
        labels, registry = ("model_name",), self._registry
        waiting = Gauge("vllm:num_requests_running", "Texts being read or waiting.", labels, registry=registry)
        waiting.labels(label).set_function(lambda: room.running)
        self._tokens = Counter("vllm:prompt_tokens", "Tokens read.", labels, registry=registry).labels(label)
        self._texts = Counter("llmos_texts_read", "Texts read.", labels, registry=registry).labels(label)
        batches = Gauge("llmos_batches", "Batches computed.", labels, registry=registry)
        batches.labels(label).set_function(lambda: room.batches)
        self._answered = Counter(
            "http_requests", "Requests answered.", ("handler", "method", "status"), registry=registry
        )

    def read(self, texts: int, tokens: int) -> None:
        self._texts.inc(texts)
        self._tokens.inc(tokens)

    def answered(self, handler: str, method: str, status: int) -> None:
        self._answered.labels(handler, method, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _base64(row: torch.Tensor) -> str:
    values = row.tolist()
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")

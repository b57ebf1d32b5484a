"""What every server of a model has, whatever the model does: its name, its health, its numbers, its errors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from llmos_cli.errors import Busy
from llmos_cli.formats.ids import ObjectId
from llmos_cli.serve.guard import CLOSE, RETRY, Answered, App, Guard, internal_error
from llmos_cli.serve.metrics import CONTENT_TYPE
from llmos_cli.serve.refusal import Refused
from llmos_cli.serve.wire import ApiError


@dataclass(frozen=True)
class Served:
    """The model on offer: `label` is "name:tag" or "@id", `id` the manifest it was loaded from."""

    label: str
    id: ObjectId
    created: int

    def names(self) -> frozenset[str]:
        """What clients may call it. A bare name means name:latest, as everywhere in llmos."""
        return frozenset({self.label, self.label.removesuffix(":latest"), f"@{self.id}", f"@{self.id.short}"})

    def check_name(self, name: str) -> None:
        """Raise ApiError unless it is one of them."""
        if name not in self.names():
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist here; this server has {self.label!r}",
                param="model",
                code="model_not_found",
            )

    @property
    def headers(self) -> dict[str, str]:
        """What every answer says of the model that gave it."""
        return {"x-model-id": f"@{self.id}"}


@dataclass(frozen=True)
class Front:
    """The routes that are the same everywhere. Once `draining` says so, the server is not ready."""

    served: Served
    context: int
    alive: Callable[[], bool]
    draining: Callable[[], bool]
    numbers: Callable[[], bytes]

    def open(self) -> FastAPI:
        """An application with these routes and the errors in OpenAI's form."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        for path, route in (
            ("/health", self._health),
            ("/ready", self._ready),
            ("/metrics", self._metrics),
            ("/v1/models", self._models),
            ("/v1/models/{name:path}", self._model),
        ):
            app.add_api_route(path, route, methods=["GET"], response_model=None)
        app.add_exception_handler(ApiError, _show_api_error)
        app.add_exception_handler(Refused, _show_refused)
        app.add_exception_handler(Busy, _show_busy)
        app.add_exception_handler(404, _show_http_error)
        app.add_exception_handler(405, _show_http_error)
        app.add_exception_handler(Exception, _show_fault)
        return app

    async def _health(self) -> Response:
        alive = self.alive()
        body = {"status": "ok" if alive else "stopped", "model": self.served.label, "id": str(self.served.id)}
        return JSONResponse(body, 200 if alive else 503)

    async def _ready(self) -> Response:
        if self.alive() and not self.draining():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "draining" if self.alive() else "stopped"}, 503)

    async def _metrics(self) -> Response:
        return Response(self.numbers(), media_type=CONTENT_TYPE)

    async def _models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def _model(self, name: str) -> Response:
        self.served.check_name(name)
        return JSONResponse(self._entry())

    def _entry(self) -> dict[str, Any]:
        return {
            "id": self.served.label,
            "object": "model",
            "created": self.served.created,
            "owned_by": "llmos",
            "root": f"@{self.served.id}",
            "max_model_len": self.context,
        }


def guarded(
    app: FastAPI,
    *,
    hosts: frozenset[str] | None,
    key: bytes | None,
    fault: Callable[[str], None],
    count: Callable[[str, str, int], None],
    answered: Callable[[Answered], None],
) -> App:
    """The application behind its guard; `count` gets route, method and status of every request that is over."""
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)}

    def over(request: Answered) -> None:
        count(request.path if request.path in paths else "other", request.method, request.status)
        answered(request)

    return Guard(app, hosts=hosts, key=key, fault=fault, answered=over)


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

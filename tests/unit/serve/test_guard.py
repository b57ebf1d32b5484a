import json
import socket
import time
from typing import Any

import httpx
import pytest

from llmos_cli.serve import guard
from llmos_cli.serve.engine import Engine
from llmos_cli.serve.guard import BODY_BYTES, host_name

JSON = {"content-type": "application/json"}
BODY = json.dumps({"model": "tiny", "prompt": "fox", "max_tokens": 2}).encode()


def post(url: str, content: Any, **headers: str) -> httpx.Response:
    sent = JSON | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{url}/v1/completions", content=content, headers=sent, timeout=30)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("host", ["evil.com", "localhost.evil.com", "evil.com:8000", "127.0.0.1.nip.io", "[::2]", ""])
def test_a_name_that_is_not_loopback_is_not_answered(serve, engine: Engine, host: str) -> None:
    url = serve(engine)
    assert code(httpx.get(f"{url}/health", headers={"host": host})) == (403, "host_not_allowed")
    assert code(post(url, BODY, host=host)) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "LOCALHOST:8000", "127.0.0.1:9", "[::1]", "[::1]:80"])
def test_loopback_names_are_answered_on_any_port(serve, engine: Engine, host: str) -> None:
    assert httpx.get(f"{serve(engine)}/health", headers={"host": host}).status_code == 200


def test_a_web_page_of_another_origin_is_not_answered(serve, engine: Engine) -> None:
    url = serve(engine)
    for origin in ("https://evil.com", "null", "http://localhost:3000", "http://[bad"):
        assert code(post(url, BODY, origin=origin)) == (403, "origin_not_allowed")
        asked = httpx.options(
            f"{url}/v1/completions", headers={"origin": origin, "access-control-request-method": "POST"}
        )
        assert code(asked) == (403, "origin_not_allowed")
    assert post(url, BODY, origin=url).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_read(serve, engine: Engine, kind: str) -> None:
    assert code(post(serve(engine), BODY, content_type=kind)) == (415, "unsupported_media_type")


def test_json_with_a_charset_is_json(serve, engine: Engine) -> None:
    assert post(serve(engine), BODY, content_type="Application/JSON; charset=utf-8").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "tiny", "model": "tiny"}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
        "\ufeff{}".encode(),
    ],
)
def test_what_is_not_json_is_refused(serve, engine: Engine, body: bytes) -> None:
    assert code(post(serve(engine), body)) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (rb'"prompt": "a\ud800"', "prompt"),
        (rb'"prompt": "a", "stop": "\ud800"', "stop[0]"),
        (rb'"prompt": "a", "\ud800": 1', "body"),
        (rb'"prompt": "a", "user": "\ud800"', "user"),
        (rb'"prompt": ["\ud800"]', "prompt"),
    ],
)
def test_half_a_surrogate_pair_is_refused(serve, engine: Engine, change: bytes, param: str) -> None:
    response = post(serve(engine), b'{"model": "tiny", ' + change + b"}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_half_a_surrogate_pair_names_no_model(serve, engine: Engine) -> None:
    response = post(serve(engine), rb'{"model": "\ud800", "prompt": "a"}')
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == "model"


def test_a_body_over_the_limit_is_refused_said_or_not(serve, engine: Engine) -> None:
    url = serve(engine)

    def chunks() -> Any:
        for _ in range(BODY_BYTES // 65536 + 2):
            yield b" " * 65536

    assert code(post(url, chunks())) == (413, "too_large")
    with socket.create_connection(url.removeprefix("http://").split(":")) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {BODY_BYTES + 1}\r\n\r\n".encode()
        )
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_at_the_limit_is_read(serve, engine: Engine) -> None:
    assert post(serve(engine), BODY + b" " * (BODY_BYTES - len(BODY))).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(serve, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with socket.create_connection(serve(engine).removeprefix("http://").split(":")) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = b""
        while block := client.recv(1000):
            answer += block
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"timeout"' in answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 500_000,
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ],
)
def test_broken_http_is_a_400_and_the_next_request_works(serve, engine: Engine, request_bytes: bytes) -> None:
    url = serve(engine)
    with socket.create_connection(url.removeprefix("http://").split(":")) as client:
        client.sendall(request_bytes)
        assert client.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{url}/health").status_code == 200


def test_every_answer_has_its_own_request_id(serve, engine: Engine) -> None:
    url = serve(engine)
    ids = {httpx.get(f"{url}{path}").headers["x-request-id"] for path in ("/health", "/v1/models", "/nope")}
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("header", "name"),
    [("localhost", "localhost"), ("a:80", "a"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("A", "a"), ("a:b", "a:b")],
)
def test_a_host_header_is_a_name_and_perhaps_a_port(header: str, name: str) -> None:
    assert host_name(header) == name


KEY = b"a-key-of-enough-letters"


def test_the_key_guards_every_route_but_health(serve, engine: Engine) -> None:
    url = serve(engine, key=KEY)
    assert httpx.get(f"{url}/health").status_code == 200
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY.decode()}, {"authorization": "Basic x"}):
        for path in ("/ready", "/metrics", "/v1/models", "/nowhere"):
            response = httpx.get(url + path, headers=given)
            assert code(response) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert code(post(url, BODY, **given)) == (401, "invalid_api_key")
    right = {"authorization": f"bearer {KEY.decode()}"}
    assert httpx.get(f"{url}/v1/models", headers=right).status_code == 200
    assert post(url, BODY, **right).status_code == 200


def test_whoever_runs_the_server_hears_of_every_request_but_not_of_its_text(serve, engine: Engine) -> None:
    heard: list[guard.Answered] = []
    url = serve(engine, answered=heard.append)
    whole = post(url, BODY)
    streamed = post(url, json.dumps(json.loads(BODY) | {"stream": True}).encode())
    httpx.get(f"{url}/nowhere")
    end = time.monotonic() + 20
    while len(heard) < 3:  # the client has its answer a moment before
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [(one.method, one.path, one.status) for one in heard] == [
        ("POST", "/v1/completions", 200),
        ("POST", "/v1/completions", 200),
        ("GET", "/nowhere", 404),
    ]
    assert [one.id for one in heard[:2]] == [whole.headers["x-request-id"], streamed.headers["x-request-id"]]
    prompt = whole.json()["usage"]["prompt_tokens"]
    for one, stream in zip(heard, (False, True), strict=False):
        assert one.told == {"stream": stream, "texts": 1, "prompt_tokens": prompt, "completion_tokens": 2}
        assert one.seconds > 0

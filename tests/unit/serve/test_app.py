import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from llmos_cli.formats.ids import object_id
from llmos_cli.serve.background import serving
from llmos_cli.serve.engine import Engine
from llmos_cli.serve.front import Served
from llmos_cli.serve.sampling import Sampling
from llmos_cli.serve.sequence import Piece

COMPLETION = {"model": "tiny", "prompt": "the fox", "max_tokens": 8, "seed": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 1}


def post(url: str, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", json=body, timeout=60, **options)


def error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def events(response: httpx.Response) -> list[Any]:
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def wait_until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def steps(endless_engine: Engine) -> Iterator[list[float]]:
    """Grows with each step of the endless model."""
    seen: list[float] = []
    run = endless_engine.runner.run

    def noted(spans: Any) -> Any:
        seen.append(time.monotonic())
        return run(spans)

    endless_engine.runner.run = noted  # type: ignore[method-assign]
    yield seen
    endless_engine.runner.run = run  # type: ignore[method-assign]


def test_health_and_models(serve, engine: Engine) -> None:
    url = serve(engine)
    assert httpx.get(f"{url}/health").json()["status"] == "ok"
    listed = httpx.get(f"{url}/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny:latest"]
    entry = httpx.get(f"{url}/v1/models/tiny:latest").json()
    assert entry == listed["data"][0]
    assert entry["max_model_len"] == engine.context
    short = entry["root"][:13]
    for name in ("tiny", short, entry["root"]):
        assert httpx.get(f"{url}/v1/models/{name}").json() == entry
        assert post(url, "completions", COMPLETION | {"model": name}).status_code == 200


@pytest.mark.parametrize("name", ["other", "tiny:v2", "@00000000", "TINY", "tiny:latest "])
def test_another_models_name_is_not_found(serve, engine: Engine, name: str) -> None:
    url = serve(engine)
    for response in (httpx.get(f"{url}/v1/models/{name}"), post(url, "completions", COMPLETION | {"model": name})):
        assert response.status_code == 404
        assert error(response)["code"] == "model_not_found"


def test_a_completion_is_what_the_engine_makes(serve, engine: Engine) -> None:
    prompt = engine.encoder.text("the fox")
    found = list(engine.generate(prompt, Sampling(8, seed=1)))
    body = post(serve(engine), "completions", COMPLETION).json()
    assert body["choices"] == [
        {
            "index": 0,
            "text": "".join(piece.text for piece in found),
            "logprobs": None,
            "finish_reason": found[-1].finish_reason,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": found[-1].tokens,
        "total_tokens": len(prompt) + found[-1].tokens,
    }
    assert body["model"] == "tiny:latest"
    assert len(body["system_fingerprint"]) == 12


def test_a_stream_joins_to_the_same_text(serve, chat_engine: Engine) -> None:
    url = serve(chat_engine)
    whole = post(url, "completions", COMPLETION).json()
    response = post(url, "completions", COMPLETION | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {chunk["usage"] for chunk in chunks} == {None}

    whole = post(url, "chat/completions", CHAT).json()
    chunks = events(post(url, "chat/completions", CHAT | {"stream": True}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert not any("usage" in chunk for chunk in chunks)


def test_a_model_without_a_template_takes_no_messages(serve, engine: Engine) -> None:
    response = post(serve(engine), "chat/completions", CHAT)
    assert response.status_code == 400
    assert error(response)["code"] == "no_chat_template"


def test_a_control_token_in_a_message_is_refused_and_in_a_prompt_is_text(serve, chat_engine: Engine) -> None:
    url = serve(chat_engine)
    message = {"role": "user", "content": "<|endoftext|>"}
    response = post(url, "chat/completions", CHAT | {"messages": [message]})
    assert response.status_code == 400
    assert error(response)["param"] == "messages[0].content"
    assert post(url, "completions", COMPLETION | {"prompt": "<|endoftext|>"}).json()["usage"]["prompt_tokens"] > 5


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(serve, chat_engine: Engine) -> None:
    url = serve(chat_engine)
    response = post(url, "completions", COMPLETION | {"prompt": [5] * 500})
    assert response.status_code == 400
    assert error(response)["code"] == "context_length_exceeded"
    assert "500" in error(response)["message"]
    assert "128" in error(response)["message"]
    messages = [{"role": "user", "content": "fox " * 500}]
    assert error(post(url, "chat/completions", CHAT | {"messages": messages}))["param"] == "messages"
    assert error(post(url, "completions", COMPLETION | {"max_tokens": 127}))["param"] == "max_tokens"


def test_a_bad_request_is_answered_while_the_model_computes(serve, endless_engine: Engine, steps) -> None:
    url = serve(endless_engine)
    with httpx.stream("POST", f"{url}/v1/completions", json=COMPLETION | {"max_tokens": 5000, "stream": True}):
        started = time.monotonic()
        assert post(url, "completions", COMPLETION | {"best_of": 3}).status_code == 400
        assert httpx.get(f"{url}/health").status_code == 200
        assert time.monotonic() - started < 5
        assert len(steps) < 5000


def test_a_client_that_leaves_a_stream_stops_the_computation(serve, endless_engine: Engine, steps) -> None:
    url = serve(endless_engine, waiting=0)
    body = COMPLETION | {"max_tokens": 8000, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
    assert post_until_free(url).status_code == 200
    assert len(steps) < 8000


def test_a_client_that_leaves_a_whole_answer_stops_the_computation(serve, endless_engine: Engine, steps) -> None:
    url = serve(endless_engine, waiting=0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=COMPLETION | {"max_tokens": 8000}, timeout=0.3)
    assert post_until_free(url).status_code == 200
    assert 0 < len(steps) < 8000


def post_until_free(url: str) -> httpx.Response:
    answers = []

    def free() -> bool:
        answers.append(post(url, "completions", COMPLETION))
        return answers[-1].status_code != 503

    wait_until(free)
    return answers[-1]


def test_a_client_that_leaves_while_waiting_is_never_computed(serve, endless_engine: Engine, steps) -> None:
    url = serve(endless_engine)
    body = COMPLETION | {"max_tokens": 8000, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=COMPLETION | {"max_tokens": 7000}, timeout=0.2)
    assert post(url, "completions", COMPLETION).status_code == 200
    assert len(steps) < 7000


def test_more_than_may_wait_are_told_to_come_back(serve, endless_engine: Engine) -> None:
    url = serve(endless_engine, waiting=0)
    body = COMPLETION | {"max_tokens": 8000, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        refused = post(url, "completions", COMPLETION)
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert error(refused)["type"] == "server_error"


def test_a_fault_in_the_model_is_a_500_without_detail_and_the_next_request_works(
    serve, chat_engine: Engine, scripted
) -> None:
    faults: list[str] = []
    scripts = iter([raising(RuntimeError("/secret/path")), iter([Piece("fine", 1, "stop")])])
    url = serve(scripted(lambda *_: next(scripts), chat_engine), fault=faults.append)
    response = post(url, "completions", COMPLETION)
    assert response.status_code == 500
    assert error(response)["message"] == f"internal error; request id {response.headers['x-request-id']}"
    wait_until(lambda: len(faults) == 1)
    assert "RuntimeError: /secret/path" in faults[0]
    assert response.headers["x-request-id"] in faults[0]
    assert post(url, "completions", COMPLETION).json()["choices"][0]["text"] == "fine"


def test_a_fault_in_mid_stream_is_the_last_event(serve, chat_engine: Engine, scripted) -> None:
    faults: list[str] = []
    script = lambda *_: raising(RuntimeError("x"), Piece("some", 1))  # noqa: E731
    url = serve(scripted(script, chat_engine), fault=faults.append)
    response = post(url, "completions", COMPLETION | {"stream": True})
    blocks = response.text.strip().split("\n\n")
    assert json.loads(blocks[0].removeprefix("data: "))["choices"][0]["text"] == "some"
    assert json.loads(blocks[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert len(faults) == 1


def raising(exc: Exception, *pieces: Piece) -> Iterator[Piece]:
    yield from pieces
    raise exc


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/health/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_what_is_not_served_is_an_error_in_openais_form(serve, engine, method: str, path: str, status: int) -> None:
    response = httpx.request(method, serve(engine) + path)
    assert response.status_code == status
    assert error(response)["type"] == "invalid_request_error"


def test_stopping_lets_a_short_answer_finish_and_ends_a_long_one_with_an_error(endless_engine: Engine, steps) -> None:
    faults: list[str] = []
    served = Served("tiny:latest", object_id(b"tiny"), 0)
    with ThreadPoolExecutor() as pool, serving(endless_engine, served, fault=faults.append, drain_seconds=1) as url:
        long = pool.submit(post, url, "completions", COMPLETION | {"max_tokens": 8000})
        wait_until(lambda: len(steps) > 0)
    assert long.result().status_code == 503
    assert error(long.result())["code"] == "shutting_down"
    steps.clear()
    with ThreadPoolExecutor() as pool, serving(endless_engine, served, fault=faults.append, drain_seconds=20) as url:
        short = pool.submit(post, url, "completions", COMPLETION | {"max_tokens": 300})
        wait_until(lambda: len(steps) > 0)
    assert short.result().json()["usage"]["completion_tokens"] == 300
    assert faults == []


def test_several_texts_of_one_request(serve, chat_engine: Engine) -> None:
    url = serve(chat_engine)
    body = COMPLETION | {"n": 3, "max_tokens": 6}
    whole = post(url, "completions", body).json()
    texts = [choice["text"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == post(url, "completions", body | {"n": 1}).json()["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == 18
    streamed = ["", "", ""]
    ends = []
    for chunk in events(post(url, "completions", body | {"stream": True})):
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert streamed == texts
    assert sorted(ends) == [0, 1, 2]


def test_more_texts_than_places_are_refused(serve, endless_engine: Engine) -> None:
    response = post(serve(endless_engine, waiting=1), "completions", COMPLETION | {"n": 3})
    assert response.status_code == 503


def test_log_probabilities_are_those_of_the_tokens(serve, chat_engine: Engine) -> None:
    url = serve(chat_engine)
    body = COMPLETION | {"temperature": 0, "logprobs": 3, "max_tokens": 4}
    (choice,) = post(url, "completions", body).json()["choices"]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert told["text_offset"] == [len("".join(told["tokens"][:count])) for count in range(4)]
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(top) == 3
        assert max(top, key=top.__getitem__) == token
        assert top[token] == logprob <= 0
    streamed = [chunk["choices"][0] for chunk in events(post(url, "completions", body | {"stream": True}))]
    assert [t for c in streamed if c["logprobs"] for t in c["logprobs"]["token_logprobs"]] == told["token_logprobs"]

    chat = CHAT | {"temperature": 0, "logprobs": True, "top_logprobs": 2, "max_tokens": 5}
    (choice,) = post(url, "chat/completions", chat).json()["choices"]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace") == choice["message"]["content"]
    assert [token["token"] for token in content] == [token["top_logprobs"][0]["token"] for token in content]
    assert post(url, "chat/completions", CHAT).json()["choices"][0]["logprobs"] is None


def test_a_token_that_is_ruled_out_or_forced_by_bias(serve, chat_engine: Engine) -> None:
    url = serve(chat_engine)
    token = chat_engine.encoder.text("z")[0]
    forced = post(url, "completions", COMPLETION | {"logit_bias": {str(token): 100}, "max_tokens": 3})
    assert forced.json()["choices"][0]["text"] == "zzz"
    unknown = post(url, "completions", COMPLETION | {"logit_bias": {"99999": 1}})
    assert (unknown.status_code, error(unknown)["param"]) == (400, "logit_bias")


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_answers_keep_to_a_schema(serve, chat_engine: Engine) -> None:
    url = serve(chat_engine)
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        body = CHAT | {"response_format": wanted, "seed": seed, "max_tokens": 80}
        (choice,) = post(url, "chat/completions", body).json()["choices"]
        assert choice["finish_reason"] == "stop"
        found = json.loads(choice["message"]["content"])
        assert sorted(found) == ["age", "name"]
        assert isinstance(found["age"], int)
    body = CHAT | {"response_format": {"type": "json_object"}, "max_tokens": 30, "temperature": 0}
    assert post(url, "chat/completions", body).json()["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]{2}"}, r"[a-c]{3}-[0-9]{2}"),
        ({"choice": ["yes", "no"]}, r"yes|no"),
        ({"grammar": 'start: "fox" ("," "dog")*'}, r"fox(,dog)*"),
        ({"json": {"enum": [1, 2]}}, r"[12]"),
    ],
)
def test_answers_keep_to_a_grammar(serve, chat_engine: Engine, wanted: dict[str, Any], pattern: str) -> None:
    body = COMPLETION | {"structured_outputs": wanted, "max_tokens": 60}
    (choice,) = post(serve(chat_engine), "completions", body).json()["choices"]
    if choice["finish_reason"] == "stop":
        assert re.fullmatch(pattern, choice["text"])
    else:
        assert wanted.keys() == {"grammar"}


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
            "response_format",
        ),
    ],
)
def test_a_shape_that_is_none_is_refused_by_name(serve, chat_engine: Engine, wanted: Any, field: str) -> None:
    response = post(serve(chat_engine), "chat/completions", CHAT | wanted)
    assert response.status_code == 400
    assert error(response)["param"] == field


def test_every_answer_names_what_answered(serve, engine: Engine) -> None:
    response = post(serve(engine), "completions", COMPLETION)
    assert response.headers["x-model-id"].startswith(f"@{response.json()['system_fingerprint']}")

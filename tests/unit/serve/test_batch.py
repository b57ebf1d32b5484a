import json
from typing import Any

import pytest

from llmos_cli.serve.batch import Done, answer_all
from llmos_cli.serve.engine import Engine
from llmos_cli.serve.sampling import Sampling

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "seed": 2}


def run(engine: Engine, requests: list[Any], known: frozenset[str] = frozenset()) -> tuple[Done, dict[str, Any]]:
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in requests]
    written: list[dict[str, Any]] = []
    done = answer_all(engine, "tiny:latest", "abc", lines, known, written.append)
    assert len({answer["custom_id"] for answer in written}) == len(written)
    return done, {answer["custom_id"]: answer["response"] for answer in written}


def test_each_line_is_answered_as_if_it_were_alone(chat_engine: Engine) -> None:
    prompts = [f"the fox {number}" for number in range(40)]
    requests = [
        {"custom_id": f"q{number}", "url": "/v1/completions", "body": {"prompt": prompt, "seed": number}}
        for number, prompt in enumerate(prompts)
    ]
    done, found = run(chat_engine, requests)
    assert (done.answered, done.refused, done.known, done.tokens) == (40, 0, 0, 640)
    for number in (0, 17, 39):
        ids = chat_engine.encoder.text(prompts[number])
        alone = "".join(piece.text for piece in chat_engine.generate(ids, Sampling(16, seed=number)))
        body = found[f"q{number}"]["body"]
        assert body["choices"][0]["text"] == alone
        assert body["model"] == "tiny:latest"
        assert body["system_fingerprint"] == "abc"


def test_bodies_alone_are_named_by_their_line_and_told_apart_by_what_they_have(chat_engine: Engine) -> None:
    _, found = run(chat_engine, [{"prompt": "fox"}, b"\n", CHAT, {**CHAT, "n": 2}])
    assert sorted(found) == ["line-1", "line-3", "line-4"]
    assert found["line-1"]["body"]["object"] == "text_completion"
    assert found["line-3"]["body"]["object"] == "chat.completion"
    texts = [choice["message"]["content"] for choice in found["line-4"]["body"]["choices"]]
    assert texts[0] == found["line-3"]["body"]["choices"][0]["message"]["content"] != texts[1]


@pytest.mark.parametrize(
    ("line", "param"),
    [
        (b"{\n", "body"),
        (b"[]\n", "body"),
        ({"prompt": "fox", "nonsense": 1}, "nonsense"),
        ({"prompt": "fox", "stream": True}, "stream"),
        ({"prompt": [5] * 500}, "prompt"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {}}, "url"),
        ({"custom_id": 5, "prompt": "x"}, "custom_id"),
        ({"prompt": "x", "structured_outputs": {"regex": "("}}, "structured_outputs"),
    ],
)
def test_a_bad_line_is_answered_with_its_error_and_the_others_are_made(
    chat_engine: Engine, line: Any, param: str
) -> None:
    done, found = run(chat_engine, [{"prompt": "fox"}, line, {"prompt": "dog"}])
    assert (done.answered, done.refused) == (2, 1)
    (bad,) = (answer for answer in found.values() if answer["status_code"] == 400)
    assert bad["body"]["error"]["param"] == param


def test_what_was_answered_before_is_not_asked_again(chat_engine: Engine) -> None:
    requests = [{"custom_id": name, "prompt": "fox"} for name in "abc"]
    done, found = run(chat_engine, requests, known=frozenset("ac"))
    assert (done.answered, done.known) == (1, 2)
    assert list(found) == ["b"]

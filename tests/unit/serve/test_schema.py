import re
from typing import Any

import pytest

from llmos_cli.serve.refusal import Refused
from llmos_cli.serve.sampling import Sampling
from llmos_cli.serve.schema import NEUTRAL_CHAT, NEUTRAL_COMPLETION, read_chat, read_completion

COMPLETION = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def refusal(read, body: Any) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        read(body)
    return caught.value.field, caught.value.reason


def test_the_defaults_are_openais() -> None:
    assert read_completion(COMPLETION).sampling() == Sampling(16, 1.0, 1.0, 0, None, ())
    assert read_chat(CHAT).sampling() == Sampling(None, 1.0, 1.0, 0, None, ())


def test_every_field_arrives() -> None:
    body = {"max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": 7, "seed": -1, "stop": "end", "user": "me"}
    assert read_completion(COMPLETION | body).sampling() == Sampling(3, 0.0, 0.5, 7, -1, ("end",))
    assert read_chat(CHAT | body | {"stop": ["a", "b"]}).sampling().stop == ("a", "b")
    asked = read_chat(CHAT | {"max_completion_tokens": 9, "stream": True, "stream_options": {"include_usage": True}})
    assert asked.sampling().max_tokens == 9
    assert asked.stream
    assert asked.with_usage


def test_null_means_the_default() -> None:
    empty = dict.fromkeys(("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "user"))
    assert read_completion(COMPLETION | empty).sampling() == read_completion(COMPLETION).sampling()


@pytest.mark.parametrize("prompt", ["text", ["text"], [1, 2, 3]])
def test_a_prompt_is_a_text_or_token_ids(prompt: Any) -> None:
    assert read_completion({"model": "m", "prompt": prompt}).prompt == ("text" if prompt == ["text"] else prompt)


@pytest.mark.parametrize("prompt", [None, 1, [], ["a", "b"], [[1]], [1, "a"], [True], [1.0], {"a": 1}])
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert refusal(read_completion, {"model": "m", "prompt": prompt})[0] == "prompt"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("max_tokens", "5", "invalid_type"),
        ("max_tokens", 5.0, "invalid_type"),
        ("max_tokens", True, "invalid_type"),
        ("max_tokens", 0, "invalid_value"),
        ("max_tokens", -1, "invalid_value"),
        ("max_tokens", 10**9, "invalid_value"),
        ("max_tokens", 10**30, "invalid_value"),
        ("temperature", "hot", "invalid_type"),
        ("temperature", True, "invalid_type"),
        ("temperature", -0.1, "invalid_value"),
        ("temperature", 2.1, "invalid_value"),
        ("temperature", float("inf"), "invalid_value"),
        ("temperature", float("nan"), "invalid_value"),
        ("top_p", 1.1, "invalid_value"),
        ("top_k", -1, "invalid_value"),
        ("top_k", 1.5, "invalid_type"),
        ("seed", 2**63, "invalid_value"),
        ("seed", "1", "invalid_type"),
        ("stop", "", "invalid_value"),
        ("stop", ["a"] * 5, "invalid_value"),
        ("stop", ["a" * 300], "invalid_value"),
        ("stop", 1, "invalid_type"),
        ("stream", 1, "invalid_type"),
        ("stream", "true", "invalid_type"),
        ("user", 5, "invalid_type"),
        ("n", 0, "invalid_value"),
        ("n", 17, "invalid_value"),
        ("n", True, "invalid_type"),
        ("n", "1", "invalid_type"),
        ("presence_penalty", 2.5, "invalid_value"),
        ("frequency_penalty", False, "invalid_type"),
        ("repetition_penalty", 0, "invalid_value"),
        ("min_p", 1.5, "invalid_value"),
        ("logit_bias", {"5": 101}, "invalid_value"),
        ("logit_bias", {"5": "1"}, "invalid_type"),
        ("logit_bias", [], "invalid_type"),
        ("model", 5, "invalid_type"),
        ("model", "", "invalid_value"),
        ("zzz", 1, "unknown_parameter"),
    ],
)
def test_a_bad_value_is_refused_by_the_fields_name(field: str, value: Any, reason: str) -> None:
    for read, body in ((read_completion, COMPLETION), (read_chat, CHAT)):
        named, why = refusal(read, body | {field: value})
        assert re.split(r"[\[.]", named)[0] == field
        assert why == reason


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("echo", True),
        ("echo", 0),
        ("best_of", 5),
        ("suffix", "x"),
    ],
)
def test_what_a_completion_does_not_support_is_refused(field: str, value: Any) -> None:
    assert refusal(read_completion, COMPLETION | {field: value}) == (field, "unsupported")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("reasoning_effort", "low"),
        ("modalities", ["audio"]),
        ("store", True),
    ],
)
def test_what_a_chat_does_not_support_is_refused(field: str, value: Any) -> None:
    assert refusal(read_chat, CHAT | {field: value}) == (field, "unsupported")


def test_values_that_change_nothing_are_accepted() -> None:
    for read, body, neutral in (
        (read_completion, COMPLETION, NEUTRAL_COMPLETION),
        (read_chat, CHAT, NEUTRAL_CHAT),
    ):
        for field, values in neutral.items():
            for value in values:
                assert read(body | {field: value}) == read(body)
    for field in ("presence_penalty", "frequency_penalty", "min_p"):
        assert read_completion(COMPLETION | {field: 0.0}).sampling() == read_completion(COMPLETION).sampling()


def test_what_changes_the_choice_of_tokens_arrives() -> None:
    body = {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.1, "min_p": 0.1, "n": 3}
    ask = read_chat(CHAT | body | {"logit_bias": {"5": -100}, "logprobs": True, "top_logprobs": 4})
    expected = Sampling(
        presence_penalty=0.5, frequency_penalty=-1, repetition_penalty=1.1, min_p=0.1, logit_bias={5: -100}, logprobs=4
    )
    assert (ask.sampling(), ask.texts) == (expected, 3)
    assert read_chat(CHAT | {"logprobs": True}).sampling().logprobs == 0
    assert read_chat(CHAT).sampling().logprobs is None
    assert read_completion(COMPLETION | {"logprobs": 2}).sampling().logprobs == 2
    assert refusal(read_chat, CHAT | {"top_logprobs": 2}) == ("top_logprobs", "invalid_value")
    assert refusal(read_chat, CHAT | {"logit_bias": {"fox": 1}})[0].startswith("logit_bias")


def test_what_answers_must_look_like_is_one_thing() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert read_chat(CHAT | {"response_format": wanted}).shape == ("response_format", {"json": schema})
    assert read_chat(CHAT | {"response_format": {"type": "json_object"}}).shape == (
        "response_format",
        {"json": {"type": "object"}},
    )
    assert read_chat(CHAT | {"response_format": {"type": "text"}}).shape is None
    for kind, value in (("json", schema), ("regex", "a+"), ("grammar", "start: /a/"), ("choice", ["a", "b"])):
        assert read_completion(COMPLETION | {"structured_outputs": {kind: value}}).shape == (
            "structured_outputs",
            {kind: value},
        )
    for bad in ({}, {"regex": "a", "choice": ["b"]}):
        assert refusal(read_chat, CHAT | {"structured_outputs": bad})[0] == "structured_outputs"
    for bad in ({"type": "json_schema"}, {"type": "text", "json_schema": wanted["json_schema"]}):
        assert refusal(read_chat, CHAT | {"response_format": bad})[0] == "response_format"
    both = {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}
    assert refusal(read_chat, CHAT | both)[0] == "structured_outputs"


def test_stream_options_need_a_stream() -> None:
    assert refusal(read_completion, COMPLETION | {"stream_options": {"include_usage": True}})[0] == "stream_options"
    body = COMPLETION | {"stream": True, "stream_options": {"include_obfuscation": True}}
    assert refusal(read_completion, body) == ("stream_options.include_obfuscation", "unknown_parameter")


def test_two_lengths_that_disagree_are_refused() -> None:
    assert refusal(read_chat, CHAT | {"max_tokens": 1, "max_completion_tokens": 2})[0] == "max_tokens"
    assert read_chat(CHAT | {"max_tokens": 2, "max_completion_tokens": 2}).sampling().max_tokens == 2


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "messages[0].content"),
        ({"role": "user", "content": "x", "name": "me"}, "messages[0].name"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
        ("hi", "messages[0]"),
    ],
)
def test_a_bad_message_is_refused_by_its_place(message: Any, field: str) -> None:
    assert refusal(read_chat, {"model": "m", "messages": [message]})[0] == field


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    given = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []}
    assert read_chat({"model": "m", "messages": [given]}).messages[0].content == "x"


@pytest.mark.parametrize("messages", [[], "hi", {}, [{"role": "user", "content": "x"}] * 5000])
def test_messages_are_a_list_of_bounded_length(messages: Any) -> None:
    assert refusal(read_chat, {"model": "m", "messages": messages})[0] == "messages"


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    assert refusal(read_completion, body) == ("body", "invalid_type")


def test_a_missing_field_is_named() -> None:
    assert refusal(read_completion, {"model": "m"}) == ("prompt", "missing_required_parameter")
    assert refusal(read_chat, {"messages": CHAT["messages"]}) == ("model", "missing_required_parameter")


def test_a_long_field_name_does_not_fill_the_answer() -> None:
    field, _ = refusal(read_completion, COMPLETION | {"z" * 100_000: 1})
    assert len(field) <= 100

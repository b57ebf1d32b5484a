"""Many requests from a file: computed together, written as they end, never computed twice.

A line is a request in the form of OpenAI's batches, {"custom_id", "url", "body"}, or a body alone, with a `prompt` or
with `messages`. What it gives is a line {"custom_id", "response": {"status_code", "body"}}. A request that is no good
is answered with its error, as a server would.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from llmos_cli.errors import Damaged
from llmos_cli.formats import canonical
from llmos_cli.serve import wire
from llmos_cli.serve.answers import Answers
from llmos_cli.serve.engine import Engine
from llmos_cli.serve.refusal import Refused
from llmos_cli.serve.schema import ChatRequest, CompletionRequest, read_chat, read_completion
from llmos_cli.serve.sequence import Piece

_CHAT: Final = "/v1/chat/completions"
_COMPLETION: Final = "/v1/completions"
_AHEAD: Final = 2  # requests in flight for each slot


@dataclass
class Done:
    """What became of the requests; `known` were answered by an earlier run."""

    answered: int = 0
    refused: int = 0
    known: int = 0
    tokens: int = 0


@dataclass(eq=False)
class _Asked:
    name: str
    reply: wire.Completion
    answers: Answers
    prompt_tokens: int
    left: int
    errors: list[Exception] = field(default_factory=list)


def answer_all(
    engine: Engine,
    label: str,
    fingerprint: str,
    lines: Iterable[bytes],
    known: frozenset[str],
    write: Callable[[dict[str, Any]], None],
    advance: Callable[[int], None] = lambda _: None,
) -> Done:
    """Answer every line but those whose `custom_id` is `known`; raises an error of the model itself."""
    done, over = Done(), list[_Asked]()
    flying = 0
    requests = _requests(lines, label, fingerprint)
    most = _AHEAD * engine.runner.slots
    more = True
    while more or flying:
        while more and flying < most:
            found = next(requests, None)
            if found is None:
                more = False
                break
            name, ask, reply = found
            if name in known:
                done.known += 1
                advance(1)
                continue
            try:
                if isinstance(ask, Refused):
                    raise ask
                _start(engine, name, ask, reply, over)
                flying += 1
            except Refused as exc:
                error = wire.ApiError(400, exc.message, param=exc.field, code=exc.reason)
                write({"custom_id": name, "response": {"status_code": 400, "body": error.body}})
                done.refused += 1
                advance(1)
        engine.step()
        for asked in over:
            flying -= 1
            if asked.errors:
                raise asked.errors[0]
            body = asked.reply.whole(asked.answers.whole(), asked.answers.usage(asked.prompt_tokens))
            write({"custom_id": asked.name, "response": {"status_code": 200, "body": body}})
            done.answered += 1
            done.tokens += asked.answers.made
            advance(1)
        over.clear()
    return done


Ask = CompletionRequest | ChatRequest | Refused


def _requests(lines: Iterable[bytes], label: str, fingerprint: str) -> Iterator[tuple[str, Ask, wire.Completion]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, chat = f"line-{number}", False
        ask: Ask
        try:
            name, chat, body = _body(line, name)
            body.setdefault("model", label)
            ask = read_chat(body) if chat else read_completion(body)
            if ask.stream:
                raise Refused("stream is for servers; a batch is answered whole", field="stream")
        except Refused as exc:
            ask = exc
        kind = wire.Chat if chat else wire.Completion
        yield name, ask, kind(f"batch-{name}", int(time.time()), label, fingerprint)


def _body(line: bytes, name: str) -> tuple[str, bool, dict[str, Any]]:
    try:
        table = canonical.loads(line, "the line")
    except Damaged as exc:
        raise Refused(exc.message, field="body", reason="invalid_json") from exc
    if not isinstance(table, dict):
        raise Refused("the line is not a JSON object", field="body", reason="invalid_type")
    found = table.pop("custom_id", name)
    if not isinstance(found, str):
        raise Refused("custom_id is not a text", field="custom_id", reason="invalid_type")
    if "body" not in table:
        return found, "messages" in table, table
    url, body = table.get("url"), table["body"]
    if url not in (_CHAT, _COMPLETION) or not isinstance(body, dict):
        raise Refused(f"url is one of {_CHAT} and {_COMPLETION}, body an object", field="url")
    return found, url == _CHAT, dict(body)


def _start(
    engine: Engine, name: str, ask: CompletionRequest | ChatRequest, reply: wire.Completion, over: list[_Asked]
) -> None:
    encoder, sampling = engine.encoder, ask.sampling()
    encoder.check_tokens(sampling.logit_bias, "logit_bias")
    if isinstance(ask, ChatRequest):
        prompt = encoder.chat([message.model_dump() for message in ask.messages])
    else:
        prompt = encoder.text(ask.prompt) if isinstance(ask.prompt, str) else encoder.ids(ask.prompt)
    where, wanted = ask.shape or ("", None)
    grammar = None if wanted is None else engine.grammars.compile(wanted, field=where)
    answers = Answers(encoder, ask.texts, logprobs=sampling.logprobs is not None)
    asked = _Asked(name, reply, answers, len(prompt), ask.texts)

    def emit(piece: Piece) -> None:
        answers.add(piece)

    def left() -> None:
        asked.left -= 1
        if not asked.left:
            over.append(asked)

    made = [
        engine.request(
            prompt,
            sampling.of_text(index),
            emit,
            failed=asked.errors.append,
            left=left,
            grammar=None if grammar is None else engine.grammars.matcher(grammar),
            index=index,
        )
        for index in range(ask.texts)
    ]
    for request in made:
        engine.add(request)

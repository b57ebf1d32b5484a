"""Conversations to text by a model's chat template, and which of it the assistant says.

A template with {% generation %} marks that itself. Of any other, the conversation is rendered up to each turn of the
assistant, with the words that ask for one, and up to its end: what is between is learned. That is right only if a
longer conversation begins as a shorter one does; a template that is not so is refused. Text of a message never
becomes a control token. It knows nothing of files and shards.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from llmos_cli.data.sources.records import BadRecord
from llmos_cli.errors import UsageError
from llmos_cli.formats import canonical

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ASSISTANT: Final = "assistant"
CHATML_TOKENS: Final = ("<|im_start|>", "<|im_end|>")
CHATML: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEMPLATE_FILE: Final = "chat_template.jinja"
_CONFIG_FILE: Final = "tokenizer_config.json"
_MARKS: Final = re.compile(r"\{%-?\s*generation\b")
_DAY: Final = "01 Jan 2025"  # what templates that ask for the day are told, so that equal work gives equal text
_PROBE: Final = tuple(
    {"role": role, "content": text}
    for role, text in (("user", "one"), (ASSISTANT, "two"), ("user", "three"), (ASSISTANT, "four"))
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `learned` are the spans of it, in characters, that the assistant says."""

    text: str
    learned: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """`source` is Jinja, `names` what it may call the special tokens, `controls` those that no message may write."""

    source: str
    names: Mapping[str, str]
    controls: tuple[str, ...] = ()

    def render(self, messages: Any) -> Rendered:
        """Raises BadRecord for what is not a conversation, or one that this template cannot render in parts."""
        checked = _checked(messages, self.controls)
        if _MARKS.search(self.source):
            text, spans = self._text(checked, marked=True)
            return Rendered(text, tuple((start, stop) for start, stop in spans if start < stop))
        text, _ = self._text(checked)
        learned = []
        for turn, message in enumerate(checked):
            if message["role"] == ASSISTANT:
                before, _ = self._text(checked[:turn], asking=True)
                through = text if turn + 1 == len(checked) else self._text(checked[: turn + 1])[0]
                if not (through.startswith(before) and text.startswith(through)):
                    raise BadRecord(
                        f"is rendered otherwise once turn {turn + 1} is followed by more, so what is learned of it "
                        "cannot be told",
                        "use a chat template that marks it with {% generation %}",
                    )
                learned.append((len(before), self._end(text, len(before), len(through))))
        return Rendered(text, tuple(learned))

    def _end(self, text: str, start: int, stop: int) -> int:
        """The end of a turn, without the line end that templates put between a control token and the next turn."""
        turn = text[start:stop].rstrip()
        return start + len(turn) if turn.endswith(self.controls) else stop

    def _text(
        self, messages: Sequence[Mapping[str, Any]], *, asking: bool = False, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            return "", []  # many templates look at the first message
        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.source,
                add_generation_prompt=asking,
                return_assistant_tokens_mask=marked,
                date_string=_DAY,
                **self.names,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as exc:
            raise BadRecord(f"does not suit the chat template: {str(exc)[:200]}") from exc
        return texts[0], spans[0] if marked else []


def load_template(files: Mapping[str, bytes], controls: Sequence[str], what: str) -> ChatTemplate:
    """The chat template among a tokenizer's files; raises UsageError, naming `what`, if there is none that will do."""
    config = canonical.loads(files[_CONFIG_FILE], f"the {_CONFIG_FILE} of {what}") if _CONFIG_FILE in files else {}
    config = config if isinstance(config, dict) else {}
    source: Any = files[_TEMPLATE_FILE].decode("utf-8") if _TEMPLATE_FILE in files else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if not isinstance(source, str) or not source:
        raise UsageError(
            f"the tokenizer of {what} has no chat template",
            hint=f"put one beside it as {_TEMPLATE_FILE}, or take the tokenizer of a chat model",
        )
    names = {}
    for key, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(token, str):
            names[key] = token
    if "strftime_now" in source and "date_string" not in source:
        raise UsageError(
            f"the chat template of {what} writes the day it is used, so that no two days give the same dataset",
            hint=f"write a day into {_TEMPLATE_FILE} and use that",
        )
    template = ChatTemplate(source, names, tuple(controls))
    try:
        rendered = template.render([dict(message) for message in _PROBE])
    except BadRecord as exc:
        raise UsageError(f"the chat template of {what} cannot be used: a conversation {exc}", hint=exc.hint) from exc
    if not rendered.learned:
        raise UsageError(f"the chat template of {what} renders nothing that the assistant says")
    return template


def encode_chats(tokenizer: "Tokenizer", chats: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids of each conversation, and 1 for each that is learned; `tokenizer` takes control tokens for what they
    are. A token that lies across the border of a span belongs to it, as in transformers."""
    found = []
    encodings = tokenizer.encode_batch([chat.text for chat in chats], add_special_tokens=False)
    for chat, encoding in zip(chats, encodings, strict=True):
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        loss = np.zeros(len(offsets), np.uint8)
        for start, stop in chat.learned:
            loss[(offsets[:, 1] > start) & (offsets[:, 0] < stop)] = 1
        found.append((np.array(encoding.ids, np.int64), loss))
    return found


def _checked(messages: Any, controls: Sequence[str]) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise BadRecord("is not a list of messages, each with a role and content")
    for turn, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRecord(f"has a message without a role (turn {turn})")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise BadRecord(f"has a message without text as its content (turn {turn})")
        for control in controls:
            if control in (content or ""):
                raise BadRecord(f"has the control token {control!r} in the text of turn {turn}")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise BadRecord("has no turn of the assistant, so nothing of it would be learned")
    return list(messages)

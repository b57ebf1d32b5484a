"""What a task needs from a record: its roles, the fields that hold them, and the values themselves, checked.

`--field` names fields (`--field review`, `--field text=review,label=stars`); what it does not name is found by the
names that such fields usually have, in the first record of the corpus.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llmos_cli.data.corpus import Corpus, read_part
from llmos_cli.data.sources.records import BadRecord
from llmos_cli.errors import UsageError
from llmos_cli.formats.ids import ObjectId, object_id

ROLES: Final[Mapping[str, tuple[str, ...]]] = {
    "lm": ("text",),
    "mlm": ("text",),
    "classify": ("text", "label"),
    "pair": ("first", "second", "label"),
    "seq2seq": ("source", "target"),
    "chat": ("messages",),
}
TASKS: Final = tuple(ROLES)
TEXT_TASKS: Final = ("lm", "mlm")
LABELLED: Final = ("classify", "pair")
MOST_LABELS: Final = 10_000
_USUAL: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("text", "content", "review", "sentence", "body", "document"),
    "label": ("label", "labels", "class", "category", "score", "stars", "rating"),
    "first": ("first", "sentence1", "premise", "question", "query", "text1", "user"),
    "second": ("second", "sentence2", "hypothesis", "passage", "answer", "context", "text2", "item"),
    "source": ("source", "src", "input", "prompt", "article", "document"),
    "target": ("target", "tgt", "output", "completion", "summary", "response"),
    "messages": ("messages", "conversations", "conversation"),
}
_SPEAKERS: Final[Mapping[str, str]] = {"human": "user", "gpt": "assistant"}  # ShareGPT's words


@dataclass(frozen=True)
class Example:
    """A record's values for a task: texts, or the messages of a chat, and the label as text."""

    texts: tuple[str, ...]
    label: str | None = None
    messages: tuple[dict[str, Any], ...] = ()

    @property
    def text_id(self) -> ObjectId:
        """The id of what is said, whatever its label: what splits and duplicates go by."""
        if self.messages:
            return object_id(json.dumps(self.messages, sort_keys=True, default=str).encode())
        return object_id("\0".join(self.texts).encode())

    @property
    def text_bytes(self) -> int:
        texts = [message["content"] for message in self.messages] if self.messages else self.texts
        return sum(len(text.encode()) for text in texts)


def parse_fields(task: str, words: str | None) -> dict[str, str]:
    """Read `--field`: a key for the task's first role, or `ROLE=KEY,...`; raises UsageError."""
    if task not in ROLES:
        raise UsageError(f"{task!r} is no task", hint=f"the tasks are {', '.join(TASKS)}")
    if words is None:
        return {}
    roles = ROLES[task]
    fields: dict[str, str] = {}
    for word in words.split(",") if "=" in words else (words,):
        role, _, key = word.partition("=") if "=" in words else (roles[0], "=", word)
        if role not in roles or not key:
            raise UsageError(
                f"--field {words} does not say which field is the {' or the '.join(roles)} of task {task}",
                hint=f"write --field {','.join(f'{role}=KEY' for role in roles)}",
            )
        fields[role] = key
    return fields


def find_fields(corpus: Corpus, task: str, given: Mapping[str, str]) -> dict[str, str]:
    """The field of each role. Raises UsageError where one is not there, or where a task is given plain text."""
    roles = ROLES[task]
    plain = next((file for file in corpus.files if file.kind == "text"), None)
    if plain is not None and task not in TEXT_TASKS:
        raise UsageError(
            f"{plain.label} is plain text, and task {task} needs records with {', '.join(roles)}",
            hint="give it .jsonl, .csv, .tsv or .parquet files",
        )
    keys = _first_keys(corpus)
    fields = dict(given)
    for role in roles:
        if role in fields or keys is None:
            fields.setdefault(role, role)
            continue
        found = next((key for key in _USUAL[role] if key in keys and key not in fields.values()), None)
        if found is None and role == "text" and task == "classify":
            labels = {fields.get("label"), *_USUAL["label"]}
            others = [key for key in keys if key not in labels]
            found = others[0] if len(others) == 1 else None
        if found is not None:
            fields[role] = found
        elif role == "label" and task == "pair":
            continue
        elif role != "text" or task == "classify" or plain is None:
            raise UsageError(
                f"{_first_label(corpus)} has no field that looks like the {role} of task {task}: "
                f"its fields are {', '.join(keys) or 'none'}",
                hint=f"say which: --field {','.join(f'{name}=KEY' for name in roles)}",
            )
        else:
            fields[role] = role
    return fields


def pick(fields: Mapping[str, Any], task: str, keys: Mapping[str, str]) -> Example:
    """The values of a record, or BadRecord."""
    if task == "chat":
        return Example((), messages=_messages(_value(fields, keys["messages"]), keys["messages"]))
    texts = tuple(_text(fields, keys[role]) for role in ROLES[task] if role != "label")
    return Example(texts, _label(fields, keys["label"]) if "label" in keys else None)


def sort_labels(labels: set[str]) -> tuple[str, ...]:
    """Labels in the order of their numbers: as numbers where all are, else as text."""
    if all(label.isascii() and label.removeprefix("-").isdigit() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _value(fields: Mapping[str, Any], key: str) -> Any:
    value = fields.get(key)
    if key not in fields:
        raise BadRecord(
            f"has no field {key!r}", f"its fields are {', '.join(fields) or 'none'}: say which with --field"
        )
    return value


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if key not in fields:
        texts = [name for name, item in fields.items() if isinstance(item, str)]
        near = f"say which field holds the text: --field {texts[0]}" if texts else "say which with --field"
        raise BadRecord(f"has no field {key!r}", near)
    return _checked(value, f"field {key!r}")


def _checked(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"has a {what} that is not a string")
    if not value:
        raise BadRecord(f"has an empty {what}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"has half a surrogate pair in {what}") from None
    return value


def _label(fields: Mapping[str, Any], key: str) -> str:
    value = _value(fields, key)
    if isinstance(value, bool | int):
        return str(int(value)) if isinstance(value, bool) else str(value)
    if isinstance(value, str) and value:
        return _checked(value, f"field {key!r}")
    raise BadRecord(f"has a label in field {key!r} that is neither a word nor a whole number")


def _messages(value: object, key: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise BadRecord(f"has a field {key!r} that is not a list of messages")
    found = []
    for number, item in enumerate(value, 1):
        shared = "from" in item and "role" not in item
        role, content = (item.get("from"), item.get("value")) if shared else (item.get("role"), item.get("content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRecord(f"has a message {number} without a role and a content that are strings")
        _checked(content or " ", f"message {number}")
        rest = {} if shared else {name: item for name, item in item.items() if item is not None}
        found.append({**rest, "role": _SPEAKERS.get(role, role), "content": content})
    if not any(message["role"] == "assistant" for message in found):
        raise BadRecord("has no message of the assistant, so that there is nothing to learn")
    return tuple(found)


def _first_keys(corpus: Corpus) -> Sequence[str] | None:
    """The fields of the first record; None where no file has records."""
    for number, file in enumerate(corpus.files):
        if file.columns:
            return file.columns
        if file.kind == "jsonl":
            for record in read_part(file, number, file.parts[0], ()):
                if record.fields is not None:
                    return tuple(record.fields)
    return None


def _first_label(corpus: Corpus) -> str:
    return next((file.label for file in corpus.files if file.kind != "text"), "the corpus")

"""Prompts to token ids and back. Text from a user is text: it can never become a control token.

A control token is one the tokenizer marks as special, one that ends a text, or an added token that the chat template
writes. A plain prompt that spells one is encoded as ordinary characters; a chat message that spells one is refused,
because the template's own control tokens stand beside it. Nothing is ever truncated here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmos_cli.errors import LlmosError
from llmos_cli.serve.refusal import Refused


class Encoder:
    """The ways into a tokenizer, plain text, ids and chat, and the one way out. Threads may share it."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, ends: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._markup = tokenizer.backend_tokenizer
        # a tokenizer.json may carry both, and then cuts or pads every prompt without a word
        self._markup.no_truncation()
        self._markup.no_padding()
        self._markup.encode_special_tokens = False
        self.ends = frozenset(ends) | ({tokenizer.eos_token_id} - {None})
        self.controls = _control_tokens(tokenizer, self.ends)
        self._plain = _without_controls(self._markup, frozenset(self.controls.values()))
        tokens = self._markup.get_vocab(with_added_tokens=True).values()
        self.size = max(tokens, default=-1) + 1
        self._special = frozenset(self.controls.values())
        self._bytes = _letters() if "ByteLevel" in str(type(self._markup.decoder).__name__) else None

    def text(self, prompt: str) -> list[int]:
        """The ids of a plain prompt, with whatever the tokenizer puts at a text's beginning."""
        return self._known(self._plain.encode(_unicode(prompt, "prompt")).ids, "prompt")

    def ids(self, prompt: Sequence[int]) -> list[int]:
        """Ids that the user gave, checked against the model's vocabulary."""
        self.check_tokens(prompt, "prompt")
        return self._known(prompt, "prompt")

    def check_tokens(self, tokens: Iterable[int], field: str) -> None:
        """Raise Refused unless all are tokens of the model."""
        last = min(self._vocabulary, self.size) - 1
        for index, token in enumerate(tokens):
            if not 0 <= token <= last:
                raise Refused(f"{field}[{index}] is {token}, but the model's tokens are 0 to {last}", field=field)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation in the model's own chat template, ready for the assistant's answer."""
        import jinja2

        if not self._tokenizer.chat_template:
            raise Refused(
                "this model has no chat template, so it cannot take messages; send a prompt to /v1/completions",
                field="messages",
                reason="no_chat_template",
            )
        for index, message in enumerate(messages):
            self._refuse_controls(message["content"], f"messages[{index}].content")
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, ValueError) as exc:
            raise Refused(
                f"the model's chat template refuses these messages: {str(exc)[:200]}", field="messages"
            ) from exc
        return self._known(self._markup.encode(rendered, add_special_tokens=False).ids, "messages")

    def decode(self, ids: list[int]) -> str:
        """The text of tokens; special tokens have none."""
        text: str = self._markup.decode(ids, skip_special_tokens=True)
        return text

    def token(self, token: int) -> tuple[str, bytes]:
        """A token by itself: its text, with replacement characters where it is part of one, and its bytes."""
        name = self._markup.id_to_token(token)
        if name is None:
            return "", b""
        if token in self._special or self._bytes is None or not all(letter in self._bytes for letter in name):
            text = name if token in self._special else self.decode([token])
            return text, text.encode("utf-8")
        data = bytes(self._bytes[letter] for letter in name)
        return data.decode("utf-8", errors="replace"), data

    def _refuse_controls(self, content: str, field: str) -> None:
        found = set(self._markup.encode(_unicode(content, field), add_special_tokens=False).ids)
        named = sorted(text for text, token in self.controls.items() if token in found or text in content)
        if named:
            raise Refused(f"{field} contains the control token {named[0]!r}", field=field, reason="control_token")

    def _known(self, ids: Sequence[int], field: str) -> list[int]:
        if not ids:
            raise Refused(f"{field} is empty: it has no tokens", field=field)
        if max(ids) >= self._vocabulary:
            raise LlmosError(
                f"the tokenizer gives token {max(ids)}, but the model knows only {self._vocabulary}: "
                "they do not belong together"
            )
        return list(ids)


def _unicode(text: str, field: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(f"{field} is not valid Unicode: it has half of a surrogate pair", field=field) from None
    return text


def _control_tokens(tokenizer: Any, ends: frozenset[int]) -> dict[str, int]:
    templates = tokenizer.chat_template or ""
    written = "".join(templates.values()) if isinstance(templates, dict) else templates
    specials = set(tokenizer.all_special_ids)
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
        or index in specials
        or index in ends
        or (token.content in written and not token.content.isspace())
    }


def _without_controls(backend: Any, controls: frozenset[int]) -> Any:
    """A copy of the tokenizer that reads the text of a control token as ordinary characters."""
    table = json.loads(backend.to_str())
    for token in table.get("added_tokens", []):
        token["special"] = token["special"] or token["id"] in controls
    plain = type(backend).from_str(json.dumps(table))
    plain.encode_special_tokens = True
    return plain


def _letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers name bytes (GPT-2's table), and the bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(rest)}

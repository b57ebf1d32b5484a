"""A tokenizer.json in the words of GGUF: tokens, their kinds, merges, and which rule splits text before them.

GGUF names the splitting rule (`tokenizer.ggml.pre`) instead of holding it, so only rules with a name there can be
written; another tokenizer is refused rather than given a rule that is not its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from llmos_cli.errors import Damaged, LlmosError

NORMAL: Final = 1
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5
BYTE: Final = 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>\Z")
# The patterns of tokenizer.json by the names that llama.cpp (src/llama-vocab.cpp) has for them.
_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_PRE: Final = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
_SPECIAL: Final = {"bos_token": "bos", "eos_token": "eos", "pad_token": "pad", "unk_token": "unk"}


@dataclass(frozen=True)
class Vocabulary:
    """`model` "gpt2" (bytes as letters, merges) or "llama" (SentencePiece with scores); `pre` names the splitting rule.
    `special` are ids by role (bos, eos, pad, unk)."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float] | None
    special: Mapping[str, int]
    add_bos: bool
    template: str | None
    space_prefix: bool = field(default=False)


def read_vocabulary(table: Any, config: Mapping[str, Any], template: str | None, size: int) -> Vocabulary:
    """From tokenizer.json, tokenizer_config.json and the chat template; `size` is how many tokens the model knows.

    Raises LlmosError for a tokenizer that GGUF has no words for, Damaged for one that makes no sense.
    """
    try:
        return _read(table, config, template, size)
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise Damaged(f"tokenizer.json does not have the form of a tokenizer: {exc!r:.100}") from exc


def _read(table: Any, config: Mapping[str, Any], template: str | None, size: int) -> Vocabulary:
    model = table["model"]
    if model["type"] != "BPE":
        raise LlmosError(f"GGUF export knows BPE tokenizers, not {model['type']}", hint="export with --format hf")
    ids: dict[str, int] = dict(model["vocab"])
    added = {entry["content"]: entry for entry in table.get("added_tokens") or []}
    ids |= {content: entry["id"] for content, entry in added.items()}
    if not ids or max(ids.values()) >= size:
        raise Damaged(f"the tokenizer has the id {max(ids.values(), default=0)}, the model {size} tokens")
    sentencepiece = bool(model.get("byte_fallback"))
    tokens = [f"[UNUSED{number}]" for number in range(size)]
    kinds = [UNUSED] * size
    for content, number in ids.items():
        tokens[number] = content
        kinds[number] = _kind(content, added, sentencepiece=sentencepiece)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(
        "llama" if sentencepiece else "gpt2",
        "default" if sentencepiece else _splitting(table),
        tokens,
        kinds,
        [] if sentencepiece else merges,
        _scores(merges, tokens) if sentencepiece else None,
        {role: ids[word] for key, role in _SPECIAL.items() if (word := _content(config.get(key))) in ids},
        bool(config.get("add_bos_token", False)) or _starts_with_bos(table, _content(config.get("bos_token"))),
        template,
        sentencepiece and "prepend" in str(table.get("normalizer") or table.get("pre_tokenizer")).lower(),
    )


def _kind(content: str, added: Mapping[str, Any], *, sentencepiece: bool) -> int:
    if content in added:
        return CONTROL if added[content].get("special") else USER_DEFINED
    return BYTE if sentencepiece and _BYTE_TOKEN.match(content) else NORMAL


def _scores(merges: list[str], tokens: list[str]) -> list[float]:
    """SentencePiece prefers pairs of higher score: those that were merged first."""
    rank = {merge.replace(" ", ""): float(-number) for number, merge in reversed(list(enumerate(merges)))}
    return [rank.get(token, -1e6 if len(token) > 1 else 0.0) for token in tokens]


def _splitting(table: Any) -> str:
    """The name of the rule by which a byte-level tokenizer splits text."""
    step = table.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    kinds = [part.get("type") for part in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and steps[0].get("behavior", "").lower() == "isolated":
        name = _PRE.get(str((steps[0].get("pattern") or {}).get("Regex")))
        if name:
            return name
    raise LlmosError(
        "GGUF has no name for the rule by which this tokenizer splits text, as it has for GPT-2, Llama 3 and Qwen 2",
        hint="export with --format hf",
    )


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _starts_with_bos(table: Any, bos: str | None) -> bool:
    """Whether the post-processor puts the token of the beginning in front of every text."""
    post = table.get("post_processor") or {}
    steps = post.get("processors", [post]) if post.get("type") == "Sequence" else [post]
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            first = (step.get("single") or [{}])[0].get("SpecialToken")
            if first and first.get("id") == bos and bos is not None:
                return True
    return False

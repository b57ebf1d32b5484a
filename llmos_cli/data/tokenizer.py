"""Tokenizers for sharding: trained on the corpus, or taken from the store or a Hugging Face folder, as files.

What is trained is a byte-level BPE: any text comes back exactly, there is no unknown token; or a WordPiece as BERT has
it, for masked words. The same texts give the same bytes on any machine. What is taken is kept byte for byte. Needs the
`tokenizers` library only, never torch.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from llmos_cli.data.corpus import CUT_BEFORE, PIECE_CHARS
from llmos_cli.data.tasks.chat import CHATML, CHATML_TOKENS
from llmos_cli.errors import Damaged, NotFound, UsageError, from_os_error
from llmos_cli.formats import canonical
from llmos_cli.formats.limits import KiB, MiB
from llmos_cli.progress import Progress, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE: Final = "tokenizer.json"
CONFIG_FILE: Final = "tokenizer_config.json"
MAP_FILE: Final = "special_tokens_map.json"
FILES: Final = (TOKENIZER_FILE, CONFIG_FILE, MAP_FILE, "chat_template.jinja")
END_OF_TEXT: Final = "<|endoftext|>"
BERT_TOKENS: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
Method = Literal["bpe", "wordpiece"]
MIN_VOCAB: Final = 257  # every byte, and the end of a text
MAX_VOCAB: Final = 1_000_000
_SAMPLE_PER_TOKEN: Final = 4 * KiB  # more text hardly changes the merges, but takes its time
_SAMPLE_BYTES: Final = 64 * MiB
_UNCUT_CHARS: Final = 4 * MiB
_BEAT_SECONDS: Final = 0.1


@dataclass(frozen=True)
class Encoding:
    """A tokenizer ready to encode text; `vocab_size` counts ids up to the largest, used or not.

    `piece_chars` is how much of a document it should get at once: little, unless it marks where a text begins (as
    SentencePiece does), so that every cut would leave a mark.
    """

    tokenizer: "Tokenizer"
    eos_id: int
    vocab_size: int
    piece_chars: int
    pad_id: int | None = None
    mask_id: int | None = None
    begin_id: int | None = None  # before a text that is to be filled in: [CLS]
    special: tuple[str, ...] = ()  # what only templates may write


def train_tokenizer(
    texts: Iterator[str],
    total: int,
    vocab_size: int,
    progress: Progress,
    *,
    method: Method = "bpe",
    chat: bool = False,
) -> dict[str, bytes]:
    """A tokenizer for `texts` of about `total` bytes, as the files of a Hugging Face tokenizer.

    Of much text, evenly spaced pieces are used. Little may give a smaller vocabulary. With `chat` it has a template
    (ChatML), and a chat's turns end in a token of their own.
    """
    with progress.task("training the tokenizer", total=total) as task:
        sample: Iterable[str] = _sample(texts, total, min(_SAMPLE_BYTES, vocab_size * _SAMPLE_PER_TOKEN), task)
        if method == "wordpiece":
            sample = list(sample)
            tokenizer, trainer, config = _wordpiece(vocab_size, sample)
        else:
            tokenizer, trainer, config = _bpe(vocab_size, chat=chat)
        _wait_for(lambda: tokenizer.train_from_iterator(sample, trainer), beat=lambda: task.advance(0))
    if method == "wordpiece":
        tokenizer = _framed(tokenizer)
    return {TOKENIZER_FILE: tokenizer.to_str().encode(), CONFIG_FILE: canonical.encode(config)}


def _bpe(vocab_size: int, *, chat: bool) -> tuple["Tokenizer", Any, canonical.Json]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *(CHATML_TOKENS if chat else ())],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    config: dict[str, canonical.Json] = {
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": CHATML_TOKENS[1] if chat else END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return tokenizer, trainer, config | ({"chat_template": CHATML} if chat else {})


def _wordpiece(vocab_size: int, texts: list[str]) -> tuple["Tokenizer", Any, canonical.Json]:
    """Lower case, without accents, Chinese characters one by one: as BERT's own.

    The trainer numbers characters in whatever order it meets them, another one each time, and breaks ties by number.
    Those it knows as special tokens have their numbers, so all are given to it as such.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    pad, unknown, start, end, mask = BERT_TOKENS
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    first: set[str] = set()
    inner: set[str] = set()
    for text in texts:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            first.update(word)
            inner.update(word[1:])
    alphabet = [*sorted(first), *(f"##{char}" for char in sorted(inner))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*BERT_TOKENS, *alphabet], show_progress=False
    )
    config: canonical.Json = {
        "clean_up_tokenization_spaces": False,
        "cls_token": start,
        "do_lower_case": True,
        "mask_token": mask,
        "pad_token": pad,
        "sep_token": end,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
    }
    return tokenizer, trainer, config


def _framed(trained: "Tokenizer") -> "Tokenizer":
    """The same vocabulary, with none but BERT's own tokens as special ones, and what they put around a text."""
    from tokenizers import Tokenizer, models, processors

    _, unknown, start, end, _ = BERT_TOKENS
    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(with_added_tokens=True), unk_token=unknown))
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    tokenizer.decoder = trained.decoder
    tokenizer.add_special_tokens(list(BERT_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
    )
    return tokenizer


def read_folder(folder: Path) -> dict[str, bytes]:
    """The tokenizer files of a Hugging Face folder; raises NotFound without a tokenizer.json."""
    files = {}
    for name in FILES:
        path = folder / name
        if path.is_file():
            try:
                files[name] = path.read_bytes()
            except OSError as exc:
                raise from_os_error(exc, f"reading {path}") from exc
    if TOKENIZER_FILE not in files:
        raise NotFound(f"there is no {TOKENIZER_FILE} in {folder}", hint="train one instead: --tokenizer train:4096")
    return files


def make_encoding(files: Mapping[str, bytes], what: str) -> Encoding:
    """Load a tokenizer for training text: nothing is cut, padded or dropped at random, and the text's own words are
    never taken for the end of a document. Raises Damaged or UsageError, naming `what`.
    """
    from tokenizers import Tokenizer

    eos = _end_of_text(files, what)
    table = canonical.loads(files[TOKENIZER_FILE], f"the {TOKENIZER_FILE} of {what}")
    try:
        tokenizer = Tokenizer.from_str(json.dumps(_for_training(table, eos)))
    except Exception as exc:
        raise Damaged(f"the {TOKENIZER_FILE} of {what} cannot be used: {str(exc)[:200]}") from exc
    eos_id = tokenizer.token_to_id(eos)
    if eos_id is None:
        raise UsageError(f"the tokenizer of {what} has no token {eos!r}, which it names as its end of text")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    named = _named_tokens(files, what)
    ids = {role: tokenizer.token_to_id(text) for role, text in named.items()}
    return Encoding(
        tokenizer,
        eos_id,
        vocab_size,
        PIECE_CHARS if _joins(tokenizer) else _UNCUT_CHARS,
        pad_id=ids.get("pad_token"),
        mask_id=ids.get("mask_token"),
        begin_id=ids.get("cls_token"),
        special=tuple(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special),
    )


def _joins(tokenizer: "Tokenizer") -> bool:
    """Whether texts that are cut before CUT_BEFORE give the tokens of the whole."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return all(ids("a1") + ids(mark + "b") == ids("a1" + mark + "b") for mark in CUT_BEFORE)


def _for_training(table: Any, eos: str) -> Any:
    """A tokenizer.json whose end of text counts as special (so that text never yields it), without dropout."""
    if isinstance(table, dict):
        for added in table.get("added_tokens") or []:
            if isinstance(added, dict) and added.get("content") == eos:
                added["special"] = True
        if isinstance(table.get("model"), dict) and table["model"].get("dropout"):
            table["model"]["dropout"] = None
    return table


def _end_of_text(files: Mapping[str, bytes], what: str) -> str:
    """The token that ends a text: `eos_token`, or where there is none, as with BERT, `sep_token`."""
    named = _named_tokens(files, what)
    for role in ("eos_token", "sep_token"):
        if role in named:
            return named[role]
    raise UsageError(
        f"the tokenizer of {what} does not say which token ends a text",
        hint=f'add "eos_token" to its {CONFIG_FILE}',
    )


def _named_tokens(files: Mapping[str, bytes], what: str) -> dict[str, str]:
    """The tokens that have a role, by its name ("eos_token")."""
    named: dict[str, str] = {}
    for name in (CONFIG_FILE, MAP_FILE):
        table = canonical.loads(files[name], f"the {name} of {what}") if name in files else None
        for role, token in table.items() if isinstance(table, dict) else ():
            text = token.get("content") if isinstance(token, dict) else token
            if role.endswith("_token") and isinstance(text, str) and text:
                named.setdefault(role, text)
    return named


def _wait_for(work: Callable[[], None], beat: Callable[[], None]) -> None:
    """Run `work` in a thread and wait for it, with a `beat` ten times a second: native code that computes for minutes
    sees no Ctrl-C, this does. Then the thread is left behind; it only reads."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as exc:  # noqa: BLE001 - it is raised again where the work is waited for
            failed.append(exc)

    thread = threading.Thread(target=run, name="llmos-tokenizer", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_BEAT_SECONDS)
        beat()
    if failed:
        raise failed[0]


def _sample(texts: Iterator[str], total: int, limit: int, task: Task) -> Iterator[str]:
    """All text, or pieces at even distances that sum to about `limit` bytes."""
    seen = taken = 0
    for text in texts:
        size = len(text.encode("utf-8"))
        task.advance(size)
        if total <= limit or taken * total <= limit * seen:
            taken += size
            yield text
        seen += size
    task.note("finding merges")

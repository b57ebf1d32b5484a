"""Tokenizers for sharding: trained on the corpus, or taken from the store or a Hugging Face folder, as files.

What is trained is a byte-level BPE: any text comes back exactly, there is no unknown token. The same texts give the
same bytes on any machine. What is taken is kept byte for byte. Needs the `tokenizers` library only, never torch.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmos_cli.data.corpus import CUT_BEFORE, PIECE_CHARS, Corpus, read_pieces
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


def train_tokenizer(corpus: Corpus, vocab_size: int, progress: Progress) -> dict[str, bytes]:
    """A byte-level BPE for `corpus`, as the files of a Hugging Face tokenizer.

    Of a large corpus, evenly spaced pieces are used. A small one may give a smaller vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with progress.task("training the tokenizer", total=corpus.size) as task:
        limit = min(_SAMPLE_BYTES, vocab_size * _SAMPLE_PER_TOKEN)
        _wait_for(
            lambda: tokenizer.train_from_iterator(_sample(corpus, limit, task), trainer), beat=lambda: task.advance(0)
        )
    config: canonical.Json = {
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {TOKENIZER_FILE: tokenizer.to_str().encode(), CONFIG_FILE: canonical.encode(config)}


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
    return Encoding(tokenizer, eos_id, vocab_size, PIECE_CHARS if _joins(tokenizer) else _UNCUT_CHARS)


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
    for name in (CONFIG_FILE, MAP_FILE):
        table = canonical.loads(files[name], f"the {name} of {what}") if name in files else None
        token = table.get("eos_token") if isinstance(table, dict) else None
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text:
            return text
    raise UsageError(
        f"the tokenizer of {what} does not say which token ends a text",
        hint=f'add "eos_token" to its {CONFIG_FILE}',
    )


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


def _sample(corpus: Corpus, limit: int, task: Task) -> Iterator[str]:
    """All text, or pieces at even distances that sum to about `limit` bytes."""
    total, seen, taken = corpus.size, 0, 0
    for piece in read_pieces(corpus):
        text, size = piece.text, len(piece.text.encode("utf-8"))
        task.advance(size)
        if total <= limit or taken * total <= limit * seen:
            taken += size
            yield text
        seen += size
    task.note("finding merges")

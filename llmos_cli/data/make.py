"""`make_dataset`: text in, a dataset in the store out; the one place where corpus, tokenizer, shards and store meet.

The recipe names the digest of every file read, the tokenizer and the parameters. What was made by the same recipe
before is not made again: the ref is pointed to it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import BinaryIO, Final

from llmos_cli import __version__
from llmos_cli.data import tokenizer as tokenizers
from llmos_cli.data.corpus import Corpus, plan_corpus, read_pieces
from llmos_cli.data.encode import encode_pieces
from llmos_cli.data.inputs import STDIN, Input, find_inputs
from llmos_cli.data.layout import LAYOUT, dtype_name, token_dtype
from llmos_cli.data.shards import Shape, write_shards
from llmos_cli.errors import LlmosError, NotFound, UsageError, from_os_error
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.manifest import FileEntry, Manifest, Recipe, Source
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Progress
from llmos_cli.store.disk.durable import TEMP_PREFIX
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.recipes import find_made
from llmos_cli.store.refs.resolve import resolve
from llmos_cli.store.transaction import Transaction, begin

DEFAULT_FIELD: Final = "text"
TOKENIZER_FOLDER: Final = "tokenizer/"
MAX_SEQ_LEN: Final = 1 << 20
MAX_SHARD_SIZE: Final = 4 << 30
_TRAIN: Final = "train:"
_SHOWN_LINES: Final = 20


@dataclass(frozen=True)
class Request:
    """What to make. `field` None means "text", and that standard input is plain text rather than JSON lines."""

    inputs: Sequence[str]
    tokenizer: str
    seq_len: int
    shard_size: int
    field: str | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class Made:
    """The dataset and what it cost; `cached` says that it had been made before."""

    id: ObjectId
    ref: RefName | None
    manifest: Manifest
    stored: int
    cached: bool


@dataclass(frozen=True)
class _Tokenizer:
    """Where a tokenizer comes from: to be trained to `vocab_size`, or `files`, which are `entries` in the store."""

    params: str
    vocab_size: int = 0
    files: Mapping[str, bytes] | None = None
    entries: tuple[FileEntry, ...] = ()
    inputs: Mapping[str, ObjectId] | None = None
    sources: tuple[Source, ...] = ()


def make_dataset(
    store: Store, ref: RefName | None, request: Request, *, progress: Progress, stdin: BinaryIO | None = None
) -> Made:
    """Shard text into a dataset and point `ref` to it.

    Raises UsageError (a bad request, or files that are not text), NotFound, AccessDenied, Unsafe, Conflict if the ref
    moved meanwhile, or LlmosError if a file changed while it was read; then nothing is visible of it.
    """
    _check(request)
    chosen = _choose_tokenizer(store, request.tokenizer)
    with (
        begin(store, purpose="shard", ref=ref) as tx,
        _spool_for(request, stdin, store.tmp) as spool,
    ):
        inputs = find_inputs(request.inputs, progress, spool)
        field = request.field or DEFAULT_FIELD
        corpus = plan_corpus(inputs, field=field, skip_bad=request.skip_bad, progress=progress)
        recipe = _recipe(request, corpus, chosen)
        known = find_made(store, recipe)
        if known is not None:
            manifest = read_manifest(store, known)
        else:
            manifest = _make(tx, request, corpus, chosen, recipe=recipe, progress=progress)
        commit = tx.commit(manifest, message=f"shard: {len(corpus.files)} files")
        return Made(commit.id, commit.ref, manifest, commit.stored, known is not None)


def _make(
    tx: Transaction, request: Request, corpus: Corpus, chosen: _Tokenizer, *, recipe: Recipe, progress: Progress
) -> Manifest:
    files = chosen.files or tokenizers.train_tokenizer(corpus, chosen.vocab_size, progress)
    encoding = tokenizers.make_encoding(files, f"tokenizer {request.tokenizer}")
    dtype = token_dtype(encoding.vocab_size)
    bad_lines = 0

    def left_out(line: str) -> None:
        nonlocal bad_lines
        bad_lines += 1
        if bad_lines <= _SHOWN_LINES:
            progress.warn(f"left out: {line}")

    with progress.task("tokenizing", total=corpus.size) as task:
        pieces = read_pieces(corpus, left_out, piece_chars=encoding.piece_chars)
        stream = encode_pieces(pieces, encoding, dtype)
        shape = Shape("lm", request.seq_len, request.shard_size, dtype, encoding.eos_id)
        shards = write_shards(tx, stream, shape, task=task)
    if bad_lines > _SHOWN_LINES:
        progress.warn(f"left out: {bad_lines - _SHOWN_LINES} more lines")
    if not shards.documents:
        raise UsageError("no document is left: every line was left out", hint="run again without --skip-bad to see why")
    entries = chosen.entries or tuple(tx.add_bytes(TOKENIZER_FOLDER + name, data) for name, data in files.items())
    meta: dict[str, Json] = {
        "task": "lm",
        **shards.facts(shape),
        "seq_len": request.seq_len,
        "dtype": dtype_name(dtype),
        "vocab_size": encoding.vocab_size,
        "eos_token_id": encoding.eos_id,
        "text_bytes": shards.text_bytes,
        "bytes_per_token": round(shards.text_bytes / shards.tokens, 4),
    }
    if corpus.skipped or bad_lines:
        meta |= {"skipped": corpus.skipped, "skipped_lines": bad_lines}
    return Manifest("dataset", shards.files + entries, meta, recipe)


def _check(request: Request) -> None:
    if not 2 <= request.seq_len <= MAX_SEQ_LEN:
        raise UsageError(f"--seq-len must be 2 to {MAX_SEQ_LEN}, not {request.seq_len}")
    if not 1 <= request.shard_size <= MAX_SHARD_SIZE:
        raise UsageError(f"--shard-size must be 1 byte to 4 GiB, not {request.shard_size}")


def _recipe(request: Request, corpus: Corpus, chosen: _Tokenizer) -> Recipe:
    return Recipe(
        "shard",
        params={
            "tokenizer": chosen.params,
            "seq_len": request.seq_len,
            "shard_size": request.shard_size,
            "field": corpus.field,
            "skip_bad": request.skip_bad,
            "layout": LAYOUT,
        },
        inputs=chosen.inputs or {},
        sources=(*(file.source for file in corpus.files), *chosen.sources),
        tools={"llmos": __version__, "tokenizers": version("tokenizers")},
    )


def _choose_tokenizer(store: Store, text: str) -> _Tokenizer:
    """Read `train:VOCAB`, a ref or a folder; what contains a slash is a folder, and a ref comes before a folder."""
    if text.startswith(_TRAIN):
        return _Tokenizer(text, vocab_size=_vocab_size(text))
    if "/" not in text and text not in (".", ".."):
        try:
            return _from_store(store, text)
        except (NotFound, UsageError):
            if not Path(text).is_dir():
                raise
    folder = Path(text)
    if not folder.is_dir():
        raise NotFound(
            f"there is no folder {text}", hint="--tokenizer takes train:4096, a ref or a Hugging Face folder"
        )
    files = tokenizers.read_folder(folder)
    sources = tuple(Source(TOKENIZER_FOLDER + name, len(data), object_id(data)) for name, data in sorted(files.items()))
    return _Tokenizer("folder", files=files, sources=sources)


def _vocab_size(text: str) -> int:
    digits = text.removeprefix(_TRAIN)
    low, high = tokenizers.MIN_VOCAB, tokenizers.MAX_VOCAB
    if not (digits.isascii() and digits.isdigit() and len(digits) < 9 and low <= int(digits) <= high):
        raise UsageError(f"{text!r} names no vocabulary of {low} to {high} tokens", hint="try --tokenizer train:4096")
    return int(digits)


def _from_store(store: Store, text: str) -> _Tokenizer:
    found = resolve(store, text)
    manifest = read_manifest(store, found.id)
    for folder in ("", TOKENIZER_FOLDER):
        held = {name: entry for name in tokenizers.FILES if (entry := manifest.file(folder + name))}
        if tokenizers.TOKENIZER_FILE in held:
            files = {name: read_file(store, entry) for name, entry in held.items()}
            entries = tuple(replace(entry, path=TOKENIZER_FOLDER + name) for name, entry in held.items())
            return _Tokenizer("ref", files=files, entries=entries, inputs={"tokenizer": found.id})
    raise LlmosError(f"{found.label} holds no {tokenizers.TOKENIZER_FILE}", hint="llmos show lists what it holds")


def _spool_for(request: Request, stdin: BinaryIO | None, folder: Path) -> AbstractContextManager[Input | None]:
    if STDIN not in request.inputs:
        return nullcontext(None)
    if stdin is None:
        raise UsageError("there is no standard input to read")
    return _spooled(stdin, folder, "stdin" if request.field is None else "stdin.jsonl")


@contextmanager
def _spooled(stdin: BinaryIO, folder: Path, name: str) -> Iterator[Input]:
    """Standard input as a file, because it is read more than once; what a kill leaves of it, gc sweeps."""
    with NamedTemporaryFile(dir=folder, prefix=TEMP_PREFIX) as file:
        try:
            while block := stdin.read(1 << 20):
                file.write(block)
            file.flush()
        except OSError as exc:
            raise from_os_error(exc, f"keeping standard input in {folder}") from exc
        yield Input(Path(file.name), name, "standard input")

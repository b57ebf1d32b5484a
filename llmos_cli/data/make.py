"""`make_dataset`: text in, a dataset in the store out; the one place where corpus, tokenizer, shards and store meet.

The recipe names the digest of every file read, the tokenizer and the parameters. What was made by the same recipe
before is not made again: the ref is pointed to it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import BinaryIO, Final

from llmos_cli import __version__
from llmos_cli.data import tokenizer as tokenizers
from llmos_cli.data.corpus import PIECE_CHARS, Corpus, plan_corpus
from llmos_cli.data.dedup import Dedup
from llmos_cli.data.encode import Encoded
from llmos_cli.data.inputs import STDIN, Input, find_inputs
from llmos_cli.data.layout import LAYOUT, SPLITS, dtype_name, token_dtype
from llmos_cli.data.on_ray import keep_slices
from llmos_cli.data.shards import Shape, Shards, write_shards
from llmos_cli.data.slices import VERSION, Job, LeftOut, drop_kept, encode_kept
from llmos_cli.data.survey import Survey, read_texts, take_survey
from llmos_cli.data.tasks.fields import LABELLED, TEXT_TASKS, find_fields, parse_fields
from llmos_cli.errors import LlmosError, NotFound, UsageError, from_os_error
from llmos_cli.formats import canonical
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

TOKENIZER_FOLDER: Final = "tokenizer/"
REPORT_FOLDER: Final = "report/"
MAX_SEQ_LEN: Final = 1 << 20
MAX_SHARD_SIZE: Final = 4 << 30
DEDUPS: Final[tuple[Dedup, ...]] = ("exact", "near")
_TRAIN: Final = "train:"
_METHODS: Final[Mapping[str, tokenizers.Method]] = {"bpe": "bpe", "wordpiece": "wordpiece"}
_SHOWN: Final = 20
_REPORTED: Final = 10_000


@dataclass(frozen=True)
class Request:
    """What to make. `field` names the fields of records (fields.py tells how); with it, standard input is JSON lines.
    `splits` are the shares of valid and test; `labels_from` is a ref whose labels are to be used. `place` is a cluster
    that is to do the work; it decides nothing.
    """

    inputs: Sequence[str]
    tokenizer: str
    seq_len: int
    shard_size: int
    field: str | None = None
    skip_bad: bool = False
    task: str = "lm"
    splits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dedup: Dedup | None = None
    labels_from: str | None = None
    place: str | None = None


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
    method: tokenizers.Method | None = None
    files: Mapping[str, bytes] | None = None
    entries: tuple[FileEntry, ...] = ()
    inputs: Mapping[str, ObjectId] | None = None
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class _Labels:
    """Labels that were given before, and whose they are."""

    words: tuple[str, ...] = ()
    owner: str = "the training set"
    inputs: Mapping[str, ObjectId] = dataclasses.field(default_factory=dict)


def parse_splits(text: str | None) -> dict[str, float]:
    """Read `valid=0.01,test=0.01`; raises UsageError."""
    shares: dict[str, float] = {}
    for word in text.split(",") if text else ():
        name, _, number = word.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if name not in SPLITS or name == "train" or name in shares or not 0.0 < share < 1.0:
            raise UsageError(f"--split {text} is not understood", hint="write --split valid=0.01,test=0.01")
        shares[name] = share
    if sum(shares.values()) >= 1.0:
        raise UsageError(f"--split {text} leaves nothing to train on", hint="write --split valid=0.01,test=0.01")
    return shares


def read_dedup(text: str | None) -> Dedup | None:
    """Read `--dedup`; raises UsageError."""
    found = next((kind for kind in DEDUPS if kind == text), None)
    if text is not None and found is None:
        raise UsageError(f"--dedup takes exact or near, not {text}")
    return found


def make_dataset(
    store: Store, ref: RefName | None, request: Request, *, progress: Progress, stdin: BinaryIO | None = None
) -> Made:
    """Shard text into a dataset and point `ref` to it.

    Raises UsageError (a bad request, or files that are not what they should be), NotFound, AccessDenied, Unsafe,
    Conflict if the ref moved meanwhile, or LlmosError if a file changed while it was read; then nothing is visible of
    it, but what was encoded is kept for the next try.
    """
    _check(request)
    given = parse_fields(request.task, request.field)
    chosen = _choose_tokenizer(store, request.tokenizer)
    if chosen.method is None and chosen.vocab_size:
        chosen = replace(chosen, method="wordpiece" if request.task == "mlm" else "bpe")
    labels = _labels_from(store, request)
    with (
        begin(store, purpose="shard", ref=ref) as tx,
        _spool_for(request, stdin, store.tmp) as spool,
    ):
        inputs = find_inputs(request.inputs, progress, spool)
        corpus = plan_corpus(inputs, skip_bad=request.skip_bad, progress=progress)
        keys = find_fields(corpus, request.task, given)
        recipe = _recipe(request, corpus, keys, chosen, labels)
        known = find_made(store, recipe)
        if known is not None:
            manifest, job = read_manifest(store, known), None
        else:
            job, survey = _plan_job(request, corpus, keys, chosen, labels, progress)
            manifest = _make(tx, request, job, survey, chosen, recipe=recipe, progress=progress)
        commit = tx.commit(manifest, message=f"shard: {len(corpus.files)} files")
    if job is not None:
        drop_kept(store, job)
    return Made(commit.id, commit.ref, manifest, commit.stored, known is not None)


def _plan_job(
    request: Request,
    corpus: Corpus,
    keys: Mapping[str, str],
    chosen: _Tokenizer,
    labels: _Labels,
    progress: Progress,
) -> tuple[Job, Survey]:
    """All that decides the tokens: labels, duplicates and the tokenizer, trained if need be."""
    task = request.task
    survey = take_survey(corpus, task, keys, request.dedup, progress, known_labels=labels.words)
    files = chosen.files
    if files is None:
        texts = read_texts(corpus, task, keys, survey.dropped, PIECE_CHARS)
        files = tokenizers.train_tokenizer(
            texts, corpus.size, chosen.vocab_size, progress, method=chosen.method or "bpe", chat=task == "chat"
        )
    job = Job(
        corpus,
        task,
        keys,
        files,
        request.tokenizer,
        dict(request.splits),
        survey.labels,
        labels.owner,
        frozenset(survey.dropped),
    )
    if task == "mlm" and job.encoding.mask_id is None:
        raise UsageError(
            f"the tokenizer {request.tokenizer} has no mask token, which task mlm needs",
            hint="take one of a BERT model, or train one: --tokenizer train:wordpiece:8192",
        )
    return job, survey


def _make(
    tx: Transaction,
    request: Request,
    job: Job,
    survey: Survey,
    chosen: _Tokenizer,
    *,
    recipe: Recipe,
    progress: Progress,
) -> Manifest:
    encoding = job.encoding
    dtype = token_dtype(encoding.vocab_size)
    pad_id = encoding.eos_id if encoding.pad_id is None else encoding.pad_id
    shape = Shape(request.task, request.seq_len, request.shard_size, dtype, pad_id)
    left: list[LeftOut] = []
    with progress.task("tokenizing", total=job.corpus.size) as task:
        shards = write_shards(tx, _runs(tx.store, job, left, request.place), shape, task=task)
    _say_left_out(left, progress)
    if not shards.documents:
        raise UsageError(
            "no document is left: every record was left out" if left else "there are no documents in the files",
            hint="run again without --skip-bad to see why" if left else None,
        )
    entries = chosen.entries or tuple(
        tx.add_bytes(TOKENIZER_FOLDER + name, data) for name, data in job.tokenizer.items()
    )
    entries += _reports(tx, left, survey)
    return Manifest("dataset", shards.files + entries, _facts(request, job, survey, shards, shape, left), recipe)


def _runs(store: Store, job: Job, left: list[LeftOut], place: str | None) -> Iterator[Encoded]:
    """The runs of all slices in order; what is left out is put aside."""
    for number in keep_slices(store, job, place) if place else range(len(job.slices)):
        for run in encode_kept(store, job, number):
            if isinstance(run, LeftOut):
                left.append(run)
            else:
                yield run


def _say_left_out(left: Sequence[LeftOut], progress: Progress) -> None:
    for item in left[:_SHOWN]:
        progress.warn(f"left out: {item.why}")
    if len(left) > _SHOWN:
        progress.warn(f"left out: {len(left) - _SHOWN} more records, told in {REPORT_FOLDER}left-out.jsonl")


def _reports(tx: Transaction, left: Sequence[LeftOut], survey: Survey) -> tuple[FileEntry, ...]:
    """What was left out, and which documents were removed as duplicates, as files of the dataset."""
    tables = {
        "left-out.jsonl": [item.as_json() for item in left[:_REPORTED]],
        "duplicates.jsonl": survey.examples,
    }
    return tuple(
        tx.add_bytes(REPORT_FOLDER + name, b"".join(canonical.encode(line) + b"\n" for line in lines))
        for name, lines in tables.items()
        if lines
    )


def _facts(
    request: Request, job: Job, survey: Survey, shards: Shards, shape: Shape, left: Sequence[LeftOut]
) -> dict[str, Json]:
    encoding = job.encoding
    facts: dict[str, Json] = {
        "task": request.task,
        **shards.facts(shape),
        "seq_len": request.seq_len,
        "dtype": dtype_name(shape.dtype),
        "vocab_size": encoding.vocab_size,
        "eos_token_id": encoding.eos_id,
        "text_bytes": shards.text_bytes,
        "bytes_per_token": round(shards.text_bytes / shards.tokens, 4),
    }
    if encoding.pad_id is not None:
        facts["pad_token_id"] = encoding.pad_id
    if request.task == "mlm":
        facts["mask_token_id"] = encoding.mask_id
    if job.labels:
        facts["labels"] = list(job.labels)
    if request.dedup:
        facts["duplicates"] = {"kind": request.dedup, "removed": len(survey.dropped), **survey.counts}
    if job.corpus.left_out or left:
        facts |= {"skipped": len(job.corpus.left_out), "skipped_records": len(left)}
    return facts


def _check(request: Request) -> None:
    if not 2 <= request.seq_len <= MAX_SEQ_LEN:
        raise UsageError(f"--seq-len must be 2 to {MAX_SEQ_LEN}, not {request.seq_len}")
    if not 1 <= request.shard_size <= MAX_SHARD_SIZE:
        raise UsageError(f"--shard-size must be 1 byte to 4 GiB, not {request.shard_size}")


def _labels_from(store: Store, request: Request) -> _Labels:
    if request.labels_from is None:
        return _Labels()
    if request.task not in LABELLED:
        raise UsageError(f"task {request.task} has no labels", hint="leave out --labels-from")
    found = resolve(store, request.labels_from)
    words = read_manifest(store, found.id).meta.get("labels")
    if not isinstance(words, list) or not words:
        raise UsageError(f"{found.label} has no labels", hint="name the dataset that was trained on")
    return _Labels(tuple(str(word) for word in words), found.label, {"labels": found.id})


def _recipe(request: Request, corpus: Corpus, keys: Mapping[str, str], chosen: _Tokenizer, labels: _Labels) -> Recipe:
    params: dict[str, Json] = {
        "task": request.task,
        "tokenizer": chosen.params,
        "seq_len": request.seq_len,
        "shard_size": request.shard_size,
        "fields": dict(keys),
        "skip_bad": request.skip_bad,
        "encoding": VERSION,
        "layout": LAYOUT,
    }
    if chosen.method:
        params["method"] = chosen.method
    if request.splits:
        params["split"] = dict(request.splits)
    tools = {"llmos": __version__, "tokenizers": version("tokenizers")}
    if request.dedup:
        params["dedup"] = request.dedup
        if request.dedup == "near":
            tools["rensa"] = version("rensa")
    return Recipe(
        "shard",
        params=params,
        inputs={**(chosen.inputs or {}), **labels.inputs},
        sources=(*(file.source for file in corpus.files), *chosen.sources),
        tools=tools,
    )


def _choose_tokenizer(store: Store, text: str) -> _Tokenizer:
    """Read `train:VOCAB`, a ref or a folder; what contains a slash is a folder, and a ref comes before a folder."""
    if text.startswith(_TRAIN):
        method, _, number = text.removeprefix(_TRAIN).rpartition(":")
        if method and method not in _METHODS:
            raise UsageError(f"{text!r} names no kind of tokenizer", hint="train:bpe:4096 or train:wordpiece:4096")
        return _Tokenizer(text, vocab_size=_vocab_size(text, number), method=_METHODS.get(method))
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


def _vocab_size(text: str, digits: str) -> int:
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
    return _spooled(stdin, folder, "stdin" if request.field is None and request.task in TEXT_TASKS else "stdin.jsonl")


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

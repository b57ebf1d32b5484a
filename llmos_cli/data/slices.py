"""The encoding of a corpus cut into slices, each of which can be done alone, anywhere, and is the same wherever done.

A `Job` is plain values that can be pickled. What was done of it is kept in the store's `tmp/` under a key of all that
decides it, so that a run after a kill goes on from there; it goes once the dataset is there, or a week later with gc.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from llmos_cli.data.corpus import Corpus, Part, Piece, Record, pieces_of, read_part, slices_of
from llmos_cli.data.dedup import Place
from llmos_cli.data.encode import Encoded, Ready, encode_examples, encode_pieces
from llmos_cli.data.layout import token_dtype
from llmos_cli.data.sources.records import BadRecord
from llmos_cli.data.tasks.chat import ChatTemplate, load_template
from llmos_cli.data.tasks.fields import TEXT_TASKS, Example, pick
from llmos_cli.data.tokenizer import Encoding, make_encoding
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats import canonical
from llmos_cli.formats.ids import ID_BYTES, IdHasher, ObjectId, object_id
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.partials import drop_partial, partial_path

VERSION: Final = 2  # of what is kept and of how text becomes tokens
_ARRAYS: Final = ("ids", "ends", "origins", "loss", "parts", "labels")


@dataclass(frozen=True)
class LeftOut:
    """A record that was left out: its place, and why."""

    file: str
    offset: int
    record: int
    why: str

    def as_json(self) -> canonical.Json:
        return {"file": self.file, "offset": self.offset, "record": self.record, "why": self.why}


@dataclass(frozen=True)
class Job:
    """All that decides the tokens of a corpus. `tokenizer` are files; `labels` the map, whose owner is `labels_of`."""

    corpus: Corpus
    task: str
    keys: Mapping[str, str]
    tokenizer: Mapping[str, bytes]
    tokenizer_label: str
    splits: Mapping[str, float]
    labels: tuple[str, ...] = ()
    labels_of: str = ""
    dropped: frozenset[Place] = frozenset()

    @cached_property
    def encoding(self) -> Encoding:
        return make_encoding(self.tokenizer, self.tokenizer_label)

    @cached_property
    def slices(self) -> list[list[tuple[int, Part]]]:
        return slices_of(self.corpus)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "encoding"} | {"slices": self.slices}


def encode_slice(job: Job, number: int) -> Iterator[Encoded | LeftOut]:
    """The runs of one slice, and what had to be left out of it.

    Raises UsageError naming the first bad record unless bad ones are to be skipped.
    """
    left: list[LeftOut] = []
    encoding = job.encoding
    dtype = token_dtype(encoding.vocab_size)
    if job.task in TEXT_TASKS:
        begin_id = encoding.begin_id if job.task == "mlm" else None
        runs = encode_pieces(_pieces(job, number, left), encoding, dtype, begin_id=begin_id)
    else:
        template = None
        if job.task == "chat":
            encoding.tokenizer.encode_special_tokens = False  # the template writes them; nobody else can
            template = load_template(job.tokenizer, encoding.special, job.tokenizer_label)
        runs = encode_examples(_ready(job, number, template, left), encoding, dtype, job.task)
    yield from runs
    yield from left


def encode_kept(store: Store, job: Job, number: int) -> Iterator[Encoded | LeftOut]:
    """As `encode_slice`; what was kept of a run before is taken, and what is new is kept."""
    path = _path(store, job, number)
    if _is_whole(path):
        yield from _read_kept(path)
        return
    temp = durable.temp_path(store.tmp)
    with durable.new_file(temp) as file:
        writer = _Writer(partial(durable.write_all, file))
        for run in encode_slice(job, number):
            writer.add(run)
            yield run
        writer.finish()
    durable.publish(temp, path)


def encode_bytes(job: Job, number: int) -> bytes:
    """A slice as the file that is kept of it."""
    file = BytesIO()
    writer = _Writer(file.write)
    for run in encode_slice(job, number):
        writer.add(run)
    writer.finish()
    return file.getvalue()


def is_kept(store: Store, job: Job, number: int) -> bool:
    """Whether a slice was done before."""
    return _is_whole(_path(store, job, number))


def keep(store: Store, job: Job, number: int, data: bytes) -> None:
    """Keep what `encode_bytes` gave."""
    durable.write_file(_path(store, job, number), data)


def drop_kept(store: Store, job: Job) -> None:
    """Remove what was kept; the dataset is in the store."""
    for number in range(len(job.slices)):
        path = _path(store, job, number)
        if path.exists():
            drop_partial(path)


def slice_key(job: Job, number: int) -> ObjectId:
    """The id of all that decides what a slice gives."""
    parts: list[canonical.Json] = []
    for index, part in job.slices[number]:
        file = job.corpus.files[index]
        dropped = sorted(record for place, record in job.dropped if place == index and record >= part.record)
        parts.append([index, file.source.name, file.label, str(file.source.id), file.kind])
        parts.append([part.start, part.stop, part.record, str(object_id(repr(dropped).encode()))])
    return object_id(
        canonical.encode(
            {
                "version": VERSION,
                "tokenizers": version("tokenizers"),
                "parts": parts,
                "task": job.task,
                "keys": dict(job.keys),
                "tokenizer": {name: str(object_id(data)) for name, data in job.tokenizer.items()},
                "splits": {name: str(share) for name, share in job.splits.items()},
                "labels": list(job.labels),
                "skip_bad": job.corpus.skip_bad,
            }
        )
    )


def split_of(text_id: ObjectId, splits: Mapping[str, float]) -> str:
    """Where a document belongs, by its text alone: the beginning of the circle is valid, the end is test."""
    if not splits:
        return "train"
    at = int.from_bytes(text_id[:8], "big") / 2.0**64
    if at < splits.get("valid", 0.0):
        return "valid"
    return "test" if at >= 1.0 - splits.get("test", 0.0) else "train"


def _records(job: Job, number: int, left: list[LeftOut]) -> Iterator[tuple[Record, Example | None]]:
    """The records of a slice that are neither bad nor duplicates."""
    for index, part in job.slices[number]:
        for record in read_part(job.corpus.files[index], index, part, tuple(job.keys.values())):
            if (index, record.origin[2]) in job.dropped:
                continue
            try:
                if record.bad is not None:
                    raise record.bad
                yield record, None if record.fields is None else pick(record.fields, job.task, job.keys)
            except BadRecord as exc:
                _leave_out(job, record, exc, left)


def _leave_out(job: Job, record: Record, exc: BadRecord, left: list[LeftOut]) -> None:
    if not job.corpus.skip_bad:
        raise UsageError(f"{record.place} {exc}", hint=exc.hint) from exc
    file, offset, number = record.origin
    left.append(LeftOut(job.corpus.files[file].source.name, offset, number, f"{record.place} {exc}"))


def _pieces(job: Job, number: int, left: list[LeftOut]) -> Iterator[Piece]:
    limit = job.encoding.piece_chars
    for record, example in _records(job, number, left):
        if example is None:
            assert record.text is not None
            assert record.text_id is not None
            yield from pieces_of(record, record.text, limit, split_of(record.text_id, job.splits))
        else:
            text = iter(example.texts)
            yield from pieces_of(record, text, limit, split_of(example.text_id, job.splits))


def _ready(job: Job, number: int, template: ChatTemplate | None, left: list[LeftOut]) -> Iterator[Ready]:
    numbers = {label: at for at, label in enumerate(job.labels)}
    for record, example in _records(job, number, left):
        assert example is not None
        split = split_of(example.text_id, job.splits) if job.splits else "train"
        try:
            label = None if example.label is None else numbers[example.label]
            chat = template.render(list(example.messages)) if template else None
        except KeyError:
            _leave_out(job, record, _unseen(job, example.label), left)
        except BadRecord as exc:
            _leave_out(job, record, exc, left)
        else:
            yield Ready(example.texts, record.origin, split, example.text_bytes, label, chat)


def _unseen(job: Job, label: str | None) -> BadRecord:
    known = ", ".join(job.labels[:10]) + (", ..." if len(job.labels) > 10 else "")
    return BadRecord(
        f"has the label {label!r}, which {job.labels_of} does not know (it has {known})",
        "mend the label, or leave such records out with --skip-bad",
    )


class _Writer:
    """Writes runs one after the other: a head as JSON, then the bytes of the arrays; at the end the id of it all."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._out, self._hasher = write, IdHasher()

    def add(self, run: Encoded | LeftOut) -> None:
        if isinstance(run, LeftOut):
            self._put(canonical.encode({"left": run.as_json()}))
            return
        arrays = {name: array for name in _ARRAYS if (array := getattr(run, name)) is not None}
        shapes: canonical.Json = {name: [array.dtype.str, array.size] for name, array in arrays.items()}
        self._put(canonical.encode({"arrays": shapes, "text_bytes": run.text_bytes, "split": run.split}))
        for array in arrays.values():
            self._write(np.ascontiguousarray(array).tobytes())

    def finish(self) -> None:
        self._put(b"")
        self._out(self._hasher.id())

    def _put(self, head: bytes) -> None:
        self._write(len(head).to_bytes(4, "little") + head)

    def _write(self, data: bytes) -> None:
        self._hasher.update(data)
        self._out(data)


def _path(store: Store, job: Job, number: int) -> Path:
    return partial_path(store, f"shard:{slice_key(job, number)}")


def _is_whole(path: Path) -> bool:
    """Whether a kept slice is there, to its last byte."""
    try:
        size = path.stat().st_size - ID_BYTES
        hasher = IdHasher()
        with open(path, "rb") as file:
            while size > 0:
                block = file.read(min(size, 1 << 20))
                hasher.update(block)
                size -= len(block) or size
            return size == 0 and file.read() == hasher.id()
    except OSError:
        return False


def _read_kept(path: Path) -> Iterator[Encoded | LeftOut]:
    with open(path, "rb") as file:
        while length := int.from_bytes(file.read(4), "little"):
            head = canonical.loads(file.read(length), "a kept slice")
            if not isinstance(head, dict):
                raise Damaged(f"{path} is not a kept slice")
            if "left" in head:
                yield LeftOut(**head["left"])  # type: ignore[arg-type]
                continue
            yield _read_run(file, head)


def _read_run(file: BinaryIO, head: Any) -> Encoded:
    arrays: dict[str, Any] = {}
    for name in _ARRAYS:
        if name in head["arrays"]:
            dtype, size = np.dtype(head["arrays"][name][0]), head["arrays"][name][1]
            arrays[name] = np.frombuffer(file.read(size * dtype.itemsize), dtype)
    arrays["origins"] = arrays["origins"].reshape(-1, 3)
    return Encoded(**arrays, text_bytes=head["text_bytes"], split=head["split"])

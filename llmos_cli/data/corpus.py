"""The files of a corpus as a stream of records: first a plan that reads and checks every file, then what it planned.

`.jsonl`, `.ndjson`, `.csv`, `.tsv` and `.parquet` files hold one record a line or row; any other file is one document.
`.gz` and `.zst` around them are unpacked. Text is UTF-8 without NUL bytes; a byte-order mark is dropped, nothing else
is changed. Large files of records are planned in parts that can be read alone; a part is read in bounded memory and
compared with the plan: what is handed out is what the plan names, or an error. It knows nothing of tasks or tokens.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from llmos_cli.data.inputs import Input
from llmos_cli.data.sources import streams
from llmos_cli.data.sources.columnar import read_rows, row_groups
from llmos_cli.data.sources.records import (
    BadRecord,
    Raw,
    decode,
    parse_columns,
    parse_json,
    read_csv,
    read_lines,
    split_csv,
)
from llmos_cli.data.sources.streams import PACKED, Unreadable, changed, opened, stamp_of
from llmos_cli.errors import UsageError
from llmos_cli.formats.ids import IdHasher, ObjectId
from llmos_cli.formats.limits import KiB, MiB
from llmos_cli.formats.manifest import Source
from llmos_cli.progress import Progress

Kind = Literal["text", "jsonl", "csv", "tsv", "parquet"]
KINDS: Final[dict[str, Kind]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
PIECE_CHARS: Final = 16 * KiB  # the tokenizers library takes half as long again for pieces of 256 KiB
CUT_BEFORE: Final = ("\n", " ", "\u3002", "\uff0c")  # white space; full stop and comma of texts that have none
SLICE_BYTES: Final = 32 * MiB
_BLANK: Final = b" \t\r\n" + codecs.BOM_UTF8
_SKIP_HINT: Final = "name the files with a glob, or leave such files out with --skip-bad"


@dataclass(frozen=True)
class Part:
    """A run of a file's records that can be read alone: from byte (Parquet: row group) `start` to `stop`, the first
    being number `record` (0: the line of column names). `id` is of its bytes; None where they are not read in one go.
    """

    start: int
    stop: int
    record: int
    size: int
    id: ObjectId | None


@dataclass(frozen=True)
class TextFile:
    """A file that was read once; `stamp` tells whether it was touched since, `label` is what messages call it.

    `text_id` is of the whole text, without a byte-order mark, where the file is one document.
    """

    path: Path
    label: str
    source: Source
    stamp: tuple[int, int, int, int]
    kind: Kind = "text"
    packing: str = ""
    columns: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    text_id: ObjectId | None = None

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Corpus:
    """What will be read, in order; `left_out` says which files cannot be used, and why."""

    files: tuple[TextFile, ...]
    skip_bad: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of text, unpacked."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Record:
    """One record or document: where it comes from, and its fields, or its text as a stream, or why it is bad."""

    origin: tuple[int, int, int]
    place: str
    fields: dict[str, Any] | None = None
    text: Iterator[str] | None = None
    text_id: ObjectId | None = None
    bad: BadRecord | None = None


@dataclass(frozen=True)
class Piece:
    """Part of a document's text; `last` closes the document."""

    text: str
    last: bool
    origin: tuple[int, int, int] = (-1, -1, -1)
    split: str = "train"


def plan_corpus(inputs: Sequence[Input], *, skip_bad: bool, progress: Progress) -> Corpus:
    """Read every file once: its digest, its parts, and whether it is what its name says.

    Files that cannot be used or are empty are left out and named in warnings with `skip_bad`; without it they are one
    error that names the first. Raises AccessDenied, NotFound, or LlmosError for a file that changes meanwhile.
    """
    files: list[TextFile] = []
    bad: list[str] = []
    with progress.task("reading", total=sum(_size(item.path) for item in inputs)) as task:
        for item in inputs:
            file, problem = _inspect(item, task.advance)
            if problem is None:
                files.append(file)
            else:
                bad.append(f"{item.label} {problem}")
    if bad and not skip_bad:
        more = f", and {len(bad) - 1} more of {len(inputs)} files cannot be used" if len(bad) > 1 else ""
        raise UsageError(bad[0] + more, hint=_SKIP_HINT)
    for text in bad:
        progress.warn(f"left out: {text}")
    if not files:
        raise UsageError(f"{bad[0]}, and no other file is left" if bad else "there are no files to read")
    return Corpus(tuple(files), skip_bad, tuple(bad))


def slices_of(corpus: Corpus) -> list[list[tuple[int, Part]]]:
    """The parts of the corpus in order, each with its file's number, in slices of about SLICE_BYTES of text."""
    slices: list[list[tuple[int, Part]]] = []
    room = 0
    for number, file in enumerate(corpus.files):
        for part in file.parts:
            if part.size > room or not slices:
                slices.append([])
                room = SLICE_BYTES
            slices[-1].append((number, part))
            room -= part.size
    return slices


def read_corpus(corpus: Corpus, keys: Sequence[str]) -> Iterator[Record]:
    """All records in order; of Parquet files only the columns `keys`."""
    for number, file in enumerate(corpus.files):
        for part in file.parts:
            yield from read_part(file, number, part, keys)


def read_part(file: TextFile, number: int, part: Part, keys: Sequence[str]) -> Iterator[Record]:
    """The records of one part of file `number`. Raises LlmosError naming a file that is not what the plan read."""
    if file.kind == "text":
        yield Record((number, 0, 1), file.label, text=_decoded(file, part), text_id=file.text_id)
    elif file.kind == "parquet":
        yield from _read_rows(file, number, part, keys)
    else:
        read = read_csv if file.kind == "csv" else read_lines
        for raw in read(_verified(file, part), part.start, part.record):
            blank = raw.data is not None and not raw.data.strip(_BLANK)
            if raw.number and not blank:
                yield _parsed(file, number, raw)


def pieces_of(record: Record, text: Iterator[str], limit: int, split: str) -> Iterator[Piece]:
    """A document's text, cut where it is long: pieces of at most `limit`, the last twice as long."""
    for piece in _pieces(text, limit):
        yield replace(piece, origin=record.origin, split=split)


def _parsed(file: TextFile, number: int, raw: Raw) -> Record:
    noun = "record" if file.kind == "csv" else "line"
    line = raw.number + 1 if file.kind == "tsv" else raw.number  # after the column names
    origin = number, raw.offset, raw.number
    place = f"{noun} {line} of {file.label} (at byte {raw.offset})"
    try:
        text = decode(raw)
        if file.kind == "jsonl":
            return Record(origin, place, parse_json(text))
        return Record(origin, place, parse_columns(text, file.columns, tabs=file.kind == "tsv"))
    except BadRecord as exc:
        return Record(origin, place, bad=exc)


def _read_rows(file: TextFile, number: int, part: Part, keys: Sequence[str]) -> Iterator[Record]:
    with opened(file.path) as stream:
        if stamp_of(stream)[2:] != file.stamp[2:]:  # on another machine the rest is other
            raise changed(file.label)
        try:
            for at, row in enumerate(read_rows(file.path, part.start, part.stop, keys), part.record):
                yield Record((number, 0, at), f"row {at} of {file.label}", row)
        except Unreadable as exc:
            raise UsageError(f"{file.label} {exc}") from exc
        if stamp_of(stream)[2:] != file.stamp[2:]:
            raise changed(file.label)


def _inspect(item: Input, advance: Callable[[int], None]) -> tuple[TextFile, str | None]:
    """Digest and check one file; the second value says why it cannot be used."""
    suffixes = PurePosixPath(item.name.lower()).suffixes
    packing = PACKED.get(suffixes[-1], "") if suffixes else ""
    kind = (
        KINDS.get((suffixes[:-1] if packing else suffixes)[-1:][0], "text") if len(suffixes) > bool(packing) else "text"
    )
    hasher, check = IdHasher(), _Check(kind)
    done = 0
    with opened(item.path) as stream:
        stamp = stamp_of(stream)

        def plain() -> Iterator[bytes]:
            nonlocal done
            for block in streams.blocks(stream, item.path):
                hasher.update(block)
                advance(len(block))
                done += len(block)
                yield block

        problem = None
        try:
            for block in streams.unpacked(plain(), packing, stamp[2]) if packing else plain():
                problem = check.feed(block)
                if problem:
                    break
            else:
                problem = check.end()
            if problem is None and (stamp_of(stream) != stamp or stamp[2] != done):
                raise changed(item.label)
            file = TextFile(item.path, item.label, Source(item.name, done, hasher.id()), stamp, kind, packing)
            return (file, problem) if problem else (_with_parts(file, check), None)
        except Unreadable as exc:
            return TextFile(item.path, item.label, Source(item.name, done, hasher.id()), stamp), str(exc)


class _Check:
    """What is found out of a file's text while it passes: is it text, how long, where its lines may be cut."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.size = 0
        self.cuts: list[tuple[int, int]] = [(0, 1 if kind == "jsonl" else 0)]  # byte, number of the record there
        self.hasher = IdHasher()
        self._lines = self.cuts[0][1]
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._head = b""

    def feed(self, block: bytes) -> str | None:
        problem = None
        if self.kind == "text":
            problem = _not_text(block, self.size, self._decoder, final=False)
            self._feed_id(block)
        elif self.kind in ("jsonl", "tsv"):
            self._cut(block)
        self._head = self._head or block[:3]
        self.size += len(block)
        return problem

    def end(self) -> str | None:
        if self.size <= len(self._head) and self._head in (b"", codecs.BOM_UTF8):
            return "is empty"
        return _not_text(b"", self.size, self._decoder, final=True) if self.kind == "text" else None

    def _feed_id(self, block: bytes) -> None:
        self.hasher.update(block.removeprefix(codecs.BOM_UTF8) if not self.size else block)

    def _cut(self, block: bytes) -> None:
        """Note a line's beginning once a slice is full."""
        at = 0
        while (wanted := self.cuts[-1][0] + SLICE_BYTES - self.size) < len(block):
            found = block.find(b"\n", max(wanted, at))
            if found < 0:
                break
            self._lines += block.count(b"\n", at, found + 1)
            at = found + 1
            self.cuts.append((self.size + at, self._lines))
        self._lines += block.count(b"\n", at)


def _with_parts(file: TextFile, check: _Check) -> TextFile:
    """The parts of a file, and its columns. One that is packed is one part: it cannot be entered in the middle."""
    size = check.size
    if file.kind == "parquet":
        rows, columns, unpacked = row_groups(file.path)
        starts = [sum(rows[:at]) + 1 for at in range(len(rows))]
        parts = [Part(at, at + 1, starts[at], unpacked // len(rows), None) for at in range(len(rows))]
        return replace(file, columns=columns, parts=tuple(parts))
    whole = Part(0, size, check.cuts[0][1], size, None if file.packing else file.source.id)
    file = replace(file, parts=(whole,))
    if file.kind == "text":
        return replace(file, text_id=check.hasher.id())
    if file.kind in ("csv", "tsv"):
        file = replace(file, columns=_columns(file, whole))
    if file.packing or size <= SLICE_BYTES:
        return file
    cuts = check.cuts if file.kind != "csv" else _csv_cuts(file, whole)
    ends = [(at, record) for at, record in cuts if at < size] + [(size, 0)]
    with opened(file.path) as stream:
        parts = []
        for (start, record), (stop, _) in pairwise(ends):
            hasher = IdHasher()
            for block in streams.blocks(stream, file.path, stop - start):
                hasher.update(block)
            parts.append(Part(start, stop, record, stop - start, hasher.id()))
        if stamp_of(stream) != file.stamp:
            raise changed(file.label)
    return replace(file, parts=tuple(parts))


def _columns(file: TextFile, whole: Part) -> tuple[str, ...]:
    read = read_csv if file.kind == "csv" else read_lines
    found = read(_verified(file, whole), 0, 0)
    try:
        text = decode(next(found))
        fields = text.split("\t") if file.kind == "tsv" else split_csv(text)
    except BadRecord as exc:
        raise Unreadable(f"has a first line that {exc}") from exc
    if fields is None:
        raise Unreadable("has a quote in its first line that does not end")
    if len(set(fields)) < len(fields):
        raise Unreadable("names a column twice in its first line")
    return tuple(fields)


def _csv_cuts(file: TextFile, whole: Part) -> list[tuple[int, int]]:
    cuts = [(0, 0)]
    for raw in read_csv(_verified(file, whole), 0, 0):
        if raw.offset - cuts[-1][0] >= SLICE_BYTES:
            cuts.append((raw.offset, raw.number))
    return cuts


def _not_text(block: bytes, start: int, decoder: codecs.IncrementalDecoder, *, final: bool) -> str | None:
    held = len(decoder.getstate()[0])
    nul = block.find(b"\0")
    try:
        if held or final or not block.isascii():
            decoder.decode(block, final)
    except UnicodeDecodeError as exc:
        offset = start - held + exc.start
        if nul < 0 or offset < start + nul:
            return f"is not UTF-8 text (byte 0x{exc.object[exc.start]:02x} at offset {offset})"
    return f"is not text (a NUL byte at offset {start + nul})" if nul >= 0 else None


def _verified(file: TextFile, part: Part) -> Iterator[bytes]:
    """The unpacked bytes of a part; raises LlmosError unless they are the ones that were planned."""
    hasher = IdHasher()
    with opened(file.path) as stream:
        if stamp_of(stream)[2] != file.source.size:
            raise changed(file.label)

        def plain() -> Iterator[bytes]:
            for block in streams.blocks(stream, file.path, None if file.packing else part.stop - part.start):
                hasher.update(block)
                yield block

        try:
            if file.packing:
                yield from streams.unpacked(plain(), file.packing, file.source.size)
            else:
                stream.seek(part.start)
                yield from plain()
        except Unreadable as exc:
            raise changed(file.label) from exc
        expected = file.source.id if file.packing else part.id
        if hasher.id() != expected or stamp_of(stream)[2] != file.source.size:
            raise changed(file.label)


def _decoded(file: TextFile, part: Part) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for block in _verified(file, part):
            yield decoder.decode(block)
        yield decoder.decode(b"", True)
    except UnicodeDecodeError as exc:
        raise changed(file.label) from exc


def _pieces(texts: Iterator[str], limit: int) -> Iterator[Piece]:
    """One document's text, cut where it is long."""
    held, start = "", 0
    for text in texts:
        held, start = held[start:] + text, 0
        while len(held) - start > 2 * limit:
            at = cut_point(held, start, start + limit)
            yield Piece(held[start:at], False)
            start = at
    yield Piece(held[start:], True)


def cut_point(text: str, start: int, stop: int) -> int:
    """Where to cut text[start:stop] so that tokens come out as uncut: between a letter or digit and one of CUT_BEFORE.

    The splitting rules of byte-level tokenizers (GPT-2, Llama 3, Qwen) never carry a word over such a place. Text that
    has none in its second half is cut at `stop`: perhaps a token more, the same text.
    """
    half = (start + stop) // 2
    for mark in CUT_BEFORE:
        at = stop
        while (at := text.rfind(mark, half + 1, at)) > 0:
            if text[at - 1].isalnum():
                return at
    return stop


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

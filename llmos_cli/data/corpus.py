"""Text files as a stream of documents: first a plan that reads and checks every file, then the text itself.

`.jsonl` and `.ndjson` files hold one document a line, in one field; any other file is one document. Text is UTF-8
without NUL bytes; a byte-order mark is dropped, nothing else is changed. Documents leave in pieces of bounded length,
so memory does not depend on how large a file is. Every later read is compared with the plan, by stamp and by digest:
what is handed out is what the plan names, or an error. It knows nothing of tokens.
"""

import codecs
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from llmos_cli.data.inputs import Input
from llmos_cli.errors import LlmosError, Unsafe, UsageError, from_os_error
from llmos_cli.formats.ids import IdHasher
from llmos_cli.formats.limits import KiB, MiB
from llmos_cli.formats.manifest import Source
from llmos_cli.progress import Progress

LINE_SUFFIXES: Final = (".jsonl", ".ndjson")
PIECE_CHARS: Final = 16 * KiB  # the tokenizers library takes half as long again for pieces of 256 KiB
CUT_BEFORE: Final = ("\n", " ", "\u3002", "\uff0c")  # white space; full stop and comma of texts that have none
LINE_BYTES: Final = 256 * MiB
_BLOCK: Final = 1 * MiB
_SKIP_HINT: Final = "name the files with a glob, or leave such files out with --skip-bad"


@dataclass(frozen=True)
class TextFile:
    """A file that was read once and found to be text; `stamp` tells whether it was touched since, `label` is what
    messages call it."""

    path: Path
    label: str
    source: Source
    stamp: tuple[int, int, int, int]
    lines: bool


@dataclass(frozen=True)
class Corpus:
    """What will be read, in order; `field` is where a JSON line keeps its text, `skipped` counts files left out."""

    files: tuple[TextFile, ...]
    field: str
    skip_bad: bool = False
    skipped: int = 0

    @property
    def size(self) -> int:
        return sum(file.source.size for file in self.files)


@dataclass(frozen=True)
class Piece:
    """Part of a document's text; `last` closes the document."""

    text: str
    last: bool


def plan_corpus(inputs: Sequence[Input], *, field: str, skip_bad: bool, progress: Progress) -> Corpus:
    """Read every file once: its digest, and whether it is text.

    Files that are not text or are empty are left out and named in warnings with `skip_bad`; without it they are one
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
    return Corpus(tuple(files), field, skip_bad, len(bad))


def read_pieces(
    corpus: Corpus, bad_line: Callable[[str], None] = lambda _: None, *, piece_chars: int = PIECE_CHARS
) -> Iterator[Piece]:
    """All documents in order, in pieces of at most `piece_chars`, the last of a document twice as long.

    With `skip_bad`, `bad_line` hears of each JSON line that is left out.

    Raises LlmosError naming a file that is not what the plan read, UsageError naming file and line of a bad JSON line.
    """
    for file in corpus.files:
        if file.lines:
            for text in _line_texts(file, corpus.field, bad_line if corpus.skip_bad else None):
                yield from _pieces(iter((text,)), piece_chars)
        else:
            yield from _pieces(_decoded(file), piece_chars)


def _inspect(item: Input, advance: Callable[[int], None]) -> tuple[TextFile, str | None]:
    """Digest and check one file; the second value says why it cannot be used."""
    hasher, problem = IdHasher(), None
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, head = 0, b""
    with _opened(item.path) as stream:
        stamp = _stamp(stream)
        for block in _blocks(stream, item.path):
            hasher.update(block)
            advance(len(block))
            problem = _not_text(block, done, decoder, final=False)
            head = head or block[: len(codecs.BOM_UTF8)]
            done += len(block)
            if problem:
                break
        else:
            problem = _not_text(b"", done, decoder, final=True)
            if done <= len(head) and head in (b"", codecs.BOM_UTF8):
                problem = "is empty"
        if problem is None and (_stamp(stream) != stamp or stamp[2] != done):
            raise _changed(item.label)
    lines = item.name.lower().endswith(LINE_SUFFIXES)
    return TextFile(item.path, item.label, Source(item.name, done, hasher.id()), stamp, lines), problem


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


def _verified(file: TextFile) -> Iterator[bytes]:
    """The bytes of a planned file; raises LlmosError unless they are the ones that were planned."""
    hasher = IdHasher()
    with _opened(file.path) as stream:
        if _stamp(stream) != file.stamp:
            raise _changed(file.label)
        for block in _blocks(stream, file.path):
            hasher.update(block)
            yield block
        if _stamp(stream) != file.stamp or hasher.id() != file.source.id:
            raise _changed(file.label)


def _decoded(file: TextFile) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for block in _verified(file):
            yield decoder.decode(block)
        yield decoder.decode(b"", True)
    except UnicodeDecodeError as exc:
        raise _changed(file.label) from exc


def _line_texts(file: TextFile, field: str, bad_line: Callable[[str], None] | None) -> Iterator[str]:
    number = documents = 0
    for number, line in enumerate(_lines(file), 1):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not content.strip():
            continue
        try:
            text = _line_text(content, field)
        except _BadLine as exc:
            if bad_line is None:
                raise UsageError(f"line {number} of {file.label} {exc}", hint=exc.hint) from exc
            bad_line(f"line {number} of {file.label} {exc}")
            continue
        documents += 1
        yield text
    if not documents and bad_line is None:
        raise UsageError(f"{file.label} holds no documents in {number} lines", hint=_SKIP_HINT)


class _BadLine(Exception):
    def __init__(self, why: str, hint: str = "mend the line, or leave such lines out with --skip-bad") -> None:
        super().__init__(why)
        self.hint = hint


def _line_text(line: bytes, field: str) -> str:
    if len(line) > LINE_BYTES:
        raise _BadLine(f"is longer than {LINE_BYTES // MiB} MiB")
    try:
        value = json.loads(line)
    except RecursionError:
        raise _BadLine("is nested too deeply") from None
    except ValueError as exc:
        raise _BadLine(f"is not valid JSON: {str(exc)[:200]}") from exc
    if not isinstance(value, dict):
        raise _BadLine("is not a JSON object")
    if field not in value:
        texts = [key for key, item in value.items() if isinstance(item, str)]
        near = f"say which field holds the text: --field {texts[0]}" if texts else "say which with --field"
        raise _BadLine(f"has no field {field!r}", near)
    text = value[field]
    if not isinstance(text, str):
        raise _BadLine(f"has a field {field!r} that is not a string")
    if not text:
        raise _BadLine(f"has an empty field {field!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadLine(f"has half a surrogate pair in field {field!r}") from None
    return text


def _lines(file: TextFile) -> Iterator[bytes]:
    """Lines without their ends; of one over the limit, only enough to see that it is."""
    held: list[bytes] = []
    size = 0
    for block in _verified(file):
        head, *rest = block.split(b"\n")
        for part in [head, *rest[:-1]] if rest else []:
            yield b"".join((*held, part))
            held, size = [], 0
        tail = rest[-1] if rest else head
        if size <= LINE_BYTES:
            held.append(tail)
        size += len(tail)
    if size:
        yield b"".join(held)


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


def _opened(path: Path) -> BinaryIO:
    """Open a regular file; what became a pipe since it was found does not block, and is refused."""
    try:
        stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            stream.close()
            raise Unsafe(f"{path} is not a regular file any more")
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc
    return stream


def _blocks(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    while True:
        try:
            block = stream.read(_BLOCK)
        except OSError as exc:
            raise from_os_error(exc, f"reading {path}") from exc
        if not block:
            return
        yield block


def _stamp(stream: BinaryIO) -> tuple[int, int, int, int]:
    status = os.fstat(stream.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _changed(label: str) -> LlmosError:
    return LlmosError(f"{label} changed while it was read", hint="run the command again once nothing writes to it")

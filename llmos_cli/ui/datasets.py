"""How a dataset reads: its splits, how long documents are, its labels, some documents, and what two datasets differ in.

Takes manifests' facts and results of `data.documents`. Texts come from outside: nothing in them moves the cursor.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmos_cli.ui.output import Output
from llmos_cli.ui.text import count, percent, plural, safe, safe_line, shorten

if TYPE_CHECKING:
    from llmos_cli.data.documents import Document, DocumentsDiff

DATASET_FACTS = frozenset({"documents", "fill", "mix", "rows", "shards", "splits", "tokens"})  # those that are drawn
SHOWN_EXAMPLES = 5
SHOWN_LABELS = 10
SHOWN_CHARS = 600
EXCERPT_CHARS = 60
BAR_WIDTH = 40


def show_splits(out: Output, meta: Mapping[str, Any]) -> None:
    """A table of the splits, then lengths and labels of the training split as bars."""
    splits = {split: facts for split, facts in _tables(meta.get("splits")) if isinstance(facts, Mapping)}
    for number, part in enumerate(meta.get("mix") or ()):
        if isinstance(part, Mapping):
            splits |= {
                f"dataset{number:03} x{part.get('weight')} {split}": facts
                for split, facts in _tables(part.get("splits"))
            }
    if not splits:
        return
    columns = ("documents", "tokens", "rows", "shards")
    out.line("splits")
    rows = [[split, *(_number(facts.get(column)) for column in columns)] for split, facts in splits.items()]
    out.table(["  split", *columns], [["  " + row[0], *row[1:]] for row in rows], right={1, 2, 3, 4}, spare={4})
    if isinstance(fill := meta.get("fill"), float):
        out.line(f"  rows are {percent(fill, 1)} full")
    for split, facts in splits.items():
        _bars(out, f"tokens in a document, {split}", _lengths(facts.get("lengths")))
        labels = _labels(facts.get("labels"), meta.get("labels"))
        _bars(out, f"labels, {split}", labels[:SHOWN_LABELS], len(labels) - SHOWN_LABELS)


def show_documents(out: Output, documents: "Sequence[Document]", *, whole: bool = False) -> None:
    """Each with where it came from; unless `whole`, the start of its text."""
    for at, document in enumerate(documents):
        if at:
            out.line("")
        out.line(f"{document.split} {document.number}: {', '.join(_origin(document))}")
        for text in (document.text, document.second):
            if text is not None:
                cut = text if whole or len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS]
                for line in safe(cut.expandtabs(4)).split("\n"):
                    out.line(f"  {line}".rstrip())
                if len(cut) < len(text):
                    out.line(f"  ({count(len(text) - len(cut))} more characters: --document {document.number})")


def show_documents_diff(out: Output, found: "DocumentsDiff") -> None:
    """How many documents came and went, and the first words of some."""
    if found.problem:
        out.warn(found.problem)
        return
    out.line("")
    out.line("documents")
    for split in found.splits:
        counts = f"{count(split.equal)} equal, {count(split.added)} added, {count(split.removed)} removed"
        out.line(f"  {split.split}: {counts}")
        for sign, examples, total in (
            ("-", split.examples_removed, split.removed),
            ("+", split.examples_added, split.added),
        ):
            for document in examples:
                words = shorten(" ".join(document.text.split()), EXCERPT_CHARS)
                out.line(safe_line(f"    {sign} {document.number}, {_origin(document)[-1]}: {words}"))
            if total > len(examples):
                out.line(f"    {sign} and {count(total - len(examples))} more")


def document_json(document: "Document") -> dict[str, Any]:
    """A document as --json has it."""
    source = document.source
    return {
        "split": document.split,
        "document": document.number,
        "source": source and {"name": source.name, "size": source.size, "id": str(source.id)},
        "offset": document.offset,
        "record": document.record,
        "tokens": document.tokens,
        "digest": document.digest,
        "label": document.label,
        "text": document.text,
        "second": document.second,
        "cut": document.cut,
    }


def documents_diff_json(found: "DocumentsDiff") -> dict[str, Any]:
    """What `documents` holds in the JSON of a diff."""
    return {
        "problem": found.problem,
        "splits": {
            item.split: {
                "equal": item.equal,
                "added": item.added,
                "removed": item.removed,
                "examples_added": [document_json(document) for document in item.examples_added],
                "examples_removed": [document_json(document) for document in item.examples_removed],
            }
            for item in found.splits
        },
    }


def _origin(document: "Document") -> list[str]:
    """Facts of a document; where it came from stands last."""
    facts = [plural(document.tokens, "token")]
    if document.label is not None:
        facts.append(f"label {document.label}")
    if document.source is None:
        return [*facts, "source not told"]
    place = "" if document.offset is None else f" at byte {document.offset}"
    record = "" if document.record is None else f", record {document.record}"
    return [*facts, safe_line(f"{document.source.name}{place}{record}")]


def _tables(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items() if isinstance(item, Mapping))


def _counts(value: Any) -> list[tuple[str, int]]:
    """Names and numbers, the largest number first."""
    held = value.items() if isinstance(value, Mapping) else ()
    return sorted(((str(key), item) for key, item in held if isinstance(item, int)), key=lambda item: -item[1])


def _labels(value: Any, names: Any) -> list[tuple[str, int]]:
    """Labels, which are counted by number, by name."""
    words = names if isinstance(names, Sequence) else ()
    return [
        (str(words[int(key)]) if key.isascii() and key.isdigit() and int(key) < len(words) else key, number)
        for key, number in _counts(value)
    ]


def _lengths(value: Any) -> list[tuple[str, int]]:
    """Bars of a histogram by powers of two, without a gap."""
    held = {int(key): number for key, number in _counts(value) if key.isascii() and key.isdigit() and int(key) > 0}
    if not held:
        return []
    low, high = (bound.bit_length() - 1 for bound in (min(held), max(held)))
    return [(f"to {count(1 << power)}", held.get(1 << power, 0)) for power in range(low, high + 1)]


def _bars(out: Output, title: str, bars: Sequence[tuple[str, int]], more: int = 0) -> None:
    if not bars:
        return
    out.line(title)
    most = max(number for _, number in bars)
    names = [safe_line(shorten(name, 30)) for name, _ in bars]
    name_width, width = max(map(len, names)), max(len(count(number)) for _, number in bars)
    for name, (_, number) in zip(names, bars, strict=True):
        bar = "#" * max(1, round(BAR_WIDTH * number / most)) if number else ""
        out.line(f"  {name:>{name_width}}  {count(number):>{width}}  {bar}".rstrip())
    if more > 0:
        out.line(f"  and {count(more)} more")


def _number(value: Any) -> str:
    return count(value) if isinstance(value, int) else "-"

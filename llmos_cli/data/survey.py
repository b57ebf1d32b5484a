"""One pass over a corpus before it is encoded, where a task or an option must know all of it: labels and duplicates."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llmos_cli.data.corpus import Corpus, Record, pieces_of, read_corpus
from llmos_cli.data.dedup import LOOK_CHARS, Dedup, Duplicates, Place
from llmos_cli.data.sources.records import BadRecord
from llmos_cli.data.tasks.fields import LABELLED, MOST_LABELS, Example, pick, sort_labels
from llmos_cli.errors import UsageError
from llmos_cli.formats.canonical import Json
from llmos_cli.progress import Progress

_EXAMPLES = 1000
_SHOWN_CHARS = 200


@dataclass
class Survey:
    """The labels in their order, and the documents to leave out because others say the same."""

    labels: tuple[str, ...] = ()
    dropped: set[Place] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[Json] = field(default_factory=list)


def take_survey(
    corpus: Corpus,
    task: str,
    keys: Mapping[str, str],
    dedup: Dedup | None,
    progress: Progress,
    *,
    known_labels: tuple[str, ...] = (),
) -> Survey:
    """Look through the corpus if something must be known of all of it. Bad records are left for later."""
    survey = Survey(known_labels)
    want_labels = task in LABELLED and "label" in keys and not known_labels
    if not (want_labels or dedup):
        return survey
    labels: set[str] = set()
    duplicates = Duplicates(dedup) if dedup else None
    with progress.task("looking for duplicates" if dedup else "looking at labels", total=corpus.size) as bar:
        for record, example in read_examples(corpus, task, keys):
            text = _text_of(record, example)
            bar.advance(example.text_bytes if example else len(text.encode()))
            if duplicates:
                _note_twin(survey, duplicates, corpus, record, example, text)
            if want_labels and example and example.label is not None:
                labels.add(example.label)
                if len(labels) > MOST_LABELS:
                    raise UsageError(
                        f"field {keys['label']!r} has more than {MOST_LABELS} different values, too many for labels",
                        hint="say which field holds the label: --field label=KEY",
                    )
    if want_labels:
        survey.labels = sort_labels(labels)
    return survey


def read_examples(corpus: Corpus, task: str, keys: Mapping[str, str]) -> Iterator[tuple[Record, Example | None]]:
    """Records that can be used, with their values (None for a document that comes as a stream).

    Raises UsageError naming the first that cannot, unless such are to be skipped: before hours of other work.
    """
    for record in read_corpus(corpus, tuple(keys.values())):
        try:
            if record.bad is not None:
                raise record.bad
            yield record, None if record.fields is None else pick(record.fields, task, keys)
        except BadRecord as exc:
            if not corpus.skip_bad:
                raise UsageError(f"{record.place} {exc}", hint=exc.hint) from exc


def read_texts(corpus: Corpus, task: str, keys: Mapping[str, str], dropped: set[Place], limit: int) -> Iterator[str]:
    """All text that is to be encoded, in pieces of about `limit`: what a tokenizer learns from."""
    for record, example in read_examples(corpus, task, keys):
        if (record.origin[0], record.origin[2]) in dropped:
            continue
        if example is None:
            assert record.text is not None
            yield from (piece.text for piece in pieces_of(record, record.text, limit, "train"))
        else:
            yield from example.texts or (message["content"] for message in example.messages)


def _text_of(record: Record, example: Example | None) -> str:
    if example is not None:
        return "\n".join(example.texts or [message["content"] for message in example.messages])
    text = ""
    for part in record.text or ():
        if len(text) < LOOK_CHARS:
            text += part
    return text[:LOOK_CHARS]


def _note_twin(
    survey: Survey, duplicates: Duplicates, corpus: Corpus, record: Record, example: Example | None, text: str
) -> None:
    file, offset, number = record.origin
    text_id = example.text_id if example else record.text_id
    assert text_id is not None
    found = duplicates.twin(text_id, text, (file, number))
    if found is None:
        return
    how, (other_file, other_number) = found
    survey.dropped.add((file, number))
    survey.counts[how] = survey.counts.get(how, 0) + 1
    if len(survey.examples) < _EXAMPLES:
        survey.examples.append(
            {
                "file": corpus.files[file].source.name,
                "offset": offset,
                "record": number,
                "like": {"file": corpus.files[other_file].source.name, "record": other_number},
                "how": how,
                "text": text[:_SHOWN_CHARS],
            }
        )

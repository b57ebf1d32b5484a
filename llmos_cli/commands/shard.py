"""`llmos shard`: make training data out of text."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.errors import PartlyDone, UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import count, duration, parse_size, plural, size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmos_cli.formats.canonical import Json
    from llmos_cli.formats.names import RefName
    from llmos_cli.ui.session import Session


def shard(
    ctx: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Files, folders, globs, or - for standard input.", show_default=False),
    ] = None,
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The ref to move, NAME or NAME:TAG.", show_default=False)],
    task: Annotated[
        str, typer.Option("--task", metavar="TASK", help="lm, mlm, classify, pair, seq2seq or chat.")
    ] = "lm",
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="train:N|REF|DIR", help="Train one of N tokens, or take one.")
    ] = "train:4096",
    seq_len: Annotated[int, typer.Option("--seq-len", metavar="N", help="Tokens in a row.")] = 256,
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Bytes in a shard.")] = "64MB",
    field: Annotated[
        str | None,
        typer.Option("--field", metavar="KEY|ROLE=KEY,...", help="Which fields of a record the task is to read."),
    ] = None,
    labels_from: Annotated[
        str | None, typer.Option("--labels-from", metavar="REF", help="Number labels as that dataset does.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="valid=P,test=P", help="Set shares of the documents aside, chosen by text."),
    ] = None,
    dedup: Annotated[
        str | None, typer.Option("--dedup", metavar="exact|near", help="Keep the first of equal or like documents.")
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option("--mix", metavar="REF:WEIGHT,...", help="Mix datasets instead, by shares of rows."),
    ] = None,
    on: Annotated[
        str | None, typer.Option("--on", metavar="ray|ray://HOST:PORT", help="Tokenize on a Ray cluster.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out what cannot be used, and name it; exit code 3.")
    ] = False,
) -> None:
    """Turn text into token shards to train on.

    Files ending in .jsonl, .csv, .tsv and .parquet hold records; any other file is one document; .gz and .zst are
    unpacked. Standard input is one document, or JSON lines if the task or --field asks for records. The same text and
    options give the same dataset, at once; a run that was stopped goes on where it was. With --on, machines that have
    the files under the same paths tokenize them, and the dataset is the same.

    A task reads these roles: lm and mlm: text. classify: text, label. pair: first, second, and label if there is one.
    seq2seq: source, target. chat: messages. Fields with usual names are found; --field names others.

    Examples:
      llmos shard corpus/*.txt web
      llmos shard dumps/ web --split valid=0.01,test=0.01 --dedup near
      llmos shard train.csv reviews --task classify --field text=review,label=stars
      llmos shard test.csv reviews-test --task classify --tokenizer reviews --labels-from reviews
      llmos shard chats.jsonl.gz talk --task chat --tokenizer ~/models/qwen
      zcat dump.jsonl.gz | llmos shard - dump --field content
      llmos shard /mnt/dumps/ web --on ray://head:10001
      llmos shard --mix web:3,code:1 both
    """
    from llmos_cli.formats.names import parse_ref

    here = session(ctx)
    ref = parse_ref(name)
    if mix is not None:
        _mix(here, mix, paths, ref)
        return
    if not paths:
        raise UsageError("there is nothing to read", hint=f"llmos shard PATH... {name}")
    num_bytes = parse_size(shard_size)
    with here.open_store() as store:
        import sys

        from llmos_cli.data.make import Request, make_dataset, parse_splits, read_dedup
        from llmos_cli.data.on_ray import check_place

        request = Request(
            tuple(paths),
            tokenizer,
            seq_len,
            num_bytes,
            field,
            skip_bad,
            task,
            parse_splits(split),
            read_dedup(dedup),
            labels_from,
            check_place(on),
        )
        start = time.monotonic()
        made = make_dataset(store, ref, request, progress=here.out.progress, stdin=sys.stdin.buffer)
        seconds = time.monotonic() - start
    meta = made.manifest.meta
    counts = {
        key: meta[key] for key in ("documents", "tokens", "rows", "shards", "seq_len", "vocab_size", "text_bytes")
    }
    here.out.result(
        {
            "ref": str(ref),
            "id": str(made.id),
            "kind": made.manifest.kind,
            **counts,
            "skipped": meta.get("skipped", 0),
            "skipped_records": meta.get("skipped_records", 0),
            "task": meta["task"],
            "splits": meta["splits"],
            "labels": meta.get("labels"),
            "duplicates": meta.get("duplicates"),
            "bytes": made.manifest.size,
            "stored": made.stored,
            "cached": made.cached,
            "seconds": round(seconds, 3),
        }
    )
    numbers = {key: value for key, value in counts.items() if isinstance(value, int)}
    verb = "was made before:" if made.cached else "is"
    here.out.line(
        f"dataset {ref} @{made.id.short} {verb} {plural(numbers['documents'], 'document')}, "
        f"{count(numbers['tokens'])} tokens ({meta['bytes_per_token']:.2f} bytes each)"
    )
    what = f"rows of {numbers['seq_len']} tokens" if meta.get("fill") is not None else "examples"
    here.out.line(
        f"{count(numbers['rows'])} {what} in {plural(numbers['shards'], 'shard')}, "
        f"vocabulary {count(numbers['vocab_size'])}, {size(made.manifest.size)}"
    )
    for line in _about(meta):
        here.out.line(line)
    here.out.say(f"{size(numbers['text_bytes'])} of text in {duration(seconds)}, {size(made.stored)} stored")
    if numbers["rows"] == 0:
        here.out.warn(f"{ref} has less than one row of {numbers['seq_len']} tokens: too little to train on")
    elif labels_from:
        here.out.hint(f"llmos eval MODEL --data {ref}")
    else:
        here.out.hint(f"llmos train NAME --data {ref} --steps 200")
        if isinstance(meta.get("labels"), list):
            here.out.hint(f"llmos shard TEST.csv NAME --task {task} --tokenizer {ref} --labels-from {ref}")
    _end(here, made.manifest.meta, str(ref))


def _mix(here: "Session", mix: str, paths: list[str] | None, ref: "RefName") -> None:
    if paths:
        raise UsageError(f"--mix takes datasets, not {paths[0]}", hint="shard the text first, then mix")
    with here.open_store() as store:
        from llmos_cli.data.mixing import make_mix, parse_mix

        shares = parse_mix(mix)
        commit, manifest = make_mix(store, ref, shares)
    counts = {key: manifest.meta[key] for key in ("documents", "tokens", "rows", "shards", "seq_len", "text_bytes")}
    weights = {share.name: str(share.weight) for share in shares}
    here.out.result(
        {
            "ref": str(ref),
            "id": str(commit.id),
            "kind": manifest.kind,
            "mix": weights,
            **counts,
            "stored": commit.stored,
        }
    )
    parts = ", ".join(f"{weight} of {name}" for name, weight in weights.items())
    here.out.line(f"dataset {ref} @{commit.id.short} draws {parts}; nothing is copied")
    here.out.hint(f"llmos train NAME --data {ref} --steps 200")


def _about(meta: "Mapping[str, Json]") -> list[str]:
    """Lines on labels, splits and duplicates, where there are any."""
    lines = []
    labels, splits, duplicates = meta.get("labels"), meta.get("splits"), meta.get("duplicates")
    if isinstance(labels, list):
        shown = ", ".join(str(label) for label in labels[:10]) + (", ..." if len(labels) > 10 else "")
        lines.append(f"{plural(len(labels), 'label')}: {shown}")
    if isinstance(splits, dict) and len(splits) > 1:
        each = (f"{name} {count(part['documents'])}" for name, part in splits.items())  # type: ignore[index, call-overload, arg-type]
        lines.append(f"documents: {', '.join(each)}")
    if isinstance(duplicates, dict):
        kind = "equal or like" if duplicates["kind"] == "near" else "equal"
        lines.append(f"{plural(int(str(duplicates['removed'])), 'document')} left out as {kind} to another")
    return lines


def _end(here: "Session", meta: "Mapping[str, Json]", ref: str) -> None:
    """Exit code 3 if anything was left out: whoever asked for it must still be able to tell."""
    files, records = (int(str(meta.get(key, 0))) for key in ("skipped", "skipped_records"))
    parts = [plural(number, noun) for number, noun in ((files, "file"), (records, "record")) if number]
    if parts:
        raise PartlyDone(
            f"{ref} was made without {' and '.join(parts)} that cannot be used",
            hint=f"llmos checkout {ref} DIR writes them to report/left-out.jsonl" if records else None,
        )

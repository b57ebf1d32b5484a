"""`llmos shard`: make training data out of text."""

import re
import time
from typing import Annotated

import typer

from llmos_cli.errors import UsageError
from llmos_cli.ui.session import session
from llmos_cli.ui.text import count, duration, plural, size


def shard(
    ctx: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Files, folders, globs, or - for standard input.", show_default=False),
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The ref to move, NAME or NAME:TAG.", show_default=False)],
    *,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="train:N|REF|DIR", help="Train one of N tokens, or take one.")
    ] = "train:4096",
    seq_len: Annotated[int, typer.Option("--seq-len", metavar="N", help="Tokens in a row.")] = 256,
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Bytes in a shard.")] = "64MB",
    field: Annotated[
        str | None,
        typer.Option("--field", metavar="KEY", help="Where a JSON line has its text.  [default: text]"),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out what is not text or is empty, and name it.")
    ] = False,
) -> None:
    """Turn text into token shards to train on.

    Every file is one document; in .jsonl and .ndjson files every line is one. Standard input is one document, or JSON
    lines if --field is given. Folders are read in sorted order, without hidden files. The same text and options give
    the same dataset, at once.

    Examples:
      llmos shard corpus/*.txt web
      llmos shard src/ notes.jsonl code:v2 --tokenizer train:8192 --seq-len 512
      llmos shard heldout.txt web-test --tokenizer web
      zcat dump.jsonl.gz | llmos shard - dump --field content --tokenizer ~/models/llama
    """
    from llmos_cli.formats.names import parse_ref

    here = session(ctx)
    ref = parse_ref(name)
    num_bytes = parse_size(shard_size)
    with here.open_store() as store:
        import sys

        from llmos_cli.data.make import Request, make_dataset

        request = Request(tuple(paths), tokenizer, seq_len, num_bytes, field, skip_bad)
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
            "skipped_lines": meta.get("skipped_lines", 0),
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
    here.out.line(
        f"{count(numbers['rows'])} rows of {numbers['seq_len']} tokens in {plural(numbers['shards'], 'shard')}, "
        f"vocabulary {count(numbers['vocab_size'])}, {size(made.manifest.size)}"
    )
    here.out.say(f"{size(numbers['text_bytes'])} of text in {duration(seconds)}, {size(made.stored)} stored")
    if numbers["rows"] == 0:
        here.out.warn(f"{ref} has less than one row of {numbers['seq_len']} tokens: too little to train on")
    else:
        here.out.hint(f"llmos train NAME --data {ref} --steps 200")


_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmg]?)(i?)b?\Z", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Read "4MB", "64MiB", "1.5G" or a plain number of bytes; raises UsageError."""
    match = _SIZE.match(text.strip())
    if not match or (match[3] and not match[2]):
        raise UsageError(f"{text!r} is not a size", hint="write 4MB, 64MiB or a number of bytes")
    power = " kmg".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)

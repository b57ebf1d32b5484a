"""`llmos add`: keep files in the store."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmos_cli.ui.session import session
from llmos_cli.ui.text import duration, percent, plural, size

if TYPE_CHECKING:
    from llmos_cli.store.intake.adopt import Adoption
    from llmos_cli.ui.session import Session


def add(
    ctx: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="Files or one folder; or ollama:NAME[:TAG].", show_default=False, readable=False
        ),
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The ref to move, NAME or NAME:TAG.", show_default=False)],
    *,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="REF", help="The model these weights came from.  [default: found by itself]"),
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Do not copy: share the bytes of files where the file system can.")
    ] = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Read files again that seem untouched.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be added.")] = False,
) -> None:
    """Keep a file, several files or a folder under a name.

    A folder with config.json and *.safetensors is kept as a model, one with a tokenizer.json as a tokenizer. What the
    store already holds is not stored again; of a fine-tune, or the next version of a model, only the difference is. A
    file that has not been touched since it was added is not read again. Links and pipes inside a folder are left out,
    with a warning.

    A path into the cache of Hugging Face's tools (a snapshot, a repository's folder, or CACHE/ORG/NAME) means the files
    of that snapshot; a manifest of ollama's, or ollama:NAME:TAG, its GGUF files with licence, template and parameters.
    Both are compared with the digests they are named by.

    With --adopt, files of 1 MB or more are not copied. Where the file system has reflinks, file and store share the
    bytes and stay independent. Where it has hard links only, the file is made read-only and becomes the store's own:
    edit a copy of it, never the file itself. Whatever cannot be shared is copied, and named. Every read is checked.

    Examples:
      llmos add ~/models/llama base
      llmos add notes.txt data.jsonl raw:2026-11
      llmos add ~/models/llama-chat chat --base base
      llmos add --adopt ~/downloads/qwen qwen
      llmos add --adopt ~/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B qwen
      llmos add --adopt ollama:llama3.2:1b llama
      llmos add model.safetensors weights --json
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.store.intake.add import execute_add, plan_add
    from llmos_cli.store.refs.resolve import resolve

    here = session(ctx)
    ref = parse_ref(name)
    plan = plan_add([_place(here, path) for path in paths])
    files = plural(len(plan.files), "file")
    if dry_run:
        for skipped, reason in plan.skipped:
            here.out.warn(f"would skip {skipped}: {reason}")
        how = ", adopting what can be" if adopt else ""
        here.out.line(f"would add {files}, {size(plan.total_bytes)}, as {plan.kind} {ref}{how}")
        for path, _ in plan.files:
            here.out.line(f"  {path}")
        names = [path for path, _ in plan.files]
        here.out.result(
            {"ref": str(ref), "kind": plan.kind, "logical_bytes": plan.total_bytes, "files": names, "dry_run": True}
        )
        return
    start = time.monotonic()
    with here.open_store() as store:
        resembles = resolve(store, base).id if base else None
        commit = execute_add(store, plan, ref, here.out.progress, base=resembles, rehash=rehash, adopt=adopt)
    seconds = time.monotonic() - start
    here.out.result(
        {
            "ref": str(ref),
            "id": str(commit.id),
            "kind": plan.kind,
            "files": len(plan.files),
            "logical_bytes": commit.size,
            "new_bytes": commit.stored,
            "reused_bytes": commit.reused,
            "delta_bytes": commit.as_delta,
            "adopted_bytes": commit.adopted,
            "adopted": [
                {"file": str(item.path), "how": item.how, "size": item.size, "reason": item.reason or None}
                for item in commit.adoptions
            ],
            "unchanged": commit.unchanged,
            "skipped": [list(pair) for pair in plan.skipped],
            "seconds": round(seconds, 3),
        }
    )
    for text in _adopted(commit.adoptions):
        here.out.say(text)
    if commit.unchanged:
        here.out.line(f"{ref} has it already: @{commit.id.short}, {files}, {size(commit.size)}")
        return
    here.out.line(f"added {plan.kind} {ref} @{commit.id.short}: {files}, {size(commit.size)}")
    reused = f", {size(commit.reused)} was there already" if commit.reused else ""
    reused += f", {size(commit.as_delta)} kept as differences" if commit.as_delta else ""
    reused += f", {size(commit.adopted)} adopted" if commit.adopted else ""
    share = f" ({percent(commit.stored, commit.size)})" if commit.stored < commit.size else ""
    here.out.say(f"{size(commit.stored)} stored{share}{reused}, {duration(seconds)}")
    here.out.hint(f"llmos show {ref}")


def _place(here: "Session", path: Path) -> Path:
    """What is to be added: ollama:NAME is looked up where ollama keeps its models."""
    from llmos_cli.store.intake.ollama import SCHEME, find_ollama

    if not str(path).startswith(SCHEME) or path.exists():
        return path
    usual = [here.home / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]
    return find_ollama(str(path), [Path(here.ollama_models)] if here.ollama_models else usual)


def _adopted(adoptions: "Sequence[Adoption]") -> Iterator[str]:
    """What was done with each file, in words; small ones and those that were there already are counted."""
    from llmos_cli.store.intake.adopt import COPY, KNOWN, MIN_BYTES, REFLINK

    small = [item for item in adoptions if item.how == COPY and item.size < MIN_BYTES]
    known = [item for item in adoptions if item.how == KNOWN]
    for item in adoptions:
        if item in small or item in known:
            continue
        if item.how == COPY:
            yield f"{item.path}: copied, since {item.reason}"
        elif item.how == REFLINK:
            yield f"{item.path}: shared by reflink, {size(item.size)}; the file stays yours to change"
        else:
            state = "now read-only" if item.read_only else "read-only as before"
            yield f"{item.path}: linked, {size(item.size)}; it is {state}, change a copy of it"
    if known and len(known) < len(adoptions):
        yield f"{plural(len(known), 'file')} that the store had already: nothing to do"
    if small:
        yield f"{plural(len(small), 'file')} below {size(MIN_BYTES)}: copied"

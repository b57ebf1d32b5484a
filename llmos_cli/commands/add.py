"""`llmos add`: keep files in the store."""

import time
from pathlib import Path
from typing import Annotated

import typer

from llmos_cli.ui.session import session
from llmos_cli.ui.text import duration, percent, plural, size


def add(
    ctx: typer.Context,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files or one folder.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The ref to move, NAME or NAME:TAG.", show_default=False)],
    *,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="REF", help="The model these weights came from.  [default: found by itself]"),
    ] = None,
    rehash: Annotated[bool, typer.Option("--rehash", help="Read files again that seem untouched.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be added.")] = False,
) -> None:
    """Keep a file, several files or a folder under a name.

    A folder with config.json and *.safetensors is kept as a model, one with a tokenizer.json as a tokenizer. What the
    store already holds is not stored again; of a fine-tune, or the next version of a model, only the difference is. A
    file that has not been touched since it was added is not read again. Links and pipes inside a folder are left out,
    with a warning.

    Examples:
      llmos add ~/models/llama base
      llmos add notes.txt data.jsonl raw:2026-11
      llmos add ~/models/llama-chat chat --base base
      llmos add model.safetensors weights --json
    """
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.store.add import execute_add, plan_add
    from llmos_cli.store.resolve import resolve

    here = session(ctx)
    ref = parse_ref(name)
    plan = plan_add(paths)
    files = plural(len(plan.files), "file")
    if dry_run:
        for skipped, reason in plan.skipped:
            here.out.warn(f"would skip {skipped}: {reason}")
        here.out.line(f"would add {files}, {size(plan.total_bytes)}, as {plan.kind} {ref}")
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
        commit = execute_add(store, plan, ref, here.out.progress, base=resembles, rehash=rehash)
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
            "unchanged": commit.unchanged,
            "skipped": [list(pair) for pair in plan.skipped],
            "seconds": round(seconds, 3),
        }
    )
    if commit.unchanged:
        here.out.line(f"{ref} has it already: @{commit.id.short}, {files}, {size(commit.size)}")
        return
    here.out.line(f"added {plan.kind} {ref} @{commit.id.short}: {files}, {size(commit.size)}")
    reused = f", {size(commit.reused)} was there already" if commit.reused else ""
    reused += f", {size(commit.as_delta)} kept as differences" if commit.as_delta else ""
    share = f" ({percent(commit.stored, commit.size)})" if commit.stored < commit.size else ""
    here.out.say(f"{size(commit.stored)} stored{share}{reused}, {duration(seconds)}")
    here.out.hint(f"llmos show {ref}")

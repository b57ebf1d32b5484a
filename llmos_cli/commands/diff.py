"""`llmos diff`: what differs between two objects.

With --json, one object. A status is equal, changed, added or removed; null is what there is not.
  old, new        ref, remote (null: in this store), id, kind, size
  same            whether they are one object
  shared_bytes    bytes of the new one that lie in chunks of the old one
  summary         tensors, tensor_bytes and files by status; values {compared, changed} (null: a side is at
                  a remote, or they are datasets: not read); distance of what changed
  tensors         name, status, old and new {file, dtype, shape, size}, distance
  files           path, status, old_size, new_size, changes (JSON files), changes_total, lines {added, removed}
  meta, recipe    changes
  documents       of two datasets: problem (why they are not compared), splits by name {equal, added, removed,
                  examples_added, examples_removed}, as llmos show --sample has them
A distance: values, changed, bits, largest, mean, relative (L2), cosine, infinite {old, new}.
A change: path, status, old, new; `cut` if a long value stands there as a shortened text. At most 1000 are listed.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.ui.comparison import STATUSES, DiffPage, summary_facts
from llmos_cli.ui.datasets import SHOWN_EXAMPLES, documents_diff_json, show_documents_diff
from llmos_cli.ui.facts import fact_lines, json_text
from llmos_cli.ui.session import session
from llmos_cli.ui.text import shorten

if TYPE_CHECKING:
    from llmos_cli.remote.exchange.anywhere import Found
    from llmos_cli.store.inspect.census import Tensor
    from llmos_cli.store.inspect.changes import Changes
    from llmos_cli.store.inspect.diff import Comparison
    from llmos_cli.store.inspect.distance import Distance

CUT_JSON = 500
ALL_DOCUMENTS = 1000


def diff(
    ctx: typer.Context,
    old: Annotated[str, typer.Argument(metavar="[REMOTE/]OLD_REF", help="What it was.", show_default=False)],
    new: Annotated[str, typer.Argument(metavar="[REMOTE/]NEW_REF", help="What it is now.", show_default=False)],
    *,
    everything: Annotated[bool, typer.Option("--all", help="List all that differs, not only a screenful.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if they differ.")] = False,
) -> None:
    """Compare two objects: tensors, files, settings, how they were made.

    Tensors are compared by name, in whatever files they lie; what is equal is known without reading it. VALUES is the
    share of values that differ, L2 the length of the whole change over that of the old values, LARGEST and MEAN the
    absolute change of one value, BITS how many of its bits differ on average. What changed most stands first.

    Of two datasets it is told which documents came and went, whatever their order and however they are packed.

    If a side is REMOTE/REF, nothing is pulled: which tensors differ is told, not how far they moved.

    Examples:
      llmos diff base tuned
      llmos diff tiny~1 tiny --all
      llmos diff tiny nas/tiny
      llmos diff base tuned --json | jq '.summary.distance.relative'
    """
    from llmos_cli.remote.exchange.anywhere import resolve_anywhere
    from llmos_cli.store.inspect.diff import compare
    from llmos_cli.store.packs.objects import read_manifest

    here = session(ctx)
    with here.open_store() as store:
        sources = resolve_anywhere(store, old, here.cwd), resolve_anywhere(store, new, here.cwd)
        far = any(source.remote for source in sources)
        datasets = all(read_manifest(store, source.id).kind == "dataset" for source in sources)
        found = compare(store, sources[0].id, sources[1].id, here.out.progress, measure=not far and not datasets)
        documents = None
        if datasets and not far:
            from llmos_cli.data.documents import compare_documents

            shown = ALL_DOCUMENTS if everything else SHOWN_EXAMPLES
            documents = compare_documents(store, found.old, found.new, shown=shown)
    same = sources[0].id == sources[1].id
    for problem in found.problems:
        here.out.warn(problem)
    told = {} if documents is None else {"documents": documents_diff_json(documents)}
    here.out.result(_as_json(sources, found) | told)
    here.out.line(" -> ".join(f"{source.label} @{source.id.short}" for source in sources))
    if same:
        here.out.line("  the same object")
    else:
        page = replace(found, tensors=replace(found.tensors, tensors=())) if datasets else found
        for line in fact_lines(summary_facts(page)):
            here.out.line(line)
        if documents is not None:
            show_documents_diff(here.out, documents)
        DiffPage(here.out, everything).show(page)
        if far and page.tensors.overall is None and any(tensor.status == "changed" for tensor in page.tensors.tensors):
            here.out.say("how far tensors moved is measured where both are here: llmos pull")
    if exit_code and not same:
        raise typer.Exit(1)


def _as_json(sources: "tuple[Found, Found]", found: "Comparison") -> dict[str, Any]:
    sides = zip(("old", "new"), sources, (found.old, found.new), strict=True)
    tensors = found.tensors.tensors
    return {
        **{
            side: {
                "ref": source.local_label,
                "remote": source.remote,
                "id": str(source.id),
                "kind": manifest.kind,
                "size": manifest.size,
            }
            for side, source, manifest in sides
        },
        "same": sources[0].id == sources[1].id,
        "shared_bytes": found.shared,
        "summary": {
            "tensors": _by_status(tensors, lambda _: 1),
            "tensor_bytes": _by_status(tensors, lambda tensor: tensor.size),
            "files": _by_status(found.files, lambda _: 1),
            "values": None
            if any(source.remote for source in sources) or found.old.kind == found.new.kind == "dataset"
            else {"compared": found.tensors.words, "changed": found.tensors.changed},
            "distance": _distance_json(found.tensors.overall),
        },
        "tensors": [
            {
                "name": tensor.name,
                "status": tensor.status,
                "old": _tensor_json(tensor.old),
                "new": _tensor_json(tensor.new),
                "distance": _distance_json(tensor.distance),
            }
            for tensor in tensors
        ],
        "files": [
            {
                "path": file.path,
                "status": file.status,
                "old_size": file.old,
                "new_size": file.new,
                "changes": _changes_json(file.values) if file.values else None,
                "changes_total": file.values.count if file.values else None,
                "lines": {"added": file.lines.added, "removed": file.lines.removed} if file.lines else None,
            }
            for file in found.files
        ],
        "meta": _changes_json(found.meta),
        "recipe": _changes_json(found.recipe),
    }


def _by_status(items: Iterable[Any], weigh: Callable[[Any], int]) -> dict[str, int]:
    total = dict.fromkeys(STATUSES, 0)
    for item in items:
        total[item.status] += weigh(item)
    return total


def _tensor_json(tensor: "Tensor | None") -> dict[str, Any] | None:
    if tensor is None:
        return None
    info = tensor.info
    return {"file": tensor.file.path, "dtype": info.dtype, "shape": list(info.shape), "size": tensor.size}


def _distance_json(found: "Distance | None") -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "values": found.compared,
        "changed": found.changed,
        "bits": found.bits,
        "largest": found.largest,
        "mean": found.mean,
        "relative": found.relative,
        "cosine": found.cosine,
        "infinite": {"old": found.infinite[0], "new": found.infinite[1]},
    }


def _changes_json(changes: "Changes") -> list[dict[str, Any]]:
    from llmos_cli.store.inspect.changes import ABSENT

    result = []
    for change in changes.items:
        item: dict[str, Any] = {"path": change.path, "status": change.status}
        for side, value in (("old", change.old), ("new", change.new)):
            if value is ABSENT:
                continue
            text = json_text(value)
            if len(text) > CUT_JSON:
                item |= {side: shorten(text, CUT_JSON), "cut": True}
            else:
                item[side] = value
        result.append(item)
    return result

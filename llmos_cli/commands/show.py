"""`llmos show`: everything about one object."""

import posixpath
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos_cli.errors import NotFound, UsageError
from llmos_cli.ui.datasets import DATASET_FACTS, document_json, show_documents, show_splits
from llmos_cli.ui.facts import fact_lines, json_text
from llmos_cli.ui.output import Output
from llmos_cli.ui.session import session
from llmos_cli.ui.signers import signer_json, signer_text
from llmos_cli.ui.text import count, percent, plural, safe_line, shorten, size

if TYPE_CHECKING:
    from llmos_cli.data.documents import Document
    from llmos_cli.formats.manifest import Manifest
    from llmos_cli.store.handle import Store
    from llmos_cli.store.inspect.census import Census, Footprint, Tensor

SHOWN_FILES = 10
SHOWN_SOURCES = 3
NARROW_COLUMNS = 80  # below this, names of tensors need all the room there is
TRAINING = "training/"  # a checkpoint's state beside its model


def show(
    ctx: typer.Context,
    ref: Annotated[
        str, typer.Argument(metavar="[REMOTE/]REF", help="What to show, here or there.", show_default=False)
    ],
    *,
    files: Annotated[bool, typer.Option("--files", help="List every file.")] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor: dtype, shape, bytes, and as stored.")
    ] = False,
    sha256: Annotated[
        bool, typer.Option("--sha256", help="List the SHA-256 of every file, as sha256sum does.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", min=1, help="Print N of a dataset's documents.")
    ] = None,
    document: Annotated[
        int | None, typer.Option("--document", metavar="K", min=0, help="Print one document, by its number.")
    ] = None,
    split: Annotated[str, typer.Option("--split", metavar="SPLIT", help="Whose documents.")] = "train",
) -> None:
    """Show an object: kind, size, tensors, how it was made, its files.

    With --tensors, STORED is what a tensor takes in the store and CODEC how it is stored there. With --sha256, files
    are read once to be hashed, and the digests are kept: the next time they are there at once.

    Of a dataset, --sample and --document print documents as their tokens read, each with the file, the byte and the
    record that it came from.

    REMOTE/REF is looked at where it is: only the manifest and the tensors' headers are fetched, and nothing is kept.

    Examples:
      llmos show tiny
      llmos show web --files
      llmos show tiny --tensors
      llmos show tiny --sha256 | (cd tiny-folder && sha256sum -c)
      llmos show @3f2a9c01 --json
      llmos show web --sample 3
      llmos show web --document 1041 --split valid
      llmos show nas/tiny:v1 --tensors
    """
    from llmos_cli.remote.exchange.anywhere import resolve_anywhere, resolve_streamed, signers_of, split_remote
    from llmos_cli.store.inspect.census import footprints, take_census
    from llmos_cli.store.inspect.digests import sha256_files
    from llmos_cli.store.packs.objects import read_manifest
    from llmos_cli.store.refs.lineage import describe_recipe, ref_labels

    here = session(ctx)
    if sha256 and (parts := split_remote(ref)):
        raise UsageError("--sha256 reads every byte, and those are not here", hint=f"llmos pull {parts[0]} {parts[1]}")
    with here.open_store() as store:
        looks_inside = sample is not None or document is not None
        source = resolve_streamed(store, ref) if looks_inside else resolve_anywhere(store, ref, here.cwd)
        manifest = read_manifest(store, source.id)
        made_from = manifest.recipe.inputs.values() if manifest.recipe else ()
        labels = ref_labels(store, [source.id, *made_from])
        census = take_census(store, manifest)
        if tensors and not census.tensors and not census.problems:
            raise NotFound(f"{source.label} has no tensors", hint=f"see its files: llmos show {ref} --files")
        stored = footprints(store, census.tensors) if tensors else []
        signed = signers_of(store, source)
        digests = sha256_files(store, manifest.files, here.out.progress) if sha256 else {}
        documents = _documents(store, manifest, sample, document, split)
    for problem in census.problems:
        here.out.warn(problem)
    counts = _tensor_counts(census)
    listed = [_tensor_json(*pair) for pair in zip(census.tensors, stored, strict=True)] if tensors else None
    recipe = manifest.recipe
    here.out.result(
        {
            "id": str(source.id),
            "ref": source.local_label,
            "remote": source.remote,
            "refs": list(labels.get(source.id, ())),
            "kind": manifest.kind,
            "size": manifest.size,
            "tensors": counts and counts | ({} if listed is None else {"list": listed}),
            "meta": manifest.meta,
            "recipe": describe_recipe(recipe) if recipe else None,
            "signed": [signer_json(item) for item in signed],
            "files": [
                {"path": entry.path, "size": entry.size} | ({"sha256": digests[entry.path]} if sha256 else {})
                for entry in manifest.files
            ],
        }
        | ({} if documents is None else {"documents": [document_json(item) for item in documents]})
    )
    if tensors:
        _tensor_table(here.out, census.tensors, stored)
    if sha256:
        for entry in manifest.files:
            here.out.line(f"{digests[entry.path]}  {entry.path}")
    if documents is not None:
        show_documents(here.out, documents, whole=document is not None)
    if tensors or sha256 or documents is not None:
        return
    facts = [
        ("id", str(source.id)),
        ("kind", manifest.kind),
        ("size", f"{size(manifest.size)} in {plural(len(manifest.files), 'file')}"),
    ]
    if counts:
        dtypes = ", ".join(plural(number, f"{dtype} tensor") for dtype, number in counts["dtypes"].items())
        facts.append(("tensors", f"{count(counts['parameters'])} values in {dtypes}"))
    others = [label for label in labels.get(source.id, ()) if label != source.label]
    if others:
        facts.append(("also", ", ".join(others)))
    facts += [("signed by", signer_text(item)) for item in signed]
    if recipe:
        facts.append(("made by", recipe.command if recipe.seed is None else f"{recipe.command}, seed {recipe.seed}"))
        for role, oid in sorted(recipe.inputs.items()):
            facts.append(("  " + role, " ".join([*labels.get(oid, ())[:1], f"@{oid.short}"])))
        if recipe.sources:
            names = ", ".join(f"{source.name} @{source.id.short}" for source in recipe.sources[:SHOWN_SOURCES])
            more = ", ..." if len(recipe.sources) > SHOWN_SOURCES else ""
            total = size(sum(source.size for source in recipe.sources))
            facts.append(("  sources", f"{plural(len(recipe.sources), 'file')}, {total}: {names}{more}"))
        facts += [("  " + key, _value(value)) for key, value in sorted(recipe.params.items())]
        if recipe.tools:
            facts.append(("  tools", ", ".join(f"{name} {version}" for name, version in sorted(recipe.tools.items()))))
    here.out.line(source.label)
    _lines(here.out, facts)
    drawn = DATASET_FACTS if manifest.kind == "dataset" and manifest.meta.keys() & {"mix", "splits"} else frozenset()
    meta = {key: value for key, value in sorted(manifest.meta.items()) if key not in drawn}
    if meta:
        here.out.line("facts")
        _lines(here.out, [(key, _value(value)) for key, value in meta.items()])
    if drawn:
        show_splits(here.out, manifest.meta)
    shown = manifest.files if files else manifest.files[:SHOWN_FILES]
    here.out.line("files")
    for entry in shown:
        here.out.line(f"  {size(entry.size):>8}  {safe_line(entry.path)}")
    if len(shown) < len(manifest.files):
        here.out.line(f"  and {count(len(manifest.files) - len(shown))} more (--files lists them)")


def _documents(
    store: "Store", manifest: "Manifest", sample: int | None, document: int | None, split: str
) -> "list[Document] | None":
    """The documents that were asked for; None if none were."""
    if sample is None and document is None:
        return None
    if sample is not None and document is not None:
        raise UsageError("--sample and --document exclude each other")
    from llmos_cli.data.documents import find_document, sample_documents

    if document is not None:
        return [find_document(store, manifest, document, split=split)]
    return sample_documents(store, manifest, sample or 1, split=split)


def _tensor_counts(census: "Census") -> dict[str, Any] | None:
    """How many tensors of which dtype, and how many values they have; None where there are none."""
    from math import prod

    dtypes: dict[str, int] = {}
    parameters = 0
    for tensor in census.tensors:
        if not tensor.file.path.startswith(TRAINING):
            dtypes[tensor.info.dtype] = dtypes.get(tensor.info.dtype, 0) + 1
            parameters += prod(tensor.info.shape)
    if not dtypes:
        return None
    return {"count": sum(dtypes.values()), "parameters": parameters, "dtypes": dict(sorted(dtypes.items()))}


def _tensor_table(out: Output, tensors: "Sequence[Tensor]", stored: "Sequence[Footprint]") -> None:
    several = len({posixpath.dirname(tensor.file.path) for tensor in tensors}) > 1
    rows = [
        [
            posixpath.join(posixpath.dirname(tensor.file.path), tensor.info.name) if several else tensor.info.name,
            tensor.info.dtype,
            f"[{','.join(map(str, tensor.info.shape))}]",
            size(tensor.size),
            size(footprint.stored),
            _codecs(footprint),
        ]
        for tensor, footprint in zip(tensors, stored, strict=True)
    ]
    spare = {1, 2} if out.width < NARROW_COLUMNS else ()
    out.table(["tensor", "dtype", "shape", "size", "stored", "codec"], rows, right={3, 4}, spare=spare)
    plain, kept = sum(tensor.size for tensor in tensors), sum(footprint.stored for footprint in stored)
    out.line(f"{plural(len(tensors), 'tensor')}, {size(plain)} stored in {size(kept)} ({percent(kept, plain)})")


def _codecs(footprint: "Footprint") -> str:
    """How a tensor is stored: "planes", or "planes 75%, raw 25%" of its bytes."""
    total = sum(footprint.codecs.values())
    parts = sorted(footprint.codecs.items(), key=lambda item: -item[1])
    if len(parts) < 2:
        return parts[0][0] if parts else "-"
    return ", ".join(f"{name} {100 * part / total:.0f}%" for name, part in parts)


def _tensor_json(tensor: "Tensor", footprint: "Footprint") -> dict[str, Any]:
    info = tensor.info
    return {
        "name": info.name,
        "file": tensor.file.path,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "size": tensor.size,
        "stored": footprint.stored,
        "codecs": footprint.codecs,
    }


def _lines(out: Output, facts: list[tuple[str, str]]) -> None:
    for line in fact_lines(facts):
        out.line(line)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, Mapping | list):
        return shorten(json_text(value), 200)
    return f"{value:,}" if isinstance(value, int) else str(value)

"""Bringing files into the store: what is to be added and as what, then adding it."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from llmos_cli.errors import Damaged, Unsafe, UsageError, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import FileEntry, Manifest, Recipe
from llmos_cli.formats.names import RefName, check_paths
from llmos_cli.formats.safetensors import read_shard_index
from llmos_cli.formats.tensors import find_tensors
from llmos_cli.progress import Progress
from llmos_cli.store.handle import Store
from llmos_cli.store.intake.bases import Base, NewFile, find_base, open_base
from llmos_cli.store.intake.hfcache import cached_file, snapshot_folder
from llmos_cli.store.intake.ingest import check_unchanged, reader, status_of
from llmos_cli.store.intake.ollama import models_folder, read_ollama
from llmos_cli.store.intake.proof import require_digest
from llmos_cli.store.intake.statcache import recall
from llmos_cli.store.transaction import Commit, Transaction, begin


@dataclass(frozen=True)
class AddPlan:
    """`files` are (name in the store, path); `skipped` are (path, reason): links, fifos and devices in a folder.
    `digests` are what files must have, by name, where they come from a store that names them so."""

    kind: str
    files: tuple[tuple[str, Path], ...]
    total_bytes: int
    skipped: tuple[tuple[str, str], ...]
    digests: Mapping[str, str] = field(default_factory=dict)


def plan_add(paths: Sequence[Path]) -> AddPlan:
    """Decide what `add` would store. A folder's files keep their paths inside it; single files keep their names. A path
    into the cache of Hugging Face's tools means a snapshot's files, a manifest of Ollama's the blobs it names.

    Raises NotFound, AccessDenied, UsageError (nothing to add) or Unsafe (a name no system can hold, or two that
    collide), before anything is read.
    """
    files: list[tuple[str, Path]] = []
    skipped: list[tuple[str, str]] = []
    digests: dict[str, str] = {}
    for given in paths:
        path = snapshot_folder(given)
        try:
            mode = path.stat().st_mode
        except OSError as exc:
            raise from_os_error(exc, f"looking at {path}") from exc
        if stat.S_ISDIR(mode):
            files.extend(_walk(path, skipped))
        elif stat.S_ISREG(mode) and (folder := models_folder(path)):
            model = read_ollama(path, folder)
            files += [(name, blob) for name, blob, _ in model.files]
            skipped += model.skipped
            digests |= {name: digest for name, _, digest in model.files}
        elif stat.S_ISREG(mode):
            files.append((path.name, path))
        else:
            raise Unsafe(f"{path} is not a regular file or folder")
    if not files:
        raise UsageError(f"nothing to add in {', '.join(str(path) for path in paths)}")
    files.sort()
    check_paths(name for name, _ in files)
    for _, path in files:
        if not os.access(path, os.R_OK):
            raise from_os_error(PermissionError(13, "Permission denied"), f"reading {path}")
    total = sum(path.stat().st_size for _, path in files)
    named = dict(files)
    kind = kind_of(named.keys(), lambda name: named[name].read_bytes())
    for name, path in files:
        digest = cached_file(path)[1] if path.is_symlink() else None
        if digest:
            digests[name] = digest
    return AddPlan(kind, tuple(files), total, tuple(skipped), digests)


def execute_add(
    store: Store,
    plan: AddPlan,
    ref: RefName,
    progress: Progress,
    *,
    base: ObjectId | None = None,
    rehash: bool = False,
    adopt: bool = False,
    kept: Sequence[FileEntry] = (),
    recipe: Callable[[Sequence[FileEntry]], Recipe] | None = None,
    message: str = "",
) -> Commit:
    """Store the planned files as one manifest under `ref`; with `adopt`, without a second copy where that can be.

    Tensors rest on the manifest `base`, or on whichever stored model they are found to resemble. `kept` are files that
    belong to it and are in the store already; `recipe` says, of all files, how they were made. Raises UsageError if
    `base` has no tensors, Damaged if a file does not have the digest it must have.
    """
    for path, reason in plan.skipped:
        progress.warn(f"skipped {path}: {reason}")
    with begin(store, purpose="adding", ref=ref, progress=progress, total=plan.total_bytes) as tx:
        tx.base = _explicit_base(store, base) if base else _find_base(tx, plan)
        added = tuple(_add(tx, name, path, plan.digests.get(name), rehash, adopt) for name, path in plan.files)
        entries = added + tuple(kept)
        count = f"{len(entries)} files" if len(entries) > 1 else entries[0].path
        manifest = Manifest(plan.kind, entries, recipe=recipe(entries) if recipe else None)
        return tx.commit(manifest, message=message or f"add {count}")


def _add(tx: Transaction, name: str, path: Path, digest: str | None, rehash: bool, adopt: bool) -> FileEntry:
    """Store a file; one that must have a digest is proven first, unless it was and has not been touched since."""
    before = status_of(path)
    if digest and (rehash or recall(tx.store, name, path) is None):
        require_digest(path, digest)
    entry = tx.add_path(name, path, rehash=rehash, adopt=adopt)
    if digest:
        check_unchanged(path, before, status_of(path))
    return entry


def _explicit_base(store: Store, oid: ObjectId) -> Base:
    base = open_base(store, oid)
    if base is None:
        raise UsageError(f"@{oid.short} has no tensors that could be a base", hint="llmos ls shows what is a model")
    return base


def _find_base(tx: Transaction, plan: AddPlan) -> Base | None:
    """Looked for among stored models, unless every file with tensors is known already."""
    fresh = []
    for name, path in plan.files:
        read = reader(path)
        tensors = find_tensors(name, read, status_of(path).st_size, str(path))
        if tensors and recall(tx.store, name, path) is None:
            fresh.append(NewFile(name, tensors, read))
    return find_base(tx.store, fresh, first=tx.expected) if fresh else None


def _walk(root: Path, skipped: list[tuple[str, str]], depth: int = 1) -> Iterator[tuple[str, Path]]:
    if depth > limits.PATH_DEPTH:
        raise Unsafe(f"{root} is nested deeper than {limits.PATH_DEPTH} folders")
    try:
        with os.scandir(root) as listing:
            children = sorted(listing, key=lambda child: child.name)
    except OSError as exc:
        raise from_os_error(exc, f"listing {root}") from exc
    for child in children:
        path = Path(child.path)
        if child.is_symlink():
            if cached_file(path)[0]:
                yield child.name, path
            else:
                skipped.append((str(path), "a symbolic link"))
        elif child.is_dir(follow_symlinks=False):
            if child.name in (".git", ".llmos", "__pycache__"):
                skipped.append((str(path), f"a {child.name} folder"))
                continue
            for name, found in _walk(path, skipped, depth + 1):
                yield f"{child.name}/{name}", found
        elif child.is_file(follow_symlinks=False):
            yield child.name, path
        else:
            skipped.append((str(path), "not a regular file"))


def kind_of(names: Set[str], read: Callable[[str], bytes]) -> str:
    """A Hugging Face model folder is a model; a tokenizer by itself a tokenizer; anything else files.

    Raises Damaged if the list of a model's shards names one that is not there.
    """
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        index = "model.safetensors.index.json"
        if index in names:
            missing = sorted(set(read_shard_index(read(index), index).values()) - names)
            if missing:
                raise Damaged(f"{index} names {missing[0]!r}, which is not in the folder")
        return "model"
    return "tokenizer" if "tokenizer.json" in names else "files"

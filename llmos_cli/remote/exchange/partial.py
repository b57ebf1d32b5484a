"""A part of what a remote has: some files, or some tensors, of one ref. Only the chunks of that part are fetched.

A part is an object of its own: a manifest of the chosen files, and of a safetensors file that has only the chosen
tensors, with a recipe that names the manifest it is a part of. So a manifest here is always whole. The chunks are those
of the whole, and a later pull of it fetches the rest.
"""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, Final

from llmos_cli.errors import Conflict, Damaged, NotFound, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import FileEntry, Manifest, Recipe
from llmos_cli.formats.names import RefName
from llmos_cli.formats.safetensors import read_table
from llmos_cli.formats.tensors import TensorInfo
from llmos_cli.progress import Progress
from llmos_cli.remote.exchange.pull import PullPlan, execute_pull, plan_chunks
from llmos_cli.remote.exchange.refs import read_remote_ref
from llmos_cli.remote.exchange.signed import check_signed, must_be_signed, read_remote_signatures
from llmos_cli.remote.exchange.view import View
from llmos_cli.store.handle import Store
from llmos_cli.store.inspect.census import Layout
from llmos_cli.store.intake.add import kind_of
from llmos_cli.store.leases import hold
from llmos_cli.store.packs.objects import FileReader, open_file, read_file, read_manifest
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.store.transaction import Tensor, Transaction, begin

_COMMAND: Final = "pull"
_WEIGHTS: Final = ".safetensors"
_NUMBER = re.compile(r"(?:\A|\.)([0-9]+)(?=\.|\Z)")


@dataclass(frozen=True)
class Selection:
    """What to take. `files` are patterns of whole files. The others choose tensors of the remaining safetensors files,
    and what all of them choose is taken: patterns of names, layers from and to, and a rank of so many."""

    files: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    layers: tuple[int, int] | None = None
    rank: tuple[int, int] | None = None

    @property
    def of_tensors(self) -> bool:
        return bool(self.tensors or self.layers or self.rank)

    @property
    def params(self) -> dict[str, Any]:
        """For a recipe: only what was asked for."""
        given = {
            "files": sorted(self.files),
            "tensors": sorted(self.tensors),
            "layers": "{}-{}".format(*self.layers) if self.layers else None,
            "rank": "{}/{}".format(*self.rank) if self.rank else None,
        }
        return {name: value for name, value in given.items() if value}

    def part_of(self, ref: RefName) -> RefName:
        """What a part of a ref is called unless somebody says otherwise."""
        suffix = "-{}-of-{}".format(*self.rank) if self.rank else "-part"
        return RefName(ref.name + suffix, ref.tag)


@dataclass(frozen=True)
class PartPlan:
    """`files` come whole, of others only some `tensors`. `current` is what `target` is now."""

    source: RefName
    source_id: ObjectId
    target: RefName
    current: ObjectId | None
    selection: Selection
    files: tuple[FileEntry, ...]
    tensors: tuple[tuple[FileEntry, tuple[TensorInfo, ...]], ...]
    pull: PullPlan

    @property
    def tensor_count(self) -> int:
        return sum(len(infos) for _, infos in self.tensors)


@dataclass(frozen=True)
class PartResult:
    """The part's manifest, whether its ref was that before, the bytes received, and chunks that were here already."""

    id: ObjectId
    unchanged: bool
    received: int
    reused: int


def plan_part(
    store: Store,
    view: View,
    ref: RefName,
    selection: Selection,
    target: RefName,
    *,
    force: bool,
    signed: bool = False,
) -> PartPlan:
    """Decide what to fetch; reads the manifest and, for tensors, the headers of files.

    Raises UsageError for a part that would be called as its whole is (a push would put it in the place of that),
    NotFound for a ref or a part that is not there, Conflict if `target` is here and no such part (unless
    `force`), Unsafe for a ref that should be signed and is not.
    """
    if target == ref:
        raise UsageError(f"a part of {ref} needs another name", hint=f"leave out --as: {selection.part_of(ref)}")
    seen = read_remote_ref(view.remote.transport, ref, store.progress)
    if seen.problem:
        raise seen.problem
    if seen.entry is None:
        raise NotFound(f"no ref {ref} at {view.label}", hint=f"list what is there: llmos ls {view.label}/")
    if signed or must_be_signed(store, view.remote):
        check_signed(store, view.remote, [(seen, read_remote_signatures(view.remote.transport, seen))])
    current = read_ref(store, target)
    if current and not force and not _is_part(store, current.id):
        raise Conflict(
            f"{target} is here, and is no part of something", hint="choose another name with --as, or use --force"
        )
    manifest = read_manifest(store, seen.entry.id)
    whole = tuple(entry for entry in manifest.files if _matches(entry.path, selection.files))
    if selection.files and not whole:
        raise NotFound(
            f"no file of {ref} matches {' or '.join(selection.files)}",
            hint=f"see its files: llmos show {view.label}/{ref} --files",
        )
    taken = {entry.path for entry in whole}
    tensors = _choose(store, [entry for entry in manifest.files if entry.path not in taken], selection)
    if selection.of_tensors and not tensors:
        raise NotFound(
            f"no tensor of {ref} in a safetensors file is chosen",
            hint=f"see its tensors: llmos show {view.label}/{ref} --tensors",
        )
    chunks = {chunk.id: chunk.size for entry in whole for chunk in entry.chunks}
    for entry, infos in tensors:
        layout = Layout(entry)
        chunks |= {run.id: run.chunk_size for info in infos for run in layout.runs(info.start, info.end)}
    pull = plan_chunks(store, view.remote.transport, view.catalog, chunks)
    held = current.id if current else None
    return PartPlan(ref, seen.entry.id, target, held, selection, whole, tensors, pull)


def execute_part(store: Store, view: View, plan: PartPlan, progress: Progress) -> PartResult:
    """Fetch what is missing, then make the part. Raises Damaged if the remote gives something wrong and has it nowhere
    else, Conflict if the ref moved meanwhile, NoSpace before anything is fetched."""
    purpose = f"pull a part from {view.label}"
    with hold(store, purpose, [], writes=True):
        pulled = execute_pull(store, view.remote, plan.pull, progress)
        store.elsewhere = ()  # from here on everything is here
        with begin(store, purpose=purpose, ref=plan.target) as tx:
            parts = [_put(store, tx, entry, infos) for entry, infos in plan.tensors]
            files = tuple(sorted([*plan.files, *parts], key=lambda entry: entry.path))
            recipe = Recipe(_COMMAND, plan.selection.params, {"source": plan.source_id})
            kind = "files" if parts else _kind(store, files)
            done = tx.commit(
                Manifest(kind, files, recipe=recipe), message=f"pulled a part of {plan.source} from {view.label}"
            )
    return PartResult(done.id, done.unchanged, pulled.received, pulled.reused)


def _choose(
    store: Store, entries: Sequence[FileEntry], selection: Selection
) -> tuple[tuple[FileEntry, tuple[TensorInfo, ...]], ...]:
    if not selection.of_tensors:
        return ()
    found = [
        (entry, info)
        for entry in entries
        if entry.path.endswith(_WEIGHTS)
        for info in read_table(open_file(store, entry).read, entry.size, entry.path)
        if _is_chosen(info.name, selection)
    ]
    if selection.rank:
        found = slice_of(found, *selection.rank)
    by_path = {entry.path: entry for entry, _ in found}
    groups = groupby(found, lambda pair: pair[0].path)
    return tuple((by_path[path], tuple(info for _, info in group)) for path, group in groups)


def slice_of(
    tensors: Sequence[tuple[FileEntry, TensorInfo]], rank: int, world: int
) -> list[tuple[FileEntry, TensorInfo]]:
    """The tensors of one rank: in the order of the files, cut into runs of about equal bytes. A tensor belongs to the
    run in which its middle lies, so that every tensor has exactly one rank."""
    total = sum(info.end - info.start for _, info in tensors)
    at, taken = 0, []
    for entry, info in tensors:
        size = info.end - info.start
        if min(world - 1, (2 * at + size) * world // max(1, 2 * total)) == rank:
            taken.append((entry, info))
        at += size
    return taken


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to: the first number among the parts of its name."""
    match = _NUMBER.search(name)
    return int(match[1]) if match else None


def _is_chosen(name: str, selection: Selection) -> bool:
    if selection.tensors and not any(fnmatchcase(name, pattern) for pattern in selection.tensors):
        return False
    if selection.layers is None:
        return True
    layer = layer_of(name)
    return layer is not None and selection.layers[0] <= layer <= selection.layers[1]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """A pattern without a slash is about the file's name, in whatever folder."""
    return any(fnmatchcase(path if "/" in pattern else posixpath.basename(path), pattern) for pattern in patterns)


def _put(store: Store, tx: Transaction, entry: FileEntry, infos: Sequence[TensorInfo]) -> FileEntry:
    reader = open_file(store, entry)
    return tx.add_tensors(entry.path, [_tensor(reader, info) for info in infos], metadata={"format": "pt"})


def _tensor(reader: FileReader, info: TensorInfo) -> Tensor:
    return Tensor(info.name, info.dtype, info.shape, lambda: reader.read(info.start, info.end))


def _kind(store: Store, files: Sequence[FileEntry]) -> str:
    by_path = {entry.path: entry for entry in files}
    try:
        return kind_of(by_path.keys(), lambda path: read_file(store, by_path[path]))
    except Damaged:
        return "files"  # a model that lacks some of its shards


def _is_part(store: Store, oid: ObjectId) -> bool:
    recipe = read_manifest(store, oid).recipe
    return recipe is not None and recipe.command == _COMMAND and "source" in recipe.inputs

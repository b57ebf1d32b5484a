"""Bringing back what lies in the trash: removed refs with their logs, and packs. Never over a ref that lives."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmos_cli.errors import Conflict, LlmosError, NoSpace, NotFound, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName
from llmos_cli.store.disk import durable
from llmos_cli.store.gc.reach import objects_of
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.packs.packs import list_packs, read_pack, restore_pack, secure
from llmos_cli.store.refs.point import confirm
from llmos_cli.store.refs.refs import RefEntry, read_ref, read_removed

_PREFIX = "ref-"


@dataclass(frozen=True)
class Removed:
    """A ref in the trash: its last value, when it was removed (a Unix time), and where it lies."""

    entry: RefEntry
    time: float
    path: Path

    @property
    def ref(self) -> RefName:
        return self.entry.ref


@dataclass(frozen=True)
class UndeletePlan:
    """`refs` come back; `kept` stay in the trash, each with why; `packs` come back too unless refs were named."""

    refs: tuple[Removed, ...]
    kept: tuple[tuple[Removed, str], ...]
    packs: tuple[tuple[ObjectId, Path], ...]


@dataclass(frozen=True)
class UndeleteResult:
    """The refs that are back, those that could not be brought back with why, and how many packs left the trash."""

    refs: tuple[Removed, ...]
    failed: tuple[tuple[Removed, LlmosError], ...]
    packs: int


def removed_refs(store: Store) -> list[Removed]:
    """The refs in the trash that can be read, those removed last first."""
    found = []
    for path in store.trash.glob(f"{_PREFIX}*"):
        for ref in _names(path.name):
            with contextlib.suppress(LlmosError, FileNotFoundError):
                entry = read_removed(path, ref)
                if entry:
                    found.append(Removed(entry, path.stat().st_mtime, path))
                    break
    return sorted(found, key=lambda removed: (-removed.time, removed.path))


def plan_undelete(store: Store, refs: Sequence[RefName] = ()) -> UndeletePlan:
    """What would come back: these refs, or everything. Raises NotFound for one that is not in the trash, Conflict for
    one that lives."""
    removed = removed_refs(store)
    for ref in refs:
        if not any(item.ref == ref for item in removed):
            raise NotFound(f"no ref {ref} in the trash", hint="see what is there: llmos gc --undelete --dry-run")
    back: dict[RefName, Removed] = {}
    kept = []
    for item in removed:
        if refs and item.ref not in refs:
            continue
        if item.ref in back:
            kept.append((item, "it was removed again later"))
        elif _lives(store, item.ref):
            if refs:
                raise Conflict(
                    f"there is a ref {item.ref}: it is not overwritten",
                    hint=f"give the removed one another name: llmos tag @{item.entry.id.short} NAME:TAG",
                )
            kept.append((item, "there is such a ref"))
        else:
            back[item.ref] = item
    packs = () if refs else tuple(list_packs(store.trash).items())
    return UndeletePlan(tuple(back.values()), tuple(kept), packs)


def execute_undelete(store: Store, plan: UndeletePlan) -> UndeleteResult:
    """Carry out a plan. A ref comes back only with everything it needs; what cannot is reported, and stays."""
    done, failed = [], []
    before = len(list_packs(store.trash))
    for item in plan.refs:
        try:
            _bring_back(store, item)
            done.append(item)
        except NoSpace:
            raise
        except LlmosError as exc:
            failed.append((item, exc))
    for name, path in plan.packs:
        with contextlib.suppress(NotFound):
            restore_pack(store, name, path, read_pack(path))
    return UndeleteResult(tuple(done), tuple(failed), max(0, before - len(list_packs(store.trash))))


def _bring_back(store: Store, item: Removed) -> None:
    """First all that the ref needs, then the ref, as whoever points a ref does."""
    oid, ref = item.entry.id, item.ref
    with hold(store, f"bringing back {ref}", [], writes=True):
        objects = set(objects_of(oid, read_manifest(store, oid)))
        needed = objects | store.index.bases(objects)
        packs = secure(store, needed, fresh=frozenset())
        target = store.refs / ref.name / ref.tag
        durable.make_folder(target.parent)
        if _lives(store, ref):
            raise Conflict(f"there is a ref {ref}: it is not overwritten")
        if not durable.move(item.path, target):  # which does not replace a folder that has anything in it
            raise NotFound(f"ref {ref} is no longer in the trash")
        try:
            confirm(store, needed, packs, ())
        except LlmosError:
            durable.move(target, item.path)
            raise


def _lives(store: Store, ref: RefName) -> bool:
    """A ref whose moves cannot be read is in the way as well."""
    try:
        return read_ref(store, ref) is not None
    except LlmosError:
        return True


def _names(folder: str) -> list[RefName]:
    """What refs a folder `ref-NAME-TAG-UNIQUE` may be of: both parts may have dashes."""
    parts = folder.removeprefix(_PREFIX).split("-")[:-1]
    found = []
    for at in range(1, len(parts)):
        with contextlib.suppress(UsageError):
            found.append(RefName("-".join(parts[:at]), "-".join(parts[at:])))
    return found

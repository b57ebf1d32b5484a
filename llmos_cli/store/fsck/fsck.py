"""Checking the store: every invariant, every byte, in words that name the object and the refs it hurts.

Reports, and repairs nothing but the index, which is a cache. A damaged copy of an object no longer counts as stored, so
adding or pulling it again brings it back; damage that hurts no ref is a note, not a problem.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmos_cli.formats.ids import ObjectId
from llmos_cli.progress import Progress
from llmos_cli.store.fsck.settings import CONFIG_FILE, is_as_written
from llmos_cli.store.fsck.survey import DamagedPack, Survey
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.packs import Sync, sync_index
from llmos_cli.store.refs.moves import RefLog, kept_since, unix_time


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where (a pack, an object, a ref), the refs it hurts and, unless it is about one of
    these, the objects that are meant."""

    what: str
    where: str
    referrers: tuple[str, ...] = ()
    objects: tuple[ObjectId, ...] = ()


@dataclass(frozen=True)
class FsckReport:
    """`packs`, `objects`, `bytes` are what was looked at; with `quick` the bytes of payloads were not read. `notes` are
    about damage that hurts no ref."""

    problems: tuple[Problem, ...]
    packs: int
    objects: int
    bytes: int
    quick: bool
    notes: tuple[Problem, ...] = ()


def check(store: Store, *, quick: bool, progress: Progress) -> FsckReport:
    """Check structure (`quick`) or every id, checksum and pack name as well; never raises for damage, it lists it."""
    survey = Survey(store, quick=quick, progress=progress)
    survey.look()
    return report(survey)


def report(survey: Survey) -> FsckReport:
    """Put what a survey found into words."""
    problems: list[Problem] = [Problem(fault.what, fault.where, fault.refs) for fault in survey.faults]
    notes: list[Problem] = []
    for pack in survey.damaged.values():
        for problem, hurts in _in_pack(survey, pack):
            (problems if hurts else notes).append(problem)
    problems += _missing(survey)
    for log in survey.logs.values():
        for problem, hurts in _in_log(survey, log):
            (problems if hurts else notes).append(problem)
    problems += _refs(survey)
    if not is_as_written(survey.store.root):
        what = "is not as llmos wrote it: somebody edited it, or it has rotted (without its last line this note ends)"
        notes.append(Problem(what, CONFIG_FILE))
    return FsckReport(
        tuple(dict.fromkeys(problems)),
        len(survey.packs),
        sum(count for _, count in survey.packs.values()),
        sum(size for size, _ in survey.packs.values()),
        survey.quick,
        tuple(dict.fromkeys(notes)),
    )


@dataclass(frozen=True)
class ReindexResult:
    packs: int
    damaged: tuple[str, ...]


def reindex(store: Store) -> ReindexResult:
    """Throw the index away and build it from the packs alone."""
    store.index.reset()
    done: Sync = sync_index(store)
    store.index.mark_complete()
    return ReindexResult(done.packs, tuple(message for _, message in done.damaged))


def needs_of(survey: Survey, pack: DamagedPack) -> tuple[ObjectId, ...]:
    """What refs need of all that a damaged pack is known to have held."""
    return tuple(sorted(oid for oid in pack.held if survey.refs_of(oid)))


def lost_from(survey: Survey, pack: DamagedPack) -> set[ObjectId]:
    """What refs need of it and cannot be read any more."""
    return {oid for oid in needs_of(survey, pack) if oid in survey.roots or oid not in survey.readable}


def only_in(survey: Survey, pack: DamagedPack) -> set[ObjectId]:
    """What refs need, stands in it, and is nowhere else."""
    return {entry.id for entry in pack.whole if survey.refs_of(entry.id) and not survey.is_elsewhere(entry)}


def _in_pack(survey: Survey, pack: DamagedPack) -> Iterator[tuple[Problem, bool]]:
    """What to say of a damaged pack, and whether it hurts."""
    where = f"pack {pack.name.short}"
    needed = needs_of(survey, pack)
    lost = lost_from(survey, pack)
    if not (lost or only_in(survey, pack)) and (pack.held or not survey.roots):
        what = pack.problem or next(iter(pack.failures.values()))
        yield Problem(f"{what}; nothing in it is needed any more: gc will remove it", where), False
        return
    if pack.problem:
        yield Problem(pack.problem, where, refs_of(survey, needed), needed), True
    for oid, why_not in pack.failures.items():
        name, what = f"object {oid.short} in {where}", _without_name(why_not, oid)
        if oid in lost:
            yield Problem(what, name, survey.refs_of(oid), (oid,)), True
        else:
            why = "another copy of it is whole" if oid in needed else "nothing needs it"
            yield Problem(f"{what}; {why}", name, (), (oid,)), False


def _missing(survey: Survey) -> Iterator[Problem]:
    """What is not there at all, by the pack it was in or by itself."""
    named = {oid for pack in survey.damaged.values() for oid in pack.failures}
    lacking = survey.lacking()
    for name, held in survey.absent.items():
        lost = held & (survey.roots | lacking)
        if lost:
            what = f"its file is missing, and with it {len(lost)} objects"
            yield Problem(what, f"pack {name.short}", refs_of(survey, lost), tuple(sorted(lost)))
            named |= lost
    for oid in sorted(survey.roots - named):
        yield Problem(
            _without_name(survey.unread.get(oid, "is missing"), oid), f"object {oid.short}", survey.refs_of(oid), (oid,)
        )


def _without_name(what: str, oid: ObjectId) -> str:
    return what.removeprefix(f"object {oid.short}").removeprefix(":").strip()


def _refs(survey: Survey) -> Iterator[Problem]:
    """The refs that are hurt, each once."""
    lacking = survey.lacking()
    without = {label: oid for oid in lacking for label in survey.labels.get(oid, ())}
    numbers = Counter(ref for oid in lacking for ref in survey.direct_refs_of(oid))
    for ref, count in sorted(numbers.items()):
        what = f"{count} of its objects are missing or damaged"
        if ref in without:
            what = f"its manifest, object {without[ref].short}, is missing or damaged"
        yield Problem(what, f"ref {ref}", (ref,))


def _in_log(survey: Survey, log: RefLog) -> Iterator[tuple[Problem, bool]]:
    """What to say of the damaged moves of a ref, and whether they hurt."""
    since = kept_since(survey.store)
    for move in log.damaged:
        what = move.why.removeprefix(f"{move.where} ")
        if move.is_bypassed or (move.later and unix_time(move.later.time) < since):
            yield Problem(f"{what}; the ref has moved on since", move.where), False
        elif move.later:
            was = f"; it pointed to @{move.later.previous.short}" if move.later.previous else ""
            yield Problem(f"{what}{was}", move.where, (str(log.ref),)), True
        else:
            using = f"using move {log.value.sequence}, @{log.value.id.short}" if log.value else "no other value is left"
            yield Problem(f"{what}; {using}", move.where, (str(log.ref),)), True


def refs_of(survey: Survey, objects: Iterable[ObjectId]) -> tuple[str, ...]:
    """The refs that need any of some objects."""
    return tuple(sorted({ref for oid in objects for ref in survey.refs_of(oid)}))

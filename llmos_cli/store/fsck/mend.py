"""Repairs for which the store itself has what is needed. Nothing is deleted: a damaged pack stays where it is, and a gc
takes it once nothing in it is needed.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass

from llmos_cli.errors import Damaged
from llmos_cli.formats.frame import check_payload, encode_header
from llmos_cli.formats.ids import ObjectId
from llmos_cli.store.fsck.survey import DamagedPack, Survey
from llmos_cli.store.fsck.verify import verify
from llmos_cli.store.packs.frames import read_frame
from llmos_cli.store.packs.packs import PackWriter


@dataclass(frozen=True)
class Repaired:
    """What was put right (an object, a pack, a move of a ref, a file), how, where from, the bytes this took and the
    refs that were hurt."""

    where: str
    how: str
    source: str
    size: int = 0
    refs: tuple[str, ...] = ()
    objects: tuple[ObjectId, ...] = ()


HERE = "this store"


def evacuate(survey: Survey) -> Iterator[Repaired]:
    """Copy what stands in damaged packs and is nowhere else into new packs. Where only the end of a pack is damaged,
    the new pack has its bytes and so its name, and takes its place."""
    for pack in list(survey.damaged.values()):
        needed = {entry.id: survey.refs_of(entry.id) for entry in pack.whole if not survey.is_elsewhere(entry)}
        needed = {oid: refs for oid, refs in needed.items() if refs}
        if not needed:
            continue
        writer = PackWriter(survey.store.tmp)
        try:
            moved = _copy(survey, pack, needed.keys() if pack.failures else None, writer)
        except BaseException:
            writer.discard()
            raise
        if not moved:
            writer.discard()
            continue
        size = writer.size
        survey.look_again_at(writer.publish(survey.store))
        refs = tuple(sorted({ref for oid in moved for ref in needed.get(oid, ())}))
        yield Repaired(f"pack {pack.name.short}", "what stands in it is copied", HERE, size, refs, tuple(moved))


def _copy(survey: Survey, pack: DamagedPack, only: Container[ObjectId] | None, writer: PackWriter) -> list[ObjectId]:
    """Copy frames of a pack, all of them or `only` some, and return which."""
    moved = []
    for entry in pack.whole:
        if only is None or entry.id in only:
            try:
                if survey.quick:
                    verify(survey.store, pack.path, entry)
                frame, payload = read_frame(pack.path, entry)
                check_payload(frame, payload)
            except (Damaged, FileNotFoundError):
                continue
            writer.append(frame, encode_header(frame), (payload,))
            moved.append(entry.id)
    return moved

"""Where the bytes are: per ref what its files amount to, what they take in the store, and what only this ref needs."""

from collections import Counter
from dataclasses import dataclass

from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName
from llmos_cli.store.adopted import list_adopted
from llmos_cli.store.handle import Store
from llmos_cli.store.objects import read_manifest
from llmos_cli.store.packs import list_packs, total_size
from llmos_cli.store.reach import objects_of
from llmos_cli.store.refs import list_refs


@dataclass(frozen=True)
class RefUsage:
    """Bytes: `logical` of its files, `physical` of its objects as stored, `own` of those that no other ref uses."""

    ref: RefName
    id: ObjectId
    kind: str
    logical: int
    physical: int
    own: int


@dataclass(frozen=True)
class Usage:
    """`logical` sums the refs' files, `needed` is what they take as stored, `physical` what all packs and `adopted`
    files take; those may share their bytes with files outside.

    The rest of it, `other`, is earlier values of refs and what nothing needs any more; `trash` waits to be unlinked.
    """

    refs: tuple[RefUsage, ...]
    logical: int
    needed: int
    physical: int
    other: int
    trash: int
    packs: int
    adopted: int


def usage(store: Store) -> Usage:
    """Measure the store by its current refs."""
    objects: dict[RefName, set[ObjectId]] = {}
    facts: dict[RefName, tuple[ObjectId, str, int]] = {}
    for entry in list_refs(store):
        manifest = read_manifest(store, entry.id)
        objects[entry.ref] = set(objects_of(entry.id, manifest))
        facts[entry.ref] = (entry.id, manifest.kind, manifest.size)
    packs = list_packs(store.packs).values()
    stored = store.index.stored_sizes()
    users = Counter(oid for ids in objects.values() for oid in ids)
    refs = tuple(
        RefUsage(
            ref,
            *facts[ref],
            physical=sum(stored.get(oid, 0) for oid in ids),
            own=sum(stored.get(oid, 0) for oid in ids if users[oid] == 1),
        )
        for ref, ids in objects.items()
    )
    needed = sum(stored.get(oid, 0) for oid in users)
    trash = total_size(list_packs(store.trash).values())
    logical = sum(ref.logical for ref in refs)
    adopted = total_size(list_adopted(store).values())
    physical = total_size(packs) + adopted
    return Usage(refs, logical, needed, physical, max(0, physical - needed), trash, len(packs), adopted)

"""The moment in which objects become reachable: a ref is pointed at a manifest that is in the store.

What the manifest needs is made sure of before the ref moves, and looked at once more when it has. A gc looks at the
refs between moving a pack to the trash and unlinking it, so that one of the two always sees the other: even if a
process is stopped for hours at any place in here, and its lease long forgotten.
"""

from collections.abc import Callable, Sequence, Set
from functools import partial

from llmos_cli.errors import LlmosError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName
from llmos_cli.store.gc.reach import objects_of
from llmos_cli.store.handle import Store
from llmos_cli.store.leases import hold
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.packs.packs import secure
from llmos_cli.store.refs.refs import RefEntry, overwrite_ref, take_back, update_ref


def point(store: Store, ref: RefName, oid: ObjectId, *, expected: ObjectId | None, message: str) -> RefEntry:
    """Point a ref to a manifest that is in the store already, as safely beside a gc as a commit would.

    Raises Conflict if the ref is not at `expected` (None: without a value), Damaged if the manifest is not whole.
    """
    return _point(store, ref, oid, partial(update_ref, expected=expected, message=message), expected=expected)


def point_anew(store: Store, ref: RefName, oid: ObjectId, *, message: str) -> RefEntry:
    """Like `point`, for a ref none of whose moves can be read."""
    return _point(store, ref, oid, partial(overwrite_ref, message=message), expected=None)


def _point(
    store: Store, ref: RefName, oid: ObjectId, update: Callable[..., RefEntry], *, expected: ObjectId | None
) -> RefEntry:
    with hold(store, f"pointing {ref}", [oid], writes=True):
        objects = set(objects_of(oid, read_manifest(store, oid)))
        return make_reachable(store, objects, frozenset(), partial(update, store, ref, oid), expected=expected)


def make_reachable(
    store: Store,
    objects: Set[ObjectId],
    fresh: Set[ObjectId],
    update: Callable[[], RefEntry],
    *,
    expected: ObjectId | None,
) -> RefEntry:
    """Move a ref from what it `expected` by `update` to what needs `objects`, some of them in `fresh` packs. They must
    be there once it has moved, or it is as if it had not; then this raises Damaged."""
    needed = objects | store.index.bases(objects)
    packs = secure(store, needed, fresh=fresh)
    entry = update()
    confirm(store, needed, packs, () if entry.id == expected else (entry,))
    return entry


def confirm(store: Store, needed: Set[ObjectId], packs: Set[ObjectId], moves: Sequence[RefEntry]) -> None:
    """Once refs have been moved to what needs some objects, seen before in `packs`: bring back what a gc has taken
    since. If that cannot be, take the moves back and raise Damaged."""
    if all(store.pack_path(pack).exists() for pack in packs):
        return
    try:
        secure(store, needed, fresh=frozenset())
    except LlmosError:
        for entry in moves:
            take_back(store, entry)
        raise

"""Giving the space of superseded objects back at once, while a command runs that makes many: no grace period, but only
packs that hold what was named, of which little or nothing is needed any more. It is a gc of those packs, with all that
guards one: an open transaction elsewhere means that they wait in the trash, and what somebody needs after all comes
back.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import replace

from llmos_cli.errors import Busy, Damaged, NotFound, Unsafe
from llmos_cli.formats.ids import ObjectId
from llmos_cli.progress import Silent
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.gc.reach import objects_of
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import read_manifest


def give_back(store: Store, manifests: Iterable[ObjectId]) -> int:
    """Free what only these manifests needed; returns the bytes given back.

    Where it cannot be done now (another gc runs, a clock is wrong) nothing happens: the next gc does it.
    """
    named: set[ObjectId] = set()
    for oid in manifests:
        with contextlib.suppress(Damaged, NotFound):
            named.update(objects_of(oid, read_manifest(store, oid)))
    packs = {location.pack for oid in named for location in store.index.locate(oid)}
    try:
        plan = plan_gc(store, grace_seconds=0)
        ours = replace(
            plan,
            trash=tuple(pack for pack in plan.trash if pack.name in packs),
            rewrite=tuple(pack for pack in plan.rewrite if pack.name in packs),
            unlink=(),
            temporary=(),
            orphans=(),
        )
        return execute_gc(store, ours, Silent()).freed_bytes if ours.trash or ours.rewrite else 0
    except (Busy, Damaged, Unsafe):
        return 0

"""What was made already: from a recipe to the manifest it gave, so that repeated work returns at once."""

from llmos_cli.errors import Damaged, NotFound, Unsafe
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Recipe, recipe_key
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.packs.packs import find_holder, sync_index


def find_made(store: Store, recipe: Recipe) -> ObjectId | None:
    """The manifest that exactly this recipe gave and that is still whole; None if there is none."""
    sync_index(store)
    _read_recipes(store)
    for oid in store.index.made_by(recipe_key(recipe)):
        try:
            manifest = read_manifest(store, oid)
        except (Damaged, NotFound, Unsafe):
            continue
        packs: set[ObjectId] = set()
        for chunk in (chunk for entry in manifest.files for chunk in entry.chunks):
            pack = find_holder(store, chunk.id, packs)
            if pack is None:
                break
            packs.add(pack)
        else:
            return oid
    return None


def _read_recipes(store: Store) -> None:
    """Note the recipes of manifests that came in since the last look, by whatever way they came."""
    rows: list[tuple[ObjectId, ObjectId | None]] = []
    for oid in store.index.unread_manifests():
        try:
            recipe = read_manifest(store, oid).recipe
        except (Damaged, NotFound, Unsafe):
            continue
        rows.append((oid, recipe_key(recipe) if recipe else None))
    if rows:
        store.index.add_recipes(rows)

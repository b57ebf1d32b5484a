"""What an object was made from: its recipe's inputs, and theirs, down to the sources that came from outside.

Reads manifests only. An input that is not in the store (pulled without its history, or collected) ends its branch and
is said to be missing; it is no error.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmos_cli.errors import Damaged
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, Recipe
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.refs import RefEntry, ref_history, refs_naming, sound_refs


@dataclass(frozen=True)
class Ancestor:
    """One object of a lineage; `manifest` is None if it cannot be read here, and `problem` says why."""

    id: ObjectId
    manifest: Manifest | None
    problem: str | None
    labels: tuple[str, ...]

    @property
    def inputs(self) -> Mapping[str, ObjectId]:
        recipe = self.manifest.recipe if self.manifest else None
        return recipe.inputs if recipe else {}


@dataclass(frozen=True)
class Lineage:
    """`root` and everything it was made from, by id."""

    root: ObjectId
    objects: Mapping[ObjectId, Ancestor]


def trace(store: Store, root: ObjectId) -> Lineage:
    """Follow recipes from `root` down; each object is read once however many were made from it."""
    labels = ref_labels(store)
    objects: dict[ObjectId, Ancestor] = {}
    waiting = [root]
    while waiting:
        oid = waiting.pop()
        if oid in objects:
            continue
        manifest, problem = None, None
        if oid == root or store.index.has(oid) or any(place.entries(oid) for place in store.elsewhere):
            try:
                manifest = read_manifest(store, oid)
            except Damaged as exc:
                if oid == root:
                    raise
                problem = exc.message
        else:
            problem = "not in this store" if not store.elsewhere else "neither there nor in this store"
        objects[oid] = Ancestor(oid, manifest, problem, labels.get(oid, ()))
        waiting.extend(objects[oid].inputs.values())
    return Lineage(root, objects)


def ref_labels(store: Store, of: Iterable[ObjectId] | None = None) -> dict[ObjectId, tuple[str, ...]]:
    """How to name each object that a ref points or pointed to, or at least these: current refs first, then
    `name:tag~N`."""
    current: dict[ObjectId, list[str]] = {}
    earlier: dict[ObjectId, list[str]] = {}
    for entry in sound_refs(store) if of is None else refs_naming(store, of):
        current.setdefault(entry.id, []).append(str(entry.ref))
        for back, move in enumerate(_moves(store, entry)):
            if back:
                earlier.setdefault(move.id, []).append(f"{entry.ref}~{back}")
    labels = {oid: tuple(names) for oid, names in current.items()}
    return labels | {oid: tuple(names[:1]) for oid, names in earlier.items() if oid not in labels}


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, ready for JSON."""
    return {
        "command": recipe.command,
        "params": recipe.params,
        "seed": recipe.seed,
        "inputs": {role: str(oid) for role, oid in recipe.inputs.items()},
        "sources": [{"name": item.name, "size": item.size, "id": str(item.id)} for item in recipe.sources],
        "tools": recipe.tools,
    }


def _moves(store: Store, entry: RefEntry) -> list[RefEntry]:
    return ref_history(store, entry.ref) if entry.previous else [entry]

"""What a listing says of many manifests, without reading them all: noted in the index when a manifest was first read,
counted only while the manifest is still there."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from llmos_cli.errors import Damaged
from llmos_cli.formats.ids import ObjectId
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import read_manifest

_FACT: Final = "summary"


@dataclass(frozen=True)
class Summary:
    """A manifest's kind, and the bytes of its files."""

    kind: str
    size: int


def summaries(store: Store, manifests: Iterable[ObjectId]) -> dict[ObjectId, Summary]:
    """What there is to say of each; those that are missing or damaged are left out."""
    ids = list(dict.fromkeys(manifests))
    known, packs = store.index.facts(_FACT, ids), store.index.packs_of(ids)
    there = {pack for pack in {pack for held in packs.values() for pack in held} if store.pack_path(pack).exists()}
    found: dict[ObjectId, Summary] = {}
    fresh: dict[bytes, bytes] = {}
    for oid in ids:
        noted = _parse(known.get(oid, b""))
        if noted and (not there.isdisjoint(packs[oid]) or any(place.entries(oid) for place in store.elsewhere)):
            found[oid] = noted
            continue
        try:
            manifest = read_manifest(store, oid)
        except Damaged:
            continue
        found[oid] = Summary(manifest.kind, manifest.size)
        fresh[oid] = f"{manifest.kind} {manifest.size}".encode()
    if fresh:
        store.index.add_facts(_FACT, fresh.items())
    return found


def _parse(noted: bytes) -> Summary | None:
    kind, _, size = noted.partition(b" ")
    return Summary(kind.decode(), int(size)) if kind.isalpha() and size.isdigit() else None

"""From what a user typed to a manifest id: `name`, `name:tag`, `name:tag~N`, `@PREFIX`."""

import difflib
from dataclasses import dataclass

from llmos_cli.errors import NotFound, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName, parse_target
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.packs import sync_index
from llmos_cli.store.refs.refs import read_ref, ref_history, sound_refs

_SHOWN = 5


@dataclass(frozen=True)
class Resolved:
    """A manifest id and, where one was named, the ref it was found by."""

    id: ObjectId
    ref: RefName | None

    @property
    def label(self) -> str:
        return str(self.ref) if self.ref else f"@{self.id.short}"


def resolve(store: Store, text: str) -> Resolved:
    """Find the manifest; raises UsageError (malformed or ambiguous) or NotFound with the nearest name."""
    remote, slash, rest = text.partition("/")
    if slash and remote in store.config.remotes:
        raise UsageError(f"{text[:200]!r} is at a remote, and is needed here", hint=f"llmos pull {remote} {rest[:200]}")
    target = parse_target(text)
    if target.prefix is not None:
        return Resolved(_by_prefix(store, target.prefix), None)
    assert target.ref
    entry = read_ref(store, target.ref)
    if entry is None:
        raise NotFound(f"no ref {target.ref} in this store", hint=_nearest(store, target.ref))
    if target.back == 0:
        return Resolved(entry.id, target.ref)
    history = ref_history(store, target.ref)
    if target.back < len(history):
        return Resolved(history[target.back].id, None)
    if target.back == len(history) and history[-1].previous:
        return Resolved(history[-1].previous, None)
    raise NotFound(
        f"ref {target.ref} has no value {target.back} moves back", hint=f"its history: llmos log {target.ref}"
    )


def _by_prefix(store: Store, prefix: str) -> ObjectId:
    found = store.index.manifests(prefix)
    if not found:
        sync_index(store)
        found = store.index.manifests(prefix)
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotFound(f"no manifest @{prefix} in this store", hint="list refs and their ids: llmos ls")
    shown = ", ".join(f"@{oid.hex()[: len(prefix) + 6]}" for oid in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise UsageError(f"the id prefix @{prefix} is ambiguous: {shown}{more}", hint="type more digits")


def _nearest(store: Store, ref: RefName) -> str:
    known = [entry.ref for entry in sound_refs(store)]
    tags = [other for other in known if other.name == ref.name]
    if len(tags) > 1:
        return f"its tags: {', '.join(other.tag for other in tags[:_SHOWN])}"
    near = difflib.get_close_matches(ref.name, [other.name for other in known], 1)
    found = tags or [other for other in known if near and other.name == near[0]]
    return f"did you mean {found[0]}?" if found else "list what there is: llmos ls"

"""The names of refs that a store has seen at a remote, for whoever offers names to a person who types: TAB.

One text file a remote in `cache/` of the store, `refs-REMOTE`, a ref a line as it is typed. Shells read it; no command
believes it. It is renewed when a remote is listed, pushed to or pulled from.
"""

from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Final

from llmos_cli.errors import LlmosError
from llmos_cli.formats.names import RefName
from llmos_cli.remote.exchange.remembered import CACHE
from llmos_cli.remote.open import Remote
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store

_DEFAULT: Final = ":latest"


def note_refs(store: Store, remote: Remote, refs: Iterable[RefName], *, gone: Collection[RefName] = ()) -> None:
    """Remember that these refs are at a remote that has a name, besides those known, less those that are `gone`."""
    known = _read(store, remote.name) if remote.name else frozenset()
    _write(store, remote.name, known, (known | {_typed(ref) for ref in refs}) - {_typed(ref) for ref in gone})


def note_all_refs(store: Store, remote: Remote, refs: Iterable[RefName]) -> None:
    """Remember that a remote that has a name has these refs and no others."""
    _write(store, remote.name, None, frozenset(_typed(ref) for ref in refs))


def _typed(ref: RefName) -> str:
    return str(ref).removesuffix(_DEFAULT)


def _read(store: Store, name: str) -> frozenset[str]:
    try:
        return frozenset((store.root / CACHE / f"refs-{name}").read_text("ascii").split())
    except (OSError, ValueError):
        return frozenset()


def _write(store: Store, name: str | None, known: frozenset[str] | None, refs: frozenset[str]) -> None:
    """A full disk, or a store that may only be read, is no error."""
    if name and refs != known:
        with suppress(LlmosError, OSError):
            durable.make_folder(store.root / CACHE)
            durable.write_volatile(
                store.root / CACHE / f"refs-{name}", "".join(f"{ref}\n" for ref in sorted(refs)).encode()
            )

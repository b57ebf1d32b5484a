"""Reading a dataset of a remote while it is used: `REMOTE/REF` where a command reads far more than it would look at.

Chunks come as they are needed, proven, through a bounded cache on this disk (`[data] cache_gb` in config.toml). A
remote that fails is asked again for a while, opened anew each time: what has moved there is found, and of a pool the
nodes that are back. Small files that the result will hold, a tokenizer, are fetched into the store.
"""

import time
from collections.abc import Sequence
from typing import Final

from llmos_cli.errors import Damaged, NotFound, RemoteUnavailable
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.pack import Entry
from llmos_cli.remote.exchange.catalog import read_catalog
from llmos_cli.remote.exchange.pull import execute_pull, plan_chunks
from llmos_cli.remote.exchange.view import View
from llmos_cli.remote.open import find_remote
from llmos_cli.store.disk.forks import ForkLock
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.cached import Cached
from llmos_cli.store.packs.objects import read_manifest

WAITS: Final = (0.0, 1.0, 2.0, 4.0, 8.0)  # seconds, before a remote is asked again
_GB: Final = 1_000_000_000


def stream_from(view: View, dataset: ObjectId, near: str) -> None:
    """From here on let the store of a view read what it lacks through the cache; files of the dataset below the folder
    `near`, if that is given, are fetched at once."""
    store = view.store
    if near:
        entries = [entry for entry in read_manifest(store, dataset).files if entry.path.startswith(near)]
        chunks = {chunk.id: chunk.size for entry in entries for chunk in entry.chunks}
        plan = plan_chunks(store, view.remote.transport, view.catalog, chunks)
        execute_pull(store, view.remote, plan, store.progress)
    streamed = Cached(store, Steady(store, view), int(store.config.data.cache_gb * _GB))
    store.elsewhere = tuple(streamed if place is view else place for place in store.elsewhere)


class Steady:
    """A remote that is asked again when it fails."""

    def __init__(self, store: Store, view: View) -> None:
        self._store, self._view, self._waits = store, view, WAITS
        self._lock = ForkLock()

    @property
    def label(self) -> str:
        return self._view.label

    def entries(self, oid: ObjectId) -> Sequence[Entry]:
        return self._view.entries(oid)

    def read(self, oid: ObjectId) -> tuple[Entry, memoryview] | None:
        view = self._view
        try:
            found = view.read(oid)
            if found is not None:
                return found
        except (Damaged, RemoteUnavailable):
            pass
        for last, wait in enumerate(self._waits, 1 - len(self._waits)):
            time.sleep(wait)
            try:
                view = self._opened_after(view)
                return view.read(oid)
            except (NotFound, RemoteUnavailable):  # of a folder, also what is not mounted just now
                if not last:
                    raise
        raise AssertionError("there is a last time")

    def _opened_after(self, view: View) -> View:
        """The remote as another thread has opened it since `view`, or opened anew."""
        with self._lock:
            if self._view is view:
                remote = find_remote(self._store, view.remote.name or view.remote.transport.url, self._store.root)
                catalog = read_catalog(self._store, remote.transport, self._store.progress)
                self._view = View(self._store, remote, catalog)
            return self._view

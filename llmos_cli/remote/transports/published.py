"""A remote behind a plain web server, for reading: what is there is told by its LISTING, which `remote publish` makes.

The server must answer requests for a range of bytes. All that comes is proven by ids, as from any remote.
"""

from collections.abc import Iterator
from pathlib import Path

from llmos_cli.errors import AccessDenied, Damaged, NotFound
from llmos_cli.formats.ids import ObjectId
from llmos_cli.progress import Task
from llmos_cli.remote.transports.address import WebAddress
from llmos_cli.remote.transports.listing import LISTING, parse_listing
from llmos_cli.remote.transports.objectstore import ObjectStoreTransport, Patience
from llmos_cli.remote.transports.transport import Dated, check_key, check_prefix


class WebTransport(ObjectStoreTransport):
    """Bytes under keys, below a URL; nothing can be written."""

    def __init__(self, address: WebAddress, patience: Patience | None = None) -> None:
        super().__init__(address, patience)
        self._listing: dict[str, int] | None = None

    def initialise(self) -> None:
        raise self._read_only()

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        check_prefix(prefix)
        if self._listing is None:
            self._listing = self._read_listing()
        return iter([(key, size) for key, size in self._listing.items() if key.startswith(prefix)])

    def dated(self, prefix: str) -> Iterator[Dated]:
        check_prefix(prefix)
        raise self._read_only()

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        try:
            return super().read(key, start, end)
        except NotFound:
            self._listing = None  # it may be newer now
            raise

    def put_file(self, key: str, path: Path, name: ObjectId, task: Task) -> None:
        raise self._read_only()

    def create(self, key: str, data: bytes) -> bool:
        check_key(key)
        raise self._read_only()

    def delete(self, key: str) -> None:
        check_key(key)
        raise self._read_only()

    def set_aside(self, key: str, to: str) -> None:
        check_key(key)
        raise self._read_only()

    def bring_back(self, key: str, to: str) -> None:
        check_key(key)
        raise self._read_only()

    def _read_listing(self) -> dict[str, int]:
        try:
            return parse_listing(super().read(LISTING))
        except NotFound as exc:
            raise NotFound(
                f"{self.url} has no {LISTING}, and a web server cannot be asked what it has",
                hint="where it can be written to: llmos remote publish NAME",
            ) from exc
        except Damaged as exc:
            raise Damaged(f"{exc.message} ({self.url})", hint="make it anew: llmos remote publish NAME") from exc

    def _read_only(self) -> AccessDenied:
        return AccessDenied(f"{self.url} can only be read", hint="push to the place that the web server serves")

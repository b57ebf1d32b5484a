"""S3 and its dialects, Google Cloud Storage and Azure Blob as remotes, and the reading half of web servers, by obstore.

A value appears whole or not at all: big ones are sent in parts that the store joins at the end, and until then nobody
sees them. Requests that fail for a moment are asked again, with growing pauses, for a bounded time; an answer from
which no byte comes is given up. Until a store has answered once it is given little time: its address may be wrong.

Credentials are found by obstore where the cloud's own tools keep them for programs (environment, web identity, the
machine's metadata service) and, where there is a ~/.aws and boto3 is installed, by boto3 (profiles, single sign-on).
They pass through none of our hands.

An answer may send a reader on to another address, and obstore, which cannot be told otherwise, follows: never from
https:// to http:// (where clouds keep their metadata services), never with the credentials (the token of a session goes
along, which opens nothing without its secret), never with anything that is written. What comes from there is proven by
ids as all else, so it is refused or is what was asked for; but a server can make us ask an address that it chooses.
"""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Final

from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NotFound, RemoteUnavailable, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.ids import IdHasher, ObjectId
from llmos_cli.formats.layout import FORMAT_FILE, FORMAT_TEXT
from llmos_cli.progress import Task
from llmos_cli.remote.transports import locks
from llmos_cli.remote.transports.address import ObjectAddress, WebAddress
from llmos_cli.remote.transports.storeerrors import (
    TRY_AGAIN,
    NoBucket,
    is_plain_http,
    is_range_past_end,
    is_unsure,
    translate,
)
from llmos_cli.remote.transports.transport import Dated, SlowToAsk, check_key, check_prefix

_PART_BYTES: Final = 8 * limits.MiB
_PARTS: Final = 8  # parts of one value that are under way together
_MARKER_TEXT: Final = b"values here are created by way of lock objects\n"


@dataclass(frozen=True)
class Patience:
    """Seconds: `budget` for a request with all its repetitions, `first` the same until the store has answered once,
    `stall` without a byte (ten times that for a whole answer, however it drips), `part` to send one part and have it
    acknowledged."""

    budget: float = 90.0
    first: float = 6.0
    stall: float = 30.0
    part: float = 120.0


class ObjectStoreTransport(SlowToAsk):
    """Bytes under keys, in a bucket below a prefix."""

    def __init__(self, address: ObjectAddress | WebAddress, patience: Patience | None = None) -> None:
        self.address = address
        self._patience = patience or Patience()
        self._stores: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._answered = False
        self._plain_http = address.settings.get("endpoint", str(address)).startswith("http:")
        self._locked = True if "creates" in address.settings else None

    @property
    def url(self) -> str:
        return str(self.address)

    def initialise(self) -> None:
        """A store that ignores conditional puts is marked as one before its FORMAT appears."""
        if not self.exists(FORMAT_FILE):
            if self.uses_locks() or not self.creates_exclusively():
                self.require_locks()
            self.create(FORMAT_FILE, FORMAT_TEXT)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((item.key, item.size) for item in self.dated(prefix))

    def dated(self, prefix: str) -> Iterator[Dated]:
        check_prefix(prefix)
        return (Dated(meta["path"], meta["size"], meta["last_modified"].timestamp()) for meta in self._listed(prefix))

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        check_key(key)
        if end is not None and end <= start:
            if self.size(key) is None:
                raise NotFound(f"{key} is not at {self.url}")
            return b""

        def get(store: Any) -> bytes:
            try:
                if end is not None:
                    return bytes(store.get_range(key, start=start, end=end))
                options = {"range": {"offset": start}} if start else None
                return bytes(store.get(key, options=options).bytes())
            except Exception as exc:
                if is_range_past_end(exc):
                    return b""
                raise

        data: bytes = self._ask(f"reading {key}", get, key)
        return data

    def size(self, key: str) -> int | None:
        check_key(key)
        try:
            return int(self._ask(f"looking at {key}", lambda store: store.head(key), key)["size"])
        except NotFound:
            return None

    def put_file(self, key: str, path: Path, name: ObjectId, task: Task) -> None:
        """One value at a time, its parts beside each other: a kill then costs one value at most."""
        check_key(key)
        with open(path, "rb", buffering=0) as source:
            size = os.fstat(source.fileno()).st_size
            with self._sending:
                blocks = _ProvenBlocks(source, path, name, task)
                try:
                    self._put_blocks(key, blocks, size)
                except NoBucket:
                    raise
                except NotFound:  # the parts were joined and the answer was lost, or somebody removed them
                    self._put_blocks(key, blocks, size)

    def create(self, key: str, data: bytes) -> bool:
        check_key(key)
        if self.uses_locks():
            return locks.create_locked(self, key, data)
        return self._create(key, data)

    def delete(self, key: str) -> None:
        check_key(key)
        try:
            self._ask(f"removing {key}", lambda store: store.delete(key), key)
        except NoBucket:
            raise
        except NotFound:
            return

    def set_aside(self, key: str, to: str) -> None:
        self.bring_back(key, to)
        self.delete(key)

    def bring_back(self, key: str, to: str) -> None:
        check_key(key)
        check_key(to)
        size = self.size(key)
        if size is None:
            raise NotFound(f"{key} is not at {self.url}")
        self._ask(f"copying {key}", lambda store: store.copy(key, to), key, "write")
        copied = self.size(to)
        if copied is None:
            raise NotFound(f"{key} has been moved on from {to} at {self.url}")
        if copied != size:  # some only promise it
            raise RemoteUnavailable(f"{self.url} has not copied {key} to {to}", hint=TRY_AGAIN)

    # What locks are made with.

    def put(self, key: str, data: bytes) -> None:
        self._ask(f"writing {key}", lambda store: store.put(key, data, use_multipart=False), key, "write")

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def uses_locks(self) -> bool:
        """Whether this remote is marked as one that is written to by way of lock objects."""
        if self._locked is None:
            self._locked = self.exists(locks.MARKER)
        return self._locked

    def require_locks(self) -> None:
        """Mark it so, for everybody."""
        self.put(locks.MARKER, _MARKER_TEXT)
        self._locked = True

    def creates_exclusively(self) -> bool:
        """Try whether the store refuses to create what is there; leaves nothing behind."""
        key = f"{locks.LOCKS}/probe-{secrets.token_hex(8)}"
        try:
            return self._create(key, b"1") and not self._create(key, b"2") and self.read(key) == b"1"
        finally:
            self.delete(key)

    def _create(self, key: str, data: bytes) -> bool:
        """Asked again by ourselves: after an answer that was lost, "it is there already" may mean our own value."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        what, unsure, pause = f"creating {key}", False, 0.1
        end = time.monotonic() + (self._patience.budget if self._answered else self._patience.first)
        while True:
            try:
                self._store("once").put(key, data, mode="create", use_multipart=False)
                self._answered = True
                return True
            except Exception as exc:
                lost = is_unsure(exc)
                if isinstance(exc, AlreadyExistsError | PreconditionError) and not lost:
                    self._answered = True
                    return unsure and self._holds(key, data)
                if self._allows_plain_http(exc):
                    continue
                unsure = unsure or lost
                if not lost or time.monotonic() + pause > end:
                    raise translate(exc, self.address.scheme, self.url, what, key) from exc
            time.sleep(pause * (0.5 + secrets.randbelow(1000) / 1000))
            pause = min(2 * pause, 5.0)

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.read(key, 0, len(data) + 1) == data
        except NotFound:
            return False

    def _put_blocks(self, key: str, blocks: "_ProvenBlocks", size: int) -> None:
        def put(store: Any) -> None:
            blocks.rewind()
            if size <= _PART_BYTES:
                store.put(key, b"".join(blocks), use_multipart=False)
            else:
                store.put(key, iter(blocks), chunk_size=_PART_BYTES, max_concurrency=_PARTS)

        self._ask(f"writing {key}", put, key, "write")

    def _listed(self, prefix: str) -> Iterator[Mapping[str, Any]]:
        """A page at a time; what is listed twice is given twice."""
        what = f"listing {prefix or 'it'}"
        pages = self._ask(what, lambda store: store.list(prefix.rstrip("/") or None))
        while True:
            page: list[Mapping[str, Any]] | None = self._ask(what, lambda store: next(pages, None))
            if not page:
                return
            yield from page

    def _ask(self, what: str, request: Callable[[Any], Any], key: str | None = None, role: str = "read") -> Any:
        while True:
            with self._reporting(what, key):
                try:
                    answer = request(self._store(role))
                    self._answered = True
                    return answer
                except Exception as exc:
                    if not self._allows_plain_http(exc):
                        raise

    @contextmanager
    def _reporting(self, what: str, key: str | None) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except LlmosError:
            raise
        except (BaseError, OSError, ValueError) as exc:
            error = translate(exc, self.address.scheme, self.url, what, key)
            self._answered = self._answered or isinstance(error, NotFound)
            raise error from exc

    def _allows_plain_http(self, exc: BaseException) -> bool:
        """An endpoint from the environment that begins with http:// is what its owner wants; ask again that way."""
        if self._plain_http or not is_plain_http(exc):
            return False
        self._plain_http = True
        return True

    @cached_property
    def _profile(self) -> Any:
        """What boto3 finds, or None."""
        if not (Path.home() / ".aws").is_dir() or find_spec("boto3") is None:
            return None
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider

        try:
            return Boto3CredentialProvider()
        except ValueError:  # it finds none
            return None
        except BotoCoreError as exc:
            raise AccessDenied(f"boto3 cannot tell the credentials for {self.url}: {type(exc).__name__}") from exc

    def _store(self, role: str) -> Any:
        """A client: to "read", to "write" (a part has more time than an answer), or to ask "once"."""
        name = f"{role}, {'patient' if self._answered else 'first'}, {'http' if self._plain_http else 'https'}"
        with self._lock:
            if name not in self._stores:
                self._stores[name] = self._connect(role)
            return self._stores[name]

    def _connect(self, role: str) -> Any:
        from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

        patience = self._patience
        budget = patience.budget if self._answered else patience.first
        client = {
            "allow_http": self._plain_http,
            "connect_timeout": timedelta(seconds=min(10.0, patience.stall)),
            "read_timeout": timedelta(seconds=patience.part if role == "write" else patience.stall),
            "timeout": timedelta(seconds=max(10 * patience.stall, patience.part)),
        }
        retry = {
            "max_retries": 0 if role == "once" else 12,
            "backoff": {
                "init_backoff": timedelta(seconds=0.1),
                "max_backoff": timedelta(seconds=budget / 6),
                "base": 2,
            },
            "retry_timeout": timedelta(seconds=budget),
        }
        place: dict[str, Any] = {"client_options": client, "retry_config": retry}
        if isinstance(self.address, WebAddress):
            return HTTPStore(self.address.url, **place)
        if self.address.prefix:
            place["prefix"] = self.address.prefix
        settings: dict[str, Any] = {key: value for key, value in self.address.settings.items() if key != "creates"}
        match self.address.scheme:
            case "s3":
                if self._profile:
                    place["credential_provider"] = self._profile
                return S3Store(self.address.bucket, **place, **settings, disable_bulk_delete=True)
            case "gs":
                if "endpoint" in settings:
                    place["base_url"] = settings["endpoint"]
                return GCSStore(self.address.bucket, **place)
            case _:
                if "account" in settings:
                    settings["account_name"] = settings.pop("account")
                return AzureStore(self.address.bucket, **place, **settings)


class _ProvenBlocks:
    """The parts of a local file, hashed as they pass. Its end is an error if the bytes are not what the name says, so
    that the value is not completed."""

    def __init__(self, source: BinaryIO, path: Path, name: ObjectId, task: Task) -> None:
        self._source = source
        self._path = path
        self._name = name
        self._task = task
        self._told = 0

    def rewind(self) -> None:
        self._source.seek(0)

    def __iter__(self) -> Iterator[bytes]:
        hasher, done = IdHasher(), 0
        while block := self._read():
            hasher.update(block)
            done += len(block)
            if done > self._told:  # not again what was told before a repetition
                self._task.advance(done - self._told)
                self._told = done
            yield block
        if hasher.id() != self._name:
            raise Damaged(
                f"{self._path} does not have the bytes its name stands for", hint="see what it affects: llmos fsck"
            )

    def _read(self) -> bytes:
        try:
            return self._source.read(_PART_BYTES)
        except OSError as exc:
            raise from_os_error(exc, f"reading {self._path}") from exc

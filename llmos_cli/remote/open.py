"""From what a user typed, a remote's name or a URL, to a transport. The one place that knows URL schemes.

A URL never names a program to run: schemes are an allow-list, and nothing here starts a process.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from llmos_cli.errors import Damaged, NotFound, Unsafe, UsageError, from_os_error
from llmos_cli.formats.layout import FORMAT_FILE, FORMAT_TEXT, check_format
from llmos_cli.formats.names import RefName
from llmos_cli.remote.pool.members import find_pool, open_pool, split_pool_url
from llmos_cli.remote.pool.pool import POOL_SCHEME, PoolTransport, pool_url
from llmos_cli.remote.transports.address import (
    HDFS_SCHEMES,
    SCHEMES,
    WEB_SCHEMES,
    parse_address,
    parse_hdfs_address,
    parse_web_address,
)
from llmos_cli.remote.transports.folder import FolderTransport
from llmos_cli.remote.transports.transport import Transport
from llmos_cli.store.handle import Store
from llmos_cli.store.local import STORE_FOLDER, save_config

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_KNOWN: Final = "a remote is a folder (a path, or file:///PATH), or s3://, gs://, az://, https:// or hdfs://"
_NOT_OURS: Final = "locks/"  # what a remote may hold before it is one


@dataclass(frozen=True)
class Remote:
    """`name` is None if the user typed a URL; `label` is what messages call it and what the next command can use."""

    name: str | None
    transport: Transport

    @property
    def label(self) -> str:
        return self.name or self.transport.url


def normal_url(text: str, cwd: Path) -> str:
    """What to keep of a URL that a user typed: folders by their absolute path; raises UsageError."""
    if text.startswith(POOL_SCHEME):
        return pool_url(normal_url(part, cwd) for part in split_pool_url(text))
    if _scheme(text) in SCHEMES:
        return str(parse_address(text))
    if _scheme(text) in WEB_SCHEMES:
        return str(parse_web_address(text))
    if _scheme(text) in HDFS_SCHEMES:
        return "".join(parse_hdfs_address(text))
    return str(_folder(text, cwd))


def open_transport(url: str) -> Transport:
    """The transport for a URL from `normal_url`. DIR/.llmos is meant where DIR holds a store."""
    if url.startswith(POOL_SCHEME):
        return open_remote(url, lambda message: None)
    if _scheme(url) in SCHEMES:
        from llmos_cli.remote.transports.objectstore import ObjectStoreTransport

        return ObjectStoreTransport(parse_address(url))
    if _scheme(url) in WEB_SCHEMES:
        from llmos_cli.remote.transports.published import WebTransport

        return WebTransport(parse_web_address(url))
    if _scheme(url) in HDFS_SCHEMES:
        from llmos_cli.remote.transports.hdfs import HdfsTransport

        return HdfsTransport(*parse_hdfs_address(url))
    root = _folder(url, Path("/"))
    inside = root / STORE_FOLDER
    try:
        if root.exists() and not root.is_dir():
            raise UsageError(f"{root} is not a folder", hint=_KNOWN)
        if not (root / FORMAT_FILE).exists() and (inside / FORMAT_FILE).exists():
            root = inside
    except OSError as exc:
        raise from_os_error(exc, f"opening the remote {root}") from exc
    return FolderTransport(root)


def open_remote(url: str, warn: Callable[[str], None]) -> Transport:
    """The remote at a URL from `normal_url`: a pool where it names one, or where a node of one is there."""
    if url.startswith(POOL_SCHEME):
        return open_pool(split_pool_url(url), open_transport, warn)
    transport = open_transport(url)
    return find_pool(transport, open_transport, warn) or transport


def find_remote(store: Store, text: str, cwd: Path) -> Remote:
    """The remote of this name or at this URL; raises NotFound with the nearest name, UsageError for this very store."""
    remotes = store.config.remotes
    if text in remotes:
        remote = Remote(text, open_remote(normal_url(remotes[text], store.root), store.progress.warn))
    elif _is_url(text):
        remote = Remote(None, open_remote(normal_url(text, cwd), store.progress.warn))
    else:
        near = difflib.get_close_matches(text, list(remotes), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"name it first: llmos remote add {text} URL"
        raise NotFound(f"no remote {text[:200]!r}", hint=hint)
    transport = remote.transport
    if isinstance(transport, FolderTransport) and transport.root.resolve() == store.root.resolve():
        raise UsageError(f"{text} is this store itself", hint="use another folder as the remote")
    return remote


def add_remote(store: Store, name: str, url: str, cwd: Path) -> str:
    """Give a URL a name; returns the URL as kept. Raises Unsafe for a folder that holds something else."""
    check_remote_name(name)
    kept = normal_url(url, cwd)
    known = store.config.remotes.get(name)
    if known and kept not in (known, _without_locks(known)):
        raise UsageError(f"remote {name!r} is {known} already", hint=f"llmos remote rm {name}")
    transport = open_remote(kept, store.progress.warn)
    is_ready(transport)
    return keep_remote(store, name, transport.url if isinstance(transport, PoolTransport) else kept)


def keep_remote(store: Store, name: str, kept: str) -> str:
    """Write down what a name stands for, in the place of what it stood for."""
    _save(store, {**store.config.remotes, name: kept})
    return kept


def add_locks(store: Store, name: str) -> str:
    """Note in an object store's URL that refs move by way of lock objects there; returns the URL as kept."""
    kept = str(parse_address(store.config.remotes[name]).with_locks())
    _save(store, {**store.config.remotes, name: kept})
    return kept


def remove_remote(store: Store, name: str) -> str:
    """Forget a name; nothing is deleted at the remote. Returns its URL."""
    remotes = dict(store.config.remotes)
    if name not in remotes:
        raise NotFound(f"no remote {name[:200]!r}", hint="list them: llmos remote ls")
    if name in store.config.require_signed:
        raise Unsafe(
            f"config.toml asks for signatures from {name!r}",
            hint="take it out of 'require_signed' there, then forget it",
        )
    url = remotes.pop(name)
    _save(store, remotes)
    return url


def is_ready(transport: Transport) -> bool:
    """Whether there is an llmos remote; False if there is nothing yet. Raises Unsafe if there is something else,
    UnknownVersion or Damaged for its FORMAT."""
    try:
        data = transport.read(FORMAT_FILE, 0, 4 * len(FORMAT_TEXT) + 64)
    except NotFound:
        other = next((key for key, _ in transport.list("") if not key.startswith(_NOT_OURS)), None)
        if other is None:
            return False
        raise Unsafe(
            f"{transport.url} is not empty and is no llmos remote: it holds {other[:200]!r}",
            hint="use an empty or a new folder",
        ) from None
    try:
        check_format(data)
    except Damaged as exc:
        raise type(exc)(f"{exc.message} ({transport.url})", hint=exc.hint) from exc
    return True


def require_ready(transport: Transport) -> None:
    """Raise NotFound unless there is an llmos remote to read from."""
    try:
        ready = is_ready(transport)
    except Unsafe as exc:
        raise NotFound(f"no llmos remote at {transport.url}", hint="check the URL: llmos remote ls") from exc
    if not ready:
        raise NotFound(
            f"no llmos remote at {transport.url}: nothing is there", hint="the first push makes it: llmos push"
        )


def check_remote_name(name: str) -> str:
    """Return `name` if it may name a remote: the rules of a ref's name; raises UsageError."""
    try:
        return RefName(name).name
    except UsageError as exc:
        raise UsageError(
            f"malformed remote name {name[:200]!r}",
            hint="use letters, digits, '.', '_', '+', '-', starting with a letter or digit",
        ) from exc


def _save(store: Store, remotes: Mapping[str, str]) -> None:
    save_config(store, replace(store.config, remotes=remotes))


def _is_url(text: str) -> bool:
    return text in (".", "..") or "/" in text or ":" in text


def _without_locks(url: str) -> str:
    """The URL as it was before `add_locks`."""
    return str(parse_address(url).without_locks()) if _scheme(url) in SCHEMES else url


def _scheme(text: str) -> str:
    match = _SCHEME.match(text)
    return match[1].lower() if match else ""


def _folder(text: str, cwd: Path) -> Path:
    if not text or not text.isprintable():
        raise UsageError(f"malformed URL {text[:200]!r}", hint=_KNOWN)
    match = _SCHEME.match(text)
    path = text
    if match and match[1].lower() == "file" and text[5:].startswith("//"):
        host, slash, rest = text[7:].partition("/")
        path = "/" + unquote(rest)
        if host not in ("", "localhost") or not slash or not path.isprintable():
            raise UsageError(f"malformed URL {text[:200]!r}", hint="write file:///PATH; it names no host")
    elif match:
        raise UsageError(
            f"unknown URL scheme {match[1][:40]!r} in {text[:200]!r}",
            hint=f"{_KNOWN}; a path that has a colon is written ./{text[:40]}",
        )
    folder = cwd / path
    return folder.resolve() if ".." in folder.parts else folder

"""Addresses of far remotes: `s3://BUCKET/PREFIX?endpoint=URL&region=NAME`, `gs://BUCKET/PREFIX`,
`az://CONTAINER/PREFIX?account=NAME`, `https://HOST/PATH`, `hdfs://HOST/PATH`.

They are kept in config.toml and shown to people, so they hold no secret: a user, a password or an unknown setting in
one is refused without being repeated. Credentials come from where the cloud's own tools look for them.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from llmos_cli.errors import Unsafe, UsageError
from llmos_cli.remote.transports.transport import check_prefix

SCHEMES: Final = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "azure": "az",
    "abfs": "az",
    "abfss": "az",
}
WEB_SCHEMES: Final = ("http", "https")
HDFS_SCHEMES: Final = ("hdfs", "viewfs")
_SETTINGS: Final = {
    "s3": ("endpoint", "region", "creates"),
    "gs": ("endpoint", "creates"),
    "az": ("endpoint", "account", "creates"),
}
_EXAMPLES: Final = {
    "s3": "s3://BUCKET/PREFIX, with ?endpoint=http://HOST:PORT for a store that is not AWS",
    "gs": "gs://BUCKET/PREFIX",
    "az": "az://CONTAINER/PREFIX?account=NAME",
}
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}\Z")
_VALUE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}\Z")
_ENDPOINT: Final = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/[A-Za-z0-9._/-]*)?\Z")
_HDFS: Final = re.compile(
    r"(?P<scheme>hdfs|viewfs)://(?P<host>[A-Za-z0-9._-]+(?::[0-9]{1,5})?)(?P<path>/[\w./+-]*)\Z", re.I | re.A
)


@dataclass(frozen=True)
class ObjectAddress:
    """`scheme` is "s3", "gs" or "az"; `bucket` an Azure container too; `prefix` is "" or a key without a slash at its
    end; `settings` are the words after "?", of which `creates=locks` says that the store ignores conditional puts."""

    scheme: str
    bucket: str
    prefix: str
    settings: Mapping[str, str]

    def with_locks(self) -> "ObjectAddress":
        return replace(self, settings={**self.settings, "creates": "locks"})

    def without_locks(self) -> "ObjectAddress":
        return replace(self, settings={key: value for key, value in self.settings.items() if key != "creates"})

    def __str__(self) -> str:
        path = f"/{self.prefix}" if self.prefix else ""
        words = f"?{urlencode(sorted(self.settings.items()), safe=':/[]')}" if self.settings else ""
        return f"{self.scheme}://{self.bucket}{path}{words}"


@dataclass(frozen=True)
class WebAddress:
    """A place on a web server; `scheme` is "http" for https:// too."""

    url: str
    scheme: str = "http"
    settings: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.url


def parse_web_address(text: str) -> WebAddress:
    """Read http://... or https://...; raises UsageError, Unsafe for an address of the machine's own network services
    (169.254.0.0/16, fe80::/10), which no remote has and which give out credentials."""
    host = urlsplit(text).hostname or "" if text.isprintable() else ""
    try:
        link_local = ipaddress.ip_address(host).is_link_local
    except ValueError:
        link_local = False
    if link_local:
        raise Unsafe(
            f"{host} is an address of this machine's own network services", hint="use the server's own address"
        )
    head, _, rest = text.partition(":")
    kept = f"{head.lower()}:{rest}".rstrip("/")
    if not host or ".." in kept or not _ENDPOINT.match(kept):
        raise UsageError("malformed http address: it may hold no user, password or '?'", hint="write https://HOST/PATH")
    return WebAddress(kept)


def parse_hdfs_address(text: str) -> tuple[str, str]:
    """Read hdfs://HOST[:PORT]/PATH (or viewfs:); returns the server's part and the path, without a slash at its end.
    Raises UsageError."""
    found = _HDFS.match(text)
    if not found or ".." in found["path"] or "//" in found["path"]:
        raise UsageError("malformed hdfs address", hint="write hdfs://NAMENODE:PORT/PATH, or hdfs://NAMESERVICE/PATH")
    return f"{found['scheme'].lower()}://{found['host']}", found["path"].rstrip("/")


def parse_address(text: str) -> ObjectAddress:
    """Read an address; raises UsageError. `text` begins with one of SCHEMES."""
    scheme = SCHEMES[text.partition(":")[0].lower()]
    rest = text.partition(":")[2]
    if not text.isprintable():
        raise _malformed(scheme)
    try:
        parts = urlsplit(f"{scheme}:{rest}")
        words = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), max_num_fields=8)
    except ValueError as exc:
        raise _malformed(scheme) from exc
    if "@" in parts.netloc or parts.fragment or "%" in text.partition("?")[0] or not _BUCKET.match(parts.netloc):
        raise _malformed(scheme)
    prefix = parts.path.strip("/")
    try:
        check_prefix(f"{prefix}/" if prefix else "")
    except Unsafe as exc:
        raise _malformed(scheme) from exc
    settings = dict(words)
    if len(settings) != len(words) or not settings.keys() <= set(_SETTINGS[scheme]):
        raise _malformed(scheme)
    for key, value in settings.items():
        if not (_ENDPOINT if key == "endpoint" else _VALUE).match(value) or (key == "creates" and value != "locks"):
            raise _malformed(scheme)
    return ObjectAddress(scheme, parts.netloc, prefix, settings)


def _malformed(scheme: str) -> UsageError:
    """It does not repeat the text: somebody may have put a password into it."""
    known = ", ".join(_SETTINGS[scheme])
    return UsageError(
        f"malformed {scheme} address: after '?' only {known} may stand, and no user or password anywhere",
        hint=f"write {_EXAMPLES[scheme]}",
    )

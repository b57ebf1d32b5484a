"""Addresses of object stores: `s3://BUCKET/PREFIX?endpoint=URL&region=NAME`, `gs://...`, `az://CONTAINER/PREFIX?account=NAME`.

They are kept in config.toml and shown to people, so they hold no secret: a user, a password or an unknown setting in
one is refused without being repeated. Credentials come from where the cloud's own tools look for them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from llmos_cli.errors import Unsafe, UsageError
from llmos_cli.remote.transport import check_prefix

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

    def __str__(self) -> str:
        path = f"/{self.prefix}" if self.prefix else ""
        words = f"?{urlencode(sorted(self.settings.items()), safe=':/[]')}" if self.settings else ""
        return f"{self.scheme}://{self.bucket}{path}{words}"


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

"""Typed settings: what may stand in a store's `config.toml`, with defaults. Stdlib only; knows no files.

Unknown keys are refused with the nearest valid one: a typo must not silently mean the default.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from llmos_cli.errors import UsageError

_PUBLIC_KEY = re.compile(r"ed25519:[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class GcConfig:
    """`grace_hours`: age before unreachable data is trashed, and again before it is unlinked. `keep_days`: how long a
    ref's earlier values stay reachable."""

    grace_hours: float = 24.0
    keep_days: float = 14.0


@dataclass(frozen=True)
class DataConfig:
    """`cache_gb`: how much of what is streamed from remotes is kept near."""

    cache_gb: float = 16.0


@dataclass(frozen=True)
class Config:
    """`remotes` maps a remote's name to its URL, `trust` the name of whoever signs refs to a public key;
    `require_signed` are the remotes ("*": all) from which only signed refs are pulled."""

    gc: GcConfig = field(default_factory=GcConfig)
    remotes: Mapping[str, str] = field(default_factory=dict)
    trust: Mapping[str, str] = field(default_factory=dict)
    require_signed: tuple[str, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)


def parse_config(text: str, where: str) -> Config:
    """Read `config.toml`; raises UsageError naming `where` and the key."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise UsageError(f"{where} is not valid TOML: {exc}") from exc
    _known(table, ("gc", "data", "remotes", "require_signed", "trust"), where)
    gc = _numbers(table, "gc", GcConfig, where)
    data = _numbers(table, "data", DataConfig, where)
    remotes = _section(table, "remotes", where)
    for name, url in remotes.items():
        if not isinstance(url, str) or not url:
            raise UsageError(f"{where} [remotes] {name} must be a URL")
    trust = _section(table, "trust", where)
    for name, key in trust.items():
        if not isinstance(key, str) or not _PUBLIC_KEY.match(key):
            raise UsageError(f"{where} [trust] {name} must be 'ed25519:' and 64 hex digits")
    signed = table.get("require_signed", [])
    if not isinstance(signed, list) or not all(isinstance(name, str) for name in signed):
        raise UsageError(f"{where}: 'require_signed' must be a list of remotes' names")
    _known(dict.fromkeys(signed), (*remotes, "*"), f"{where} require_signed")
    return Config(GcConfig(**gc), remotes, trust, tuple(signed), DataConfig(**data))


def render_config(config: Config) -> str:
    """The text of a `config.toml` that reads back as `config`."""
    lines = [f"require_signed = [{', '.join(map(_quote, config.require_signed))}]", ""] if config.require_signed else []
    lines += ["[gc]", f"grace_hours = {config.gc.grace_hours}", f"keep_days = {config.gc.keep_days}", ""]
    if config.data != DataConfig():
        lines += ["[data]", f"cache_gb = {config.data.cache_gb}", ""]
    lines += ["[remotes]"]
    lines += [f"{_quote(name)} = {_quote(url)}" for name, url in sorted(config.remotes.items())]
    if config.trust:
        lines += ["", "[trust]", *(f"{_quote(name)} = {_quote(key)}" for name, key in sorted(config.trust.items()))]
    return "\n".join(lines) + "\n"


def _known(table: Mapping[str, Any], valid: Any, where: str) -> None:
    for key in table:
        if key not in valid:
            near = difflib.get_close_matches(key, list(valid), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
            raise UsageError(f"{where} has the unknown key {key!r}", hint=hint)


def _section(table: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {key!r} must be a table")
    return value


def _numbers(table: Mapping[str, Any], key: str, of: type[Any], where: str) -> dict[str, float]:
    found = _section(table, key, where)
    _known(found, [item.name for item in fields(of)], f"{where} [{key}]")
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise UsageError(f"{where} [{key}] {name} must be a number of at least 0")
    return {name: float(value) for name, value in found.items()}


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in escaped) + '"'

"""A command's options from a TOML file: what is typed goes before what stands there, and that before the defaults.

Every option of the command is a key, by its name with "_" for "-". A key that is none is refused with the nearest one,
because a misspelt setting must not silently mean its default.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Final

import typer

from llmos_cli.errors import UsageError, from_os_error

_NOT_SETTINGS: Final = {"file", "help", "json", "quiet", "store", "verbose"}  # what is not of this command alone
_TYPES: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "boolean": ((bool,), "true or false"),
}


def read_settings(ctx: typer.Context, path: Path | None) -> Path | None:
    """The callback of `--file`: hands what the file says to the options that are not typed."""
    if path is None or ctx.resilient_parsing:
        return path
    options = {
        max(parameter.opts, key=len).removeprefix("--").replace("-", "_"): parameter
        for parameter in ctx.command.params
        if parameter.param_type_name == "option"
    }
    known = {key: parameter for key, parameter in options.items() if key not in _NOT_SETTINGS}
    given: dict[str, Any] = {}
    for key, value in _read(path).items():
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, 1)
            raise UsageError(
                f"{path} has the unknown key {key!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(sorted(known))}",
            )
        kinds, words = _TYPES.get(known[key].type.name, ((str,), "text"))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UsageError(f"{path}: {key} must be {words}", hint=f"llmos {ctx.info_name} --help says what it means")
        given[str(known[key].name)] = value
    ctx.default_map = {**(ctx.default_map or {}), **given}
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} is not valid TOML: {exc}") from exc

"""The search file of `llmos tune`: what is searched, and what is the same in every trial. Stdlib only.

    [search]
    lr = {low = 1e-4, high = 1e-2, log = true}
    depth = [1, 2, 4]

    [train]
    steps = 200
    batch = 8

Both tables take the options of `train` by name. Whether a value makes sense is asked of `train` itself, at both ends of
every span and for every choice, before the first trial.
"""

import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, get_type_hints

from llmos_cli.errors import UsageError
from llmos_cli.formats.canonical import Json
from llmos_cli.train.config import Options, resolve

Value = str | int | float | bool

_SPAN_KEYS: Final = ("low", "high", "log", "step")
_OF_A_RUN: Final = ("data", "model", "save_every")


@dataclass(frozen=True)
class Span:
    """Numbers from `low` to `high`: whole ones, or evenly on a logarithmic scale, or in steps."""

    name: str
    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    @property
    def samples(self) -> tuple[Value, ...]:
        return (self.low, self.high)

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high and self.step is None

    def as_json(self) -> Json:
        return {key: value for key, value in asdict(self).items() if key not in ("name", "whole")}


@dataclass(frozen=True)
class Choice:
    """One of a list."""

    name: str
    values: tuple[Value, ...]

    @property
    def samples(self) -> tuple[Value, ...]:
        return self.values

    def holds(self, value: Any) -> bool:
        return value in self.values

    def as_json(self) -> Json:
        return list(self.values)


Dimension = Span | Choice


@dataclass(frozen=True)
class Search:
    """`fixed` are options of every trial; `data`, `model` and `save_every` say what `train` takes beside them."""

    dimensions: tuple[Dimension, ...]
    fixed: Options
    data: str | None = None
    model: str | None = None
    save_every: int | None = None

    @property
    def first(self) -> dict[str, Value]:
        """One point of the space."""
        return {item.name: item.samples[0] for item in self.dimensions}

    def options(self, params: Mapping[str, Any]) -> Options:
        """What a trial trains with."""
        return replace(self.fixed, **params)

    def defaults(self, *, from_model: bool) -> dict[str, Value] | None:
        """What `train` would take if nothing were searched, if all of it lies in the space: the first trial."""
        plain = resolve(self.fixed, from_model=from_model)
        found = {item.name: getattr(plain, item.name) for item in self.dimensions}
        return found if all(item.holds(found[item.name]) for item in self.dimensions) else None

    def check(self, *, from_model: bool) -> None:
        """Ask `train` whether it takes the ends of every span and every choice; raises UsageError as it would."""
        for params in self._corners():
            resolve(self.options(params), from_model=from_model)

    def as_json(self) -> dict[str, Json]:
        """What decides the trials, to tell one search from another."""
        fixed = {
            field.name: value for field in fields(Options) if (value := getattr(self.fixed, field.name)) is not None
        }
        return {"search": {item.name: item.as_json() for item in self.dimensions}, "train": fixed}

    def _corners(self) -> Iterator[dict[str, Any]]:
        for item in self.dimensions:
            yield from (self.first | {item.name: value} for value in item.samples)


def parse_search(text: str, where: str) -> Search:
    """Read a search file; raises UsageError naming `where` and the key."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise UsageError(f"{where} is not valid TOML: {exc}") from exc
    _known(table, ("search", "train"), where)
    search, fixed = (_section(table, name, where) for name in ("search", "train"))
    if not search:
        raise UsageError(f"{where} has nothing to search", hint="add a table: [search] lr = {low = 1e-4, high = 1e-2}")
    names = [field.name for field in fields(Options) if _kinds(field.name)]  # numbers, words and switches
    _known(search, names, f"{where} [search]")
    _known(fixed, [*names, *_OF_A_RUN], f"{where} [train]")
    for name in search:
        if name in fixed:
            raise UsageError(f"{where}: {name!r} is both searched and fixed", hint="leave it in one of the tables")
    dimensions = tuple(_dimension(name, spec, f"{where} [search] {name}") for name, spec in search.items())
    for name, value in fixed.items():
        _check_type(name, value, f"{where} [train] {name}")
    of_a_run = {name: fixed.pop(name) for name in _OF_A_RUN if name in fixed}
    return Search(dimensions, Options(**fixed), **of_a_run)


def _dimension(name: str, spec: Any, where: str) -> Dimension:
    if isinstance(spec, list):
        return _choice(name, spec, where)
    if isinstance(spec, dict):
        return _span(name, spec, where)
    raise UsageError(f"{where} is neither a list nor a span", hint="write [1, 2, 4] or {low = 1e-4, high = 1e-2}")


def _choice(name: str, values: list[Any], where: str) -> Choice:
    if not values or len(set(map(repr, values))) < len(values):
        raise UsageError(f"{where} must be a list of different values")
    for value in values:
        _check_type(name, value, where)
    return Choice(name, tuple(values))


def _span(name: str, spec: dict[str, Any], where: str) -> Span:
    _known(spec, _SPAN_KEYS, where)
    kinds = _kinds(name)
    if not kinds & {int, float}:
        raise UsageError(f"{where} is not a number", hint="list what it may be: [..., ...]")
    whole = float not in kinds
    for key in ("low", "high"):
        if key not in spec:
            raise UsageError(f"{where} does not say its {key!r} end")
    for key in ("low", "high", "step"):
        value = spec.get(key, 1)
        if type(value) not in ((int,) if whole else (int, float)) or not math.isfinite(value):
            raise UsageError(f"{where}: {key} must be a {'whole ' if whole else ''}number")
    span = Span(name, spec["low"], spec["high"], spec.get("log", False), spec.get("step"), whole)
    if type(span.log) is not bool:
        raise UsageError(f"{where}: log must be true or false")
    if span.low >= span.high:
        raise UsageError(f"{where}: low must be below high")
    if span.log and (span.low <= 0 or span.step is not None):
        raise UsageError(f"{where}: a logarithmic span begins above 0 and has no step")
    if span.step is not None and span.step <= 0:
        raise UsageError(f"{where}: step must be above 0")
    return span


def _check_type(name: str, value: Any, where: str) -> None:
    kinds = _kinds(name)
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if not fits:
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        expected = "a number" if float in kinds else " or ".join(words[kind] for kind in words if kind in kinds)
        raise UsageError(f"{where}: {value!r} is not {expected}")


def _kinds(name: str) -> set[type]:
    """The types that an option takes."""
    if name in _OF_A_RUN:
        return {int} if name == "save_every" else {str}
    hint = get_type_hints(Options)[name]
    return {kind for kind in getattr(hint, "__args__", (hint,)) if kind in (int, float, str, bool)}


def _known(table: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    names = list(valid)
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(names)}"
            raise UsageError(f"{where} has the unknown key {key!r}", hint=hint)


def _section(table: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {key!r} must be a table")
    return dict(value)

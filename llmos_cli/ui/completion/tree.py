"""The command tree as plain values: what a shell has to know to complete a command line.

Read from the attributes of the built application; knows nothing of shells. What a value is, is told by its metavar:
REF and NAME are refs, PATH and FILE files, DIR and URL folders, REMOTE a remote, [REMOTE/]REF a ref here or one seen
there, `a|b` in lower case a choice.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

_KINDS: Final = {
    "REF": "refs",
    "NAME": "refs",
    "PATH": "files",
    "FILE": "files",
    "DIR": "dirs",
    "URL": "dirs",
    "REMOTE": "remotes",
}
_ANYWHERE: Final = "[REMOTE/]"
_CHOICES = re.compile(r"[a-z0-9.-]+(\|[a-z0-9.-]+)+\Z")


@dataclass(frozen=True)
class Value:
    """What may stand in a place: `kinds` out of refs, anywhere (refs, here or at remotes), files, dirs, remotes; and
    fixed words."""

    kinds: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def or_else(self, other: "Value") -> "Value":
        return Value(_unique(self.kinds + other.kinds), _unique(self.words + other.words))


@dataclass(frozen=True)
class Option:
    """`value` is None for a flag."""

    names: tuple[str, ...]
    value: Value | None
    help: str


@dataclass(frozen=True)
class Command:
    """`places` are the values of positions one by one, `rest` of all that follow (None: nothing follows)."""

    name: str
    summary: str
    options: tuple[Option, ...]
    places: tuple[Value, ...] = ()
    rest: Value | None = None
    commands: tuple["Command", ...] = ()


def read_tree(command: Any, name: str = "llmos") -> Command:
    """The tree below a built command (`typer.main.get_command(app)`)."""
    options = [_option(param) for param in command.params if param.param_type_name == "option" and not param.hidden]
    if not any("--help" in option.names for option in options):
        options.append(Option(("--help", "-h"), None, "Show help and exit."))
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    places, rest = _places(arguments)
    children = tuple(
        read_tree(child, verb) for verb, child in getattr(command, "commands", {}).items() if not child.hidden
    )
    return Command(name, _first_line(command.help), tuple(options), places, rest, children)


def leaves(tree: Command) -> Iterator[tuple[str, Command]]:
    """Every command that is not the root, by its words: ("remote add", ...)."""
    for child in tree.commands:
        yield child.name, child
        for words, below in leaves(child):
            yield f"{child.name} {words}", below


def _option(param: Any) -> Option:
    is_flag = param.is_flag or param.count
    value = None if is_flag else _value(param)
    return Option(tuple(sorted({*param.opts, *param.secondary_opts}, key=_long_first)), value, _first_line(param.help))


def _places(arguments: list[Any]) -> tuple[tuple[Value, ...], Value | None]:
    places: list[Value] = []
    for index, argument in enumerate(arguments):
        value = _value(argument)
        places.append(value)
        if argument.nargs == -1:
            for later in arguments[index + 1 :]:
                value = value.or_else(_value(later))
            return tuple(places), value
    return tuple(places), None


def _value(param: Any) -> Value:
    metavar = param.metavar or ""
    if _CHOICES.match(metavar):
        return Value(words=tuple(metavar.split("|")))
    choices = getattr(param.type, "choices", None) or ()
    if metavar.startswith(_ANYWHERE):
        return Value(("anywhere",))
    kinds = _unique(tuple(_KINDS[word] for word in re.findall(r"[A-Z]+", metavar) if word in _KINDS))
    if not kinds and getattr(param.type, "name", "") in ("path", "file", "directory"):
        kinds = ("files",)
    return Value(kinds, tuple(str(getattr(choice, "value", choice)) for choice in choices))


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _long_first(name: str) -> tuple[bool, str]:
    return (not name.startswith("--"), name)


def _unique(items: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))

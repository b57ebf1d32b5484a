"""What the pickle of a torch file says about its storages. Nothing in it is executed, imported or called.

pickletools, of the standard library, decodes the opcodes; a small machine follows strings, numbers, tuples and
dictionaries, knows by name the few functions with which torch rebuilds a tensor, and takes all else for a blank.
What it says is a hint for the codec and a name to show: no byte of a file depends on it.
"""

import pickletools
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

from llmos_cli.formats import limits
from llmos_cli.formats.safetensors import DTYPE_BITS

DTYPES: Final = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "QInt8Storage": "I8", "QUInt8Storage": "U8",
    "QInt32Storage": "I32", "uint16": "U16", "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
BYTES: Final = "U8"  # the dtype of a storage of which no more is known

_REBUILD: Final = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3")
_PARAMETER: Final = ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state")
_ATOMS: Final = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1",
    "LONG4",
}  # fmt: skip
_NAME_CHARACTERS: Final = 500


@dataclass(frozen=True)
class Storage:
    """A storage: the number that names its entry, how its bytes are to be read, and, where one tensor fills it, that
    tensor's path in the pickled dictionaries ("model.embed.weight") and its shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    name: str = ""

    @property
    def size(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class _Global:
    name: str


_BLANK: Final = object()


def read_storages(data: bytes) -> dict[str, Storage]:
    """The storages that a pickle mentions, by their keys; those found before the first thing that makes no sense."""
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number == limits.PICKLE_OPCODES:
                break
            machine.step(opcode, argument)
    except (ValueError, LookupError, TypeError, ArithmeticError, struct.error, Warning):
        pass  # bytes that are no pickle; a Warning where those are errors: an odd escape in a protocol 0 string
    found = dict(machine.storages)
    for name, tensor in _tensors(machine.stack[-1] if machine.stack else None):
        if not found[tensor.key].name:
            found[tensor.key] = replace(tensor, name=name)
    return found


class _Machine:
    """The stack and the memo of an unpickler."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.storages: dict[str, Storage] = {}
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        stack = self.stack
        match opcode.name:
            case name if name in _ATOMS:
                stack.append(argument if _is_short(argument) else _BLANK)
            case "MARK":
                self._marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(_Global(argument))
            case "STACK_GLOBAL":
                names = self._pop(2)
                stack.append(_Global(" ".join(names)) if all(isinstance(name, str) for name in names) else _BLANK)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(self._pop_mark()))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                self._set(self._pop(2))
            case "SETITEMS":
                self._set(self._pop_mark())
            case "STOP":  # leaves the result where it is
                pass
            case "BUILD":  # its state makes no difference to a dictionary
                self._pop(1)
            case "REDUCE":
                stack.append(self._call(*self._pop(2)))
            case "BINPERSID":
                stack.append(self._storage(self._pop(1)[0]))
            case _:
                self._blank(opcode)

    def _pop(self, count: int) -> list[Any]:
        if count > len(self.stack) - (self._marks[-1] if self._marks else 0):
            raise IndexError
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _pop_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if isinstance(key, str | int))

    def _blank(self, opcode: pickletools.OpcodeInfo) -> None:
        """Any other opcode: what it takes is taken, what it leaves is blank."""
        before = opcode.stack_before
        if pickletools.markobject in before:
            self._pop_mark()
            before = before[: before.index(pickletools.markobject)]
        self._pop(len(before))
        self.stack.extend(_BLANK for kind in opcode.stack_after)

    def _storage(self, told: Any) -> Any:
        match told:
            case ("storage", _Global(name), str(key), _, int(count)) if count >= 0:
                storage = Storage(key, DTYPES.get(name.rpartition(" ")[2], BYTES), (count,))
                return self.storages.setdefault(key, storage)
        return _BLANK

    def _call(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Global("collections OrderedDict"), ():
                return {}
            case _Global(name), (Storage() as tensor, *_) if name in _PARAMETER:
                return tensor
            case _Global(name), (Storage() as storage, 0, tuple(shape), tuple(strides), *rest) if name in _REBUILD:
                dtype = storage.dtype
                if len(rest) > 2 and isinstance(rest[2], _Global):  # an untyped storage, as torch writes newer dtypes
                    dtype = DTYPES.get(rest[2].name.removeprefix("torch "), BYTES)
                if _is_dense(shape, strides):
                    tensor = Storage(storage.key, dtype, shape)
                    return tensor if tensor.size == storage.size else _BLANK
        return _BLANK


def _is_short(atom: Any) -> bool:
    """Long numbers and texts are of no use here, and could be made to cost time."""
    return len(atom) <= _NAME_CHARACTERS if isinstance(atom, str) else -1 < atom < 1 << 62


def _is_dense(shape: tuple[Any, ...], strides: tuple[Any, ...]) -> bool:
    """Whether the elements follow each other, row after row."""
    if not len(shape) == len(strides) <= limits.SAFETENSORS_RANK or not all(type(extent) is int for extent in shape):
        return False
    dense = [prod(shape[number + 1 :]) for number in range(len(shape))]
    return all(extent == 1 or stride == step for extent, stride, step in zip(shape, strides, dense, strict=True))


def _tensors(root: Any) -> Iterator[tuple[str, Storage]]:
    """The tensors in dictionaries of dictionaries, and their paths."""
    seen: set[int] = set()
    open_tables: list[tuple[str, Iterator[tuple[Any, Any]]]] = [("", iter([("", root)]))]
    while open_tables:
        path, items = open_tables[-1]
        for key, value in items:
            name = f"{path}.{key}" if path else str(key)
            if isinstance(value, Storage) and len(name) <= _NAME_CHARACTERS:
                yield name, value
            elif isinstance(value, dict) and id(value) not in seen and len(open_tables) < limits.PICKLE_DEPTH:
                seen.add(id(value))
                open_tables.append((name, iter(value.items())))
                break
        else:
            open_tables.pop()

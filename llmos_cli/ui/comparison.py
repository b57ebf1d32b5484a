"""How a comparison of two objects reads: a summary, then what differs, what changed most first, a screenful of each.

Takes the result of `store.diff.compare`; the values it shows come from outside and are spelled out on one line.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmos_cli.ui.facts import json_text
from llmos_cli.ui.output import Output
from llmos_cli.ui.text import count, percent, plural, safe_line, shorten, size

if TYPE_CHECKING:
    from llmos_cli.store.inspect.census import Tensor
    from llmos_cli.store.inspect.changes import Change, Changes
    from llmos_cli.store.inspect.diff import Comparison, FileDiff
    from llmos_cli.store.inspect.distance import Distance
    from llmos_cli.store.inspect.tensordiff import TensorDiff

STATUSES = ("equal", "changed", "added", "removed")
SHOWN_MOVED = 15
SHOWN_OTHER = 8
SHOWN_FILES = 10
SHOWN_CHANGES = 8
NARROW_COLUMNS = 80  # below this, names of tensors need more room than some numbers
VALUE_WIDTH = 34
VALUE_WIDTH_ALL = 500
_RESHAPED = ("shape", "added", "removed", "dtype", "values")
_ID = re.compile("[0-9a-f]{64}")


def summary_facts(found: "Comparison") -> list[tuple[str, str]]:
    """Names and values for `fact_lines`: what is equal, what changed and by how much."""
    facts = []
    if found.old.kind != found.new.kind:
        facts.append(("kind", f"{found.old.kind} -> {found.new.kind}"))
    facts.append(("size", f"{size(found.old.size)} -> {size(found.new.size)}, {size(found.shared)} in common"))
    tensors = found.tensors.tensors
    if tensors:
        facts.append(("tensors", _tensor_counts(found)))
    dtypes = Counter(
        f"{tensor.old.info.dtype} -> {tensor.new.info.dtype}"
        for tensor in tensors
        if tensor.old and tensor.new and tensor.old.info.dtype != tensor.new.info.dtype
    )
    if dtypes:
        facts.append(("dtypes", ", ".join(f"{count(number)} {change}" for change, number in dtypes.most_common(3))))
    if found.tensors.changed:
        share = _share(found.tensors.changed, found.tensors.words)
        facts.append(("values", f"{count(found.tensors.changed)} of {count(found.tensors.words)} differ ({share})"))
    overall = found.tensors.overall
    if overall and overall.changed:
        length = f"L2 {_number(overall.relative)}, cosine {_cosine(overall)}, largest {_number(overall.largest)}"
        facts.append(("change", f"{length}, over the changed tensors"))
    if overall and any(overall.infinite):
        old, new = (count(number) for number in overall.infinite)
        facts.append(("not finite", f"{old} -> {new} values are infinite or NaN, in the changed tensors"))
    statuses = Counter(file.status for file in found.files)
    counts = [f"{count(statuses[status])} {status}" for status in STATUSES if statuses[status]]
    facts.append(("files", ", ".join(counts) or "none"))
    return facts


def _tensor_counts(found: "Comparison") -> str:
    tensors = found.tensors.tensors
    statuses = Counter(tensor.status for tensor in tensors)
    if statuses["equal"] < len(tensors):
        sizes = {
            status: f"{count(statuses[status])} {status} ({size(sum(t.size for t in tensors if t.status == status))})"
            for status in STATUSES
        }
        return ", ".join(sizes[status] for status in STATUSES if statuses[status])
    files = [file for file in found.files if file.has_tensors]
    text = f"all {count(len(tensors))} equal"
    if all(file.equal for file in files):
        return text
    old, new = (sum(side is not None for side in sides) for sides in zip(*((f.old, f.new) for f in files), strict=True))
    layout = f"{plural(old, 'file')} -> {plural(new, 'file')}" if old != new else "names, order or format"
    return f"{text}; only the files they lie in differ ({layout})"


class DiffPage:
    """What stands below the summary: a screenful, or with `everything` all of it."""

    def __init__(self, out: Output, everything: bool) -> None:
        self._out = out
        self._everything = everything

    def show(self, found: "Comparison") -> None:
        tensors = [tensor for tensor in found.tensors.tensors if not tensor.equal]
        self._moved([tensor for tensor in tensors if tensor.distance and tensor.distance.changed])
        self._other([tensor for tensor in tensors if _reshaped(tensor)])
        sides = (side for tensor in tensors for side in (tensor.old, tensor.new) if side)
        self._files([file for file in found.files if not file.equal], {side.file.path for side in sides})
        self._changes("meta", found.meta)
        if found.old.recipe and found.new.recipe and found.old.recipe.command != found.new.recipe.command:
            self._line()
            self._line("made by")
            commands = (json_text(recipe.command) for recipe in (found.old.recipe, found.new.recipe))
            self._line(safe_line(f"  ~ command: {' -> '.join(commands)}"))
        else:
            self._changes("made by", found.recipe)

    def _moved(self, tensors: "list[TensorDiff]") -> None:
        if not tensors:
            return
        valued = any(tensor.distance and tensor.distance.largest is not None for tensor in tensors)
        ordered = self._cut(sorted(tensors, key=_movement), SHOWN_MOVED)
        self._line()
        columns = [tensor.distance and _columns(tensor.distance) for tensor in ordered]
        rows = [[tensor.name, *cells] for tensor, cells in zip(ordered, columns, strict=True) if cells]
        if valued:
            titles = ["tensor", "L2", "values", "largest", "cosine", "bits", "mean"]
            spare = {5, 6} if self._out.width >= NARROW_COLUMNS else {3, 4, 5, 6}
            self._out.table(titles, rows, right=range(1, 7), spare=spare)
        else:
            rows = [[row[0], row[2], row[5]] for row in rows]
            self._out.table(["tensor", "values", "bits"], rows, right={1, 2})
        self._more(len(tensors) - len(ordered))

    def _other(self, tensors: "list[TensorDiff]") -> None:
        if not tensors:
            return
        tensors.sort(key=lambda tensor: (_RESHAPED.index(_reshaped(tensor) or ""), -tensor.size, tensor.name))
        shown = self._cut(tensors, SHOWN_OTHER)
        self._line()
        rows = [[tensor.name, _reshaped(tensor) or "", _kind(tensor.old), _kind(tensor.new)] for tensor in shown]
        self._out.table(["tensor", "change", "old", "new"], rows)
        self._more(len(tensors) - len(shown))

    def _files(self, files: "list[FileDiff]", moved: set[str]) -> None:
        if not files:
            return
        shown = self._cut(files, SHOWN_FILES)
        self._line()
        self._line("files")
        width = max(len(safe_line(file.path)) for file in shown)
        for file in shown:
            parts = [f"{safe_line(file.path):<{width}}", f"{file.status:<7}", _sizes(file), _inside(file, moved)]
            self._line(("  " + "  ".join(parts)).rstrip())
            if file.values:
                self._items(file.values, "    ")
        self._more(len(files) - len(shown))

    def _changes(self, title: str, changes: "Changes") -> None:
        if changes.count:
            self._line()
            self._line(title)
            self._items(changes, "  ")

    def _items(self, changes: "Changes", indent: str) -> None:
        shown = self._cut(changes.items, SHOWN_CHANGES)
        width = VALUE_WIDTH_ALL if self._everything else VALUE_WIDTH
        for change in shown:
            self._line(indent + _change(change, width))
        self._more(changes.count - len(shown), indent)

    def _cut(self, items: "Sequence[Any]", number: int) -> "Sequence[Any]":
        """No list is cut to hide a single item."""
        return items if self._everything or len(items) <= number + 1 else items[:number]

    def _more(self, number: int, indent: str = "  ") -> None:
        if number:
            self._line(f"{indent}and {count(number)} more" + ("" if self._everything else " (--all lists them)"))

    def _line(self, text: str = "") -> None:
        self._out.line(text)


def _movement(tensor: "TensorDiff") -> tuple[float, str]:
    """What changed most comes first: what broke or grew out of nothing, then by length of the change, or its share."""
    found = tensor.distance
    assert found
    if found.largest is None:
        return -found.changed / max(1, found.compared), tensor.name
    return -(float("inf") if found.relative is None or _broke(found) else found.relative), tensor.name


def _broke(found: "Distance") -> bool:
    """Whether there are more infinities and NaN than before."""
    return found.infinite[1] > found.infinite[0]


def _reshaped(tensor: "TensorDiff") -> str | None:
    """What no row of numbers says: that a tensor is new or gone, has another shape or, unmeasured, dtype or values."""
    old, new = tensor.old, tensor.new
    if not old or not new:
        return tensor.status
    if old.info.shape != new.info.shape:
        return "shape"
    if tensor.distance:
        return None
    return "dtype" if old.info.dtype != new.info.dtype else "values"


def _columns(found: "Distance") -> list[str]:
    bits = "-" if found.bits is None else f"{found.bits:.2f}"
    share = _share(found.changed, found.compared)
    return [_relative(found), share, _number(found.largest), _cosine(found), bits, _number(found.mean)]


def _kind(tensor: "Tensor | None") -> str:
    return f"{tensor.info.dtype} [{','.join(map(str, tensor.info.shape))}]" if tensor else "-"


def _sizes(file: "FileDiff") -> str:
    return " -> ".join(size(side) for side in (file.old, file.new) if side is not None)


def _inside(file: "FileDiff", moved: set[str]) -> str:
    if file.status != "changed":
        return ""
    if file.has_tensors:
        return "its tensors" if file.path in moved else "the same tensors"
    if file.values:
        return plural(file.values.count, "value") if file.values.count else "same values, written otherwise"
    if file.lines:
        added, removed = file.lines.added, file.lines.removed
        return f"{plural(added, 'line')} added, {count(removed)} removed" if added or removed else "lines moved"
    return ""


def _change(change: "Change", width: int) -> str:
    status = change.status
    old, new = (shorten(_value(value), width) for value in (change.old, change.new))
    path = shorten(change.path, 2 * width) or "(all)"
    text = {"added": f"+ {path}: {new}", "removed": f"- {path}: {old}"}.get(status, f"~ {path}: {old} -> {new}")
    return safe_line(text)


def _value(value: Any) -> str:
    return f"@{value[:12]}" if isinstance(value, str) and _ID.fullmatch(value) else json_text(value)


def _share(part: int, whole: int) -> str:
    if 0 < part < whole / 2000:
        return "<0.1 %"
    return ">99.9 %" if whole > part > whole * 0.9995 else percent(part, whole)


def _relative(found: "Distance") -> str:
    if _broke(found):
        return "NaN/inf"
    return "from 0" if found.relative is None and found.largest else _number(found.relative)


def _number(value: float | None) -> str:
    """Three digits of it, so that columns align."""
    if value is None:
        return "-"
    return f"{value:#.3g}".rstrip(".") if value else "0"


def _cosine(found: "Distance") -> str:
    if found.cosine is None:
        return "-"
    return ">0.999999" if found.cosine >= 0.9999995 and found.relative else f"{found.cosine:.6f}"

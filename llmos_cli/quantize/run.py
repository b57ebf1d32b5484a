"""Quantizing as a derivation: the same model, recipe and calibration data give the same object, and a repeat finds it.

Imports no torch until there is something to compute, so that a repeat returns at once.
"""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from llmos_cli import __version__
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.manifest import Manifest, Recipe
from llmos_cli.formats.names import RefName
from llmos_cli.models.schemes import FP8, GROUPS, INT8, W8A8, Form, int4
from llmos_cli.progress import Progress
from llmos_cli.quantize.against import check_fit
from llmos_cli.store.inspect.tensors import tensor_table
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.recipes import find_made
from llmos_cli.store.transaction import Transaction, begin

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

SCHEMES: Final = ("int8", "int4", "w8a8", "fp8")
METHODS: Final = {
    "int8": ("rtn",),
    "int4": ("gptq", "awq", "search", "hqq", "rtn"),
    "w8a8": ("smooth", "rtn"),
    "fp8": ("rtn",),
}
"""How values are found, by scheme: the default with a dataset first."""
CALIBRATED: Final = frozenset({"gptq", "awq", "smooth"})
DEFAULT_GROUP: Final = 32
CALIBRATION_ROWS: Final = 128
_SHARE = re.compile(r"0?\.\d+", re.ASCII)


@dataclass(frozen=True)
class Request:
    """What to make: the form of the weights and how their values are found. `data` is the dataset to calibrate on, of
    which `rows` evenly spaced rows are taken; `bits` a size to be met by layers of different forms; `sparsity` what is
    set to zero before (prune.py). `plain_ends`: the embedding and the head, and layers that cannot take the form, stay
    as they are instead of taking eight bits."""

    form: Form
    method: str = "rtn"
    data: ObjectId | None = None
    rows: int = CALIBRATION_ROWS
    bits: float | None = None
    sparsity: str | None = None
    plain_ends: bool = False


@dataclass(frozen=True)
class QuantizeResult:
    """`bytes_*` are those of the tensors; `kept` says by layer why it has not the form that was asked for."""

    id: ObjectId
    made_before: bool
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    kept: dict[str, str]
    method: str


def make_request(
    scheme: str,
    *,
    group: int | None,
    method: str | None,
    data: ObjectId | None,
    rows: int,
    bits: float | None = None,
    sparsity: str | None = None,
    plain_ends: bool = False,
) -> Request:
    """Check what was asked for; raises UsageError. Without a method, weights are calibrated if there is a dataset."""
    known = METHODS[scheme]
    if group is not None and scheme != "int4":
        raise UsageError(f"--group is for --scheme int4: {scheme} has one scale a row", hint="leave out --group")
    if method is not None and method not in known:
        raise UsageError(f"--method {method} is not for --scheme {scheme}", hint=f"use {' or '.join(known)}")
    form = {"int8": INT8, "w8a8": W8A8, "fp8": FP8}.get(scheme) or int4(DEFAULT_GROUP if group is None else group)
    if form.group and form.group not in GROUPS:
        raise UsageError(f"--group {group} is not offered", hint=f"use one of {', '.join(map(str, GROUPS))}")
    if bits is not None and (scheme != "int4" or group is not None):
        raise UsageError("--bits chooses between int4 and int8, and groups, by itself", hint="leave out --group")
    if bits is not None and plain_ends:
        raise UsageError("--bits mixes forms that only transformers and llama.cpp read", hint="leave out --bits")
    if sparsity is not None and method in CALIBRATED:
        raise UsageError(f"--method {method} would fill the zeros of --sparsity", hint="use --method search or rtn")
    free = data is None or sparsity is not None
    method = method or next(one for one in known if not free or one not in CALIBRATED)
    sparse = None if sparsity is None else read_sparsity(sparsity)
    if method not in CALIBRATED:
        return Request(form, method, data if bits is not None else None, rows, bits, sparse, plain_ends)
    if data is None:
        raise UsageError(f"--method {method} needs a dataset to calibrate on", hint="name one with --data REF")
    return Request(form, method, data, rows, bits, None, plain_ends)


def quantize(
    store: Store,
    source: ObjectId,
    request: Request,
    ref: RefName | None,
    *,
    compared_on: ObjectId | None = None,
    max_memory: int | None = None,
    started: Callable[[int], None] | None = None,
    progress: Progress,
) -> QuantizeResult:
    """Make (or find) a quantized form of the model `source` and move `ref` to it. A dataset that it will be compared on
    is checked to fit before the work begins. `started` is told the bytes of memory that it is about to take.

    Raises UsageError for what is no model, is quantized already or takes more than `max_memory`, Damaged for damaged
    weights; nothing changes then.
    """
    manifest, recipe = read_manifest(store, source), _recipe(source, request)
    with begin(store, purpose="quantize", ref=ref) as tx:
        made = find_made(store, recipe)
        if made is None and compared_on is not None:
            check_fit(store, manifest, compared_on)
        result = (
            read_manifest(store, made)
            if made is not None
            else _make(tx, manifest, recipe, request, max_memory, started, progress)
        )
        commit = tx.commit(
            result, message=f"quantize: {request.form.name}, {result.meta['bits_per_weight']} bits a weight"
        )
    kept, bits = result.meta["kept"], result.meta["bits_per_weight"]
    if not isinstance(kept, dict) or not isinstance(bits, int | float):
        raise Damaged(f"the quantized model @{commit.id.short} has malformed facts")
    return QuantizeResult(
        commit.id,
        made is not None,
        _tensor_bytes(store, manifest),
        _tensor_bytes(store, result),
        float(bits),
        {name: str(reason) for name, reason in kept.items()},
        request.method,
    )


def _make(
    tx: Transaction,
    manifest: Manifest,
    recipe: Recipe,
    request: Request,
    max_memory: int | None,
    started: Callable[[int], None] | None,
    progress: Progress,
) -> Manifest:
    from llmos_cli.quantize.measure import sample_rows
    from llmos_cli.quantize.memory import check_memory, peak_bytes
    from llmos_cli.quantize.mixed import choose
    from llmos_cli.quantize.plan import make_plan
    from llmos_cli.quantize.write import ROUNDINGS, Nothing, write_quantized

    store, calibrating = tx.store, request.data is not None
    plan = make_plan(store, manifest, request.form, plain_ends=request.plain_ends)
    needed = peak_bytes(plan, calibrated=calibrating)
    check_memory(needed, max_memory)
    if started is not None:
        started(needed)
    rows = None
    if request.data is not None:
        rows = sample_rows(store, manifest, read_manifest(store, request.data), request.rows).input_ids
    if request.bits is not None:
        choices = choose(store, manifest, plan, request.bits, rows, progress=progress)
        plan = make_plan(store, manifest, request.form, choices, plain_ends=request.plain_ends)
    values: AbstractContextManager[Any] = nullcontext(Nothing())
    if request.method in CALIBRATED and rows is not None:
        from llmos_cli.quantize.calibrate import calibrated

        values = calibrated(store, manifest, plan, request.method, rows, recipe, progress=progress)
    rounding = ROUNDINGS.get(request.method, ROUNDINGS["search"])  # of what is not in a block
    with values as known:
        return write_quantized(
            tx,
            manifest,
            recipe,
            plan,
            asked=request.form,
            rounding=rounding,
            calibrated=known,
            sparsity=request.sparsity,
            progress=progress,
        )


def read_sparsity(text: str) -> str:
    """The canonical word for "2:4" or a share of zeros; raises UsageError."""
    if text == "2:4":
        return text
    if _SHARE.fullmatch(text) and 0 < float(text) < 1:
        return f"{float(text):g}"
    raise UsageError(f"--sparsity {text!r} is neither a share of zeros nor 2:4", hint="use --sparsity 0.5 or 2:4")


def _recipe(source: ObjectId, request: Request) -> Recipe:
    params: dict[str, Json] = {"scheme": request.form.name}
    if request.form.group:
        params |= {"group": request.form.group, "method": request.method, "version": 2}  # 1 had no negative scales
    elif request.method in CALIBRATED:
        params |= {"method": request.method}
    if request.bits is not None:
        params["bits"] = request.bits
    if request.plain_ends:
        params["plain_ends"] = True
    if request.sparsity is not None:
        params["sparsity"] = request.sparsity
    inputs = {"model": source}
    if request.data is not None:
        params["rows"] = request.rows
        inputs["data"] = request.data
    # Elementwise arithmetic does not depend on the build of torch (after the "+"); products of matrices do.
    torch = version("torch") if request.data is not None else version("torch").partition("+")[0]
    return Recipe("quantize", params=params, inputs=inputs, tools={"llmos": __version__, "torch": torch})


def _tensor_bytes(store: Store, manifest: Manifest) -> int:
    return sum(info.end - info.start for _, info in tensor_table(store, manifest).values())

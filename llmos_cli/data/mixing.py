"""A mix: a dataset that names others and how often each is drawn from, without a second copy of a byte.

Its manifest holds the others' files, each in a folder of its own, and in `mix` what they are: so whatever keeps, moves
or checks a dataset does it with a mix. Which row a slot holds is a function once more: slots come in runs in which the
datasets stand exactly in their proportions, scattered by a keyed permutation, and each dataset is gone through in its
own order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from typing import Any, Final

import numpy as np

from llmos_cli import __version__
from llmos_cli.data.order import Order, Rows, order_of, rows_of, run_indices, scattered
from llmos_cli.errors import Damaged, UsageError
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ObjectId, parse_id
from llmos_cli.formats.manifest import Manifest, Recipe
from llmos_cli.formats.names import RefName
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.resolve import resolve
from llmos_cli.store.transaction import Commit, begin

MIX: Final = "mix"
MAX_SHARES: Final = 10_000
_TOKENIZER: Final = "tokenizer/"
_SAME: Final = ("task", "seq_len", "dtype", "vocab_size", "eos_token_id", "pad_token_id", "mask_token_id")
_RUN: Final = 1024  # slots, at least, in which proportions are exact


@dataclass(frozen=True)
class Share:
    """A dataset and its weight in a mix, as whole shares."""

    name: str
    weight: Fraction


def parse_mix(text: str) -> tuple[Share, ...]:
    """Read "web:3,code:1" (weights are shares of rows, 1 if left out); a tag is written "web:v2:3"."""
    shares = []
    for part in text.split(","):
        name, colon, weight = part.strip().rpartition(":")
        try:
            value = Fraction(weight)
        except (ValueError, ZeroDivisionError):
            name, colon, value = part.strip(), ":", Fraction(1)
        if not name or not colon or value <= 0:
            raise UsageError(f"{part!r} names no dataset and weight", hint="write --mix web:3,code:1")
        shares.append(Share(name, value))
    total = sum(_whole(shares))
    if total > MAX_SHARES:
        raise UsageError(f"the weights make {total:,} shares, more than {MAX_SHARES:,}", hint="round the weights")
    return tuple(shares)


def make_mix(store: Store, ref: RefName, shares: Sequence[Share]) -> tuple[Commit, Manifest]:
    """Point `ref` to a mix of datasets that were made with one tokenizer, for one task and row length.

    Raises UsageError if they differ in that.
    """
    found = [resolve(store, share.name) for share in shares]
    parts = [read_manifest(store, item.id) for item in found]
    for share, part in zip(shares, parts, strict=True):
        _check_alike(share.name, part, shares[0].name, parts[0])
    if len({item.id for item in found}) < len(found):
        raise UsageError("a dataset is named twice", hint="add up its weights")
    weights = _whole(shares)
    files = [entry for entry in parts[0].files if entry.path.startswith(_TOKENIZER)]
    mixed: list[Json] = []
    for number, (item, part, weight) in enumerate(zip(found, parts, weights, strict=True)):
        folder = f"{MIX}/{number:03}/"
        files += [replace(entry, path=folder + entry.path) for entry in part.files if entry not in files]
        facts = {key: part.meta[key] for key in ("documents", "tokens", "rows", "text_bytes", "splits")}
        mixed.append({"id": str(item.id), "weight": weight, **facts})
    same = {key: parts[0].meta[key] for key in (*_SAME, "labels") if key in parts[0].meta}
    text_bytes, tokens = _sum(parts, "text_bytes"), _sum(parts, "tokens")
    meta: dict[str, Json] = {
        **same,
        MIX: mixed,
        **{key: _sum(parts, key) for key in ("documents", "tokens", "rows", "shards", "text_bytes")},
        "bytes_per_token": round(text_bytes / max(1, tokens), 4),
    }
    recipe = Recipe(
        "shard",
        params={MIX: list(weights)},
        inputs={f"dataset{number:03}": item.id for number, item in enumerate(found)},
        tools={"llmos": __version__},
    )
    with begin(store, purpose="mix", ref=ref) as tx:
        manifest = Manifest("dataset", tuple(files), meta, recipe)
        return tx.commit(manifest, message=f"mix: {len(parts)} datasets"), manifest


def folders_of(manifest: Manifest) -> list[str]:
    """Where the datasets of a mix lie; of any other dataset, the top."""
    mix = manifest.meta.get(MIX)
    return [f"{MIX}/{number:03}/" for number in range(len(mix))] if isinstance(mix, list) else [""]


def training_order(dataset_id: ObjectId, manifest: Manifest, row_bytes: int, seed: int) -> Order:
    """The order in which a dataset, or a mix, is trained on."""
    mix = manifest.meta.get(MIX)
    if not isinstance(mix, list):
        return order_of(rows_of(dataset_id, _rows(manifest.meta, dataset_id), row_bytes), seed)
    parts: list[Rows] = []
    weights: list[int] = []
    first = 0
    for part in mix:
        weight = part.get("weight") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(weight, int) or weight < 1:
            raise Damaged(f"mix @{dataset_id.short} does not say its weights")
        rows = _rows(part, dataset_id)
        parts.append(rows_of(parse_id(str(part.get("id"))), rows, row_bytes, first=first, among=len(mix)))
        weights.append(weight)
        first += rows
    return mixed_order(dataset_id, parts, weights, seed)


def mixed_order(dataset_id: ObjectId, parts: Sequence[Rows], weights: Sequence[int], seed: int) -> Order:
    """Slots are filled from `parts` in proportion to `weights`, exactly so in every run of slots."""
    if any(part.count < 1 for part in parts):
        raise UsageError("a dataset of the mix has no rows", hint="leave it out of the mix")
    times = -(-_RUN // sum(weights))
    shares = np.array(weights, np.int64) * times
    ends, size = np.cumsum(shares), int(shares.sum())

    def slots(wanted: range) -> np.ndarray:
        found = []
        for run in range(wanted.start // size, -(-wanted.stop // size)):
            which = np.searchsorted(ends, scattered(dataset_id, seed, run, size), side="right")
            rows = np.empty(size, np.int64)
            for number, part in enumerate(parts):
                start = run * int(shares[number])
                rows[which == number] = run_indices(part, seed, range(start, start + int(shares[number])))
            found.append(rows)
        return np.concatenate(found)[wanted.start % size :][: len(wanted)]

    return Order(slots)


def _whole(shares: Sequence[Share]) -> list[int]:
    scale = lcm(*(share.weight.denominator for share in shares))
    return [int(share.weight * scale) for share in shares]


def _check_alike(name: str, part: Manifest, first_name: str, first: Manifest) -> None:
    if part.kind != "dataset" or MIX in part.meta or "splits" not in part.meta:
        what = "itself a mix" if MIX in part.meta else "not a dataset of this version"
        raise UsageError(f"{name} is {what}", hint="a mix is made of what llmos shard made of text")
    for key in _SAME:
        if part.meta.get(key) != first.meta.get(key):
            raise UsageError(
                f"{name} has {key} {part.meta.get(key)}, {first_name} has {first.meta.get(key)}",
                hint=f"shard the text with: --tokenizer {first_name} --seq-len {first.meta.get('seq_len')}",
            )
    if part.meta.get("labels") != first.meta.get("labels"):
        raise UsageError(
            f"{name} numbers its labels otherwise than {first_name}",
            hint=f"shard it with: --tokenizer {first_name} --labels-from {first_name}",
        )
    ours, theirs = (
        [entry for entry in manifest.files if entry.path.startswith(_TOKENIZER)] for manifest in (part, first)
    )
    if ours != theirs:
        raise UsageError(
            f"{name} was made with another tokenizer than {first_name}",
            hint=f"shard the text with: --tokenizer {first_name}",
        )


def _sum(parts: Sequence[Manifest], key: str) -> int:
    values: list[Any] = [part.meta.get(key) for part in parts]
    return sum(value for value in values if isinstance(value, int))


def _rows(facts: Mapping[str, Json], dataset_id: ObjectId) -> int:
    rows = facts.get("rows")
    if not isinstance(rows, int):
        raise Damaged(f"dataset @{dataset_id.short} does not say how many rows it has")
    return rows

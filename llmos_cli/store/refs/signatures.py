"""Signed refs: who has signed a ref's value, and whether that is enough to believe it.

Signatures lie beside the moves of their ref and go where it goes. Trusted keys are named in config.toml. The highest
serial that a trusted key has signed, here or in what was pulled, is the last one seen: a value with a lower one is an
old one shown again. Removing a ref forgets what was seen of it.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, NotFound, Unsafe, UsageError, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import RefEntry
from llmos_cli.formats.signature import (
    Signature,
    Statement,
    decode_signature,
    encode_signature,
    parse_public_key,
    parse_signature_name,
    signature_name,
    signed_bytes,
)
from llmos_cli.store.disk import durable
from llmos_cli.store.handle import Store
from llmos_cli.store.refs.keys import SigningKey, has_cryptography, verify
from llmos_cli.store.refs.refs import read_ref, ref_history

GOOD: Final = "good"
EXPIRED: Final = "expired"
UNKNOWN: Final = "unknown"
BAD: Final = "bad"
UNCHECKED: Final = "unchecked"


@dataclass(frozen=True)
class Signed:
    """A signature as it is judged: GOOD; EXPIRED; UNKNOWN, by a key that is not trusted; BAD, and `why`; or UNCHECKED.
    `name` is what the key is called in config.toml."""

    state: str
    name: str | None
    signature: Signature | None
    why: str = ""


def judge(data: bytes, trust: Mapping[str, str], ref: RefName, oid: ObjectId, now: datetime) -> Signed:
    """What a signature's file says about a value of a ref."""
    try:
        signature = decode_signature(data, f"a signature of {ref}")
    except Damaged as exc:
        return Signed(BAD, None, None, exc.message)
    statement = signature.statement
    name = _names(trust).get(signature.key)
    if not verify(signature.key, signed_bytes(statement), signature.value):
        return Signed(BAD, name, signature, "it was not made with the key that it names")
    if statement.ref != ref:
        return Signed(BAD, name, signature, f"it is for {statement.ref}")
    if statement.id != oid:
        return Signed(BAD, name, signature, f"it is for @{statement.id.short}")
    if name is None:
        return Signed(UNKNOWN, None, signature)
    if statement.expires and datetime.fromisoformat(statement.expires) <= now:
        return Signed(EXPIRED, name, signature)
    return Signed(GOOD, name, signature)


def require_signed(store: Store, ref: RefName, oid: ObjectId, files: Sequence[bytes], where: str) -> Signed:
    """The newest good signature of a value that was found at `where`; raises Unsafe if it must not be believed.

    One good signature is enough, but a bad one beside it is a sign that somebody is at work.
    """
    trust = store.config.trust
    if not trust:
        raise Unsafe("no key is trusted here, so nothing counts as signed", hint=_TRUST)
    now = datetime.now(UTC)
    judged = [judge(data, trust, ref, oid, now) for data in files]
    bad = next((item for item in judged if item.state == BAD), None)
    if bad:
        raise Unsafe(f"{ref} at {where} has a signature that is not good: {bad.why}", hint=_ASK)
    good = [item for item in judged if item.state == GOOD]
    if not good:
        raise Unsafe(f"{ref} at {where} {_lacking(judged)}", hint=_ASK)
    best = max(good, key=_serial)
    seen = last_seen(store, ref)
    if seen and (_serial(best) < seen.serial or (_serial(best) == seen.serial and seen.id != oid)):
        raise Unsafe(
            f"{ref} at {where} is an earlier value: signed as number {_serial(best)}, and number {seen.serial} "
            f"(@{seen.id.short}) has been seen here",
            hint="if you signed the later one, push it; else ask who signs there: somebody may be showing you the past",
        )
    return best


def last_seen(store: Store, ref: RefName) -> Statement | None:
    """The statement of the highest serial about a ref that a trusted key has signed, expired or not."""
    trusted = _names(store.config.trust)
    found: Statement | None = None
    for data in _files(store, ref).values():
        try:
            signature = decode_signature(data, f"a signature of {ref}")
        except Damaged:
            continue
        statement = signature.statement
        if found and statement.serial <= found.serial:
            continue
        known = statement.ref == ref and signature.key in trusted
        if known and verify(signature.key, signed_bytes(statement), signature.value):
            found = statement
    return found


def sign_ref(store: Store, ref: RefName, key: SigningKey, *, days: float | None) -> Statement:
    """Sign a ref's value, for so many days (None: for ever). Raises NotFound."""
    entry = read_ref(store, ref)
    if entry is None:
        raise NotFound(f"no ref {ref} in this store", hint="list what there is: llmos ls")
    now = datetime.now(UTC)
    try:
        expires = (now + timedelta(days=days)).isoformat(timespec="seconds") if days is not None else None
    except OverflowError as exc:
        raise UsageError(f"{days:g} days from now is past the end of the calendar") from exc
    seen = last_seen(store, ref)
    own = [item.statement.serial for item in _read_all(_files(store, ref).values(), ref) if item.key == key.public]
    serial = max(entry.sequence, *(1 + number for number in [*own, *([seen.serial] if seen else [])]), 1)
    statement = Statement(ref, entry.id, entry.previous, serial, now.isoformat(timespec="seconds"), expires)
    keep_signatures(
        store, entry, [encode_signature(Signature(statement, key.public, key.sign(signed_bytes(statement))))]
    )
    return statement


def keep_signatures(store: Store, entry: RefEntry, files: Iterable[bytes]) -> None:
    """Put signatures beside the move they are of; those that are there stay."""
    folder = _folder(store, entry.ref)
    for data in files:
        target = folder / signature_name(entry.sequence, data)
        if target.exists():
            continue
        temp = durable.temp_path(store.tmp)
        with durable.new_file(temp) as file:
            durable.write_all(file, data)
        durable.publish_new(temp, target)


def signatures_of(store: Store, ref: RefName, oid: ObjectId) -> list[bytes]:
    """The files of the signatures that are about this value of a ref, whoever made them. What does not verify goes no
    further: readers take it for a forgery."""
    found = [item for item in _read_all(_files(store, ref).values(), ref) if item.statement.id == oid]
    if has_cryptography():
        found = [item for item in found if verify(item.key, signed_bytes(item.statement), item.value)]
    return [encode_signature(item) for item in found][: limits.SIGNATURES]


def signature_files(store: Store, ref: RefName) -> list[tuple[int, bytes]]:
    """Every signature of a ref that can be read, good or not, with the number of its move."""
    found = []
    for name, data in _files(store, ref).items():
        number = parse_signature_name(name)
        if number and any(True for _ in _read_all([data], ref)):
            found.append((number, data))
    return sorted(found)


def restore_signatures(store: Store, ref: RefName, files: Iterable[tuple[int, bytes]]) -> None:
    """Put signatures back beside the moves they were beside, as far as a move gives the ref the value that is signed;
    else beside the newest one that does."""
    log = ref_history(store, ref)
    for number, data in files:
        (signature,) = _read_all([data], ref)
        signed = [move for move in log if move.id == signature.statement.id]
        beside = next((move for move in signed if move.sequence == number), signed[0] if signed else None)
        if beside:
            keep_signatures(store, beside, [data])


def signers(store: Store, ref: RefName, oid: ObjectId, sequence: int | None = None) -> list[Signed]:
    """Everybody who has signed a move (None: the newest), judged by whom this store trusts."""
    if sequence is None:
        entry = read_ref(store, ref)
        sequence = entry.sequence if entry else 0
    files = [data for name, data in sorted(_files(store, ref).items()) if parse_signature_name(name) == sequence]
    return judge_all(store, ref, oid, files)


def judge_all(store: Store, ref: RefName, oid: ObjectId, files: Sequence[bytes]) -> list[Signed]:
    """What signatures' files say about a value of a ref, judged by whom this store trusts."""
    if files and not has_cryptography():
        return [Signed(UNCHECKED, None, None, "the package 'cryptography' is missing")]
    now = datetime.now(UTC)
    return [judge(data, store.config.trust, ref, oid, now) for data in files]


def _lacking(judged: Sequence[Signed]) -> str:
    expired = [item.signature.statement.expires for item in judged if item.state == EXPIRED and item.signature]
    if expired:
        return f"was signed until {max(str(time) for time in expired)}, which is over"
    if judged:
        return "is signed by nobody who is trusted here"
    return "is not signed"


def _serial(item: Signed) -> int:
    return item.signature.statement.serial if item.signature else 0


def _names(trust: Mapping[str, str]) -> dict[str, str]:
    return {parse_public_key(key): name for name, key in trust.items()}


def _read_all(files: Iterable[bytes], ref: RefName) -> Iterable[Signature]:
    for data in files:
        try:
            signature = decode_signature(data, f"a signature of {ref}")
        except Damaged:
            continue
        if signature.statement.ref == ref:
            yield signature


def _files(store: Store, ref: RefName) -> dict[str, bytes]:
    folder = _folder(store, ref)
    found: dict[str, bytes] = {}
    try:
        names = [name for name in os.listdir(folder) if parse_signature_name(name) is not None]
        for name in names:
            with open(folder / name, "rb") as file:
                found[name] = file.read(limits.SIGNATURE_BYTES + 1)
    except FileNotFoundError:
        return found  # the ref was removed
    except OSError as exc:
        raise from_os_error(exc, f"reading the signatures in {folder}") from exc
    return found


def _folder(store: Store, ref: RefName) -> Path:
    return store.refs / ref.name / ref.tag


_TRUST: Final = 'name whom you trust in config.toml: [trust], then a line: alice = "ed25519:..."'
_ASK: Final = "ask whoever signs there; without --require-signed it would be believed unsigned"

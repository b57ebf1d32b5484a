"""A signature in the ecosystem's own form beside the files of a checkout: a bundle of OpenSSF Model Signing (OMS) that
`model_signing verify`, and those who build on it, check without llmos.

It needs the package `model-signing`, and an elliptic-curve key of its own kind: OMS does not know our Ed25519 keys.
"""

import os
import stat
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from llmos_cli.errors import Unsafe, UsageError, from_os_error
from llmos_cli.store.checkout import CheckoutPlan
from llmos_cli.store.disk import durable

SIGNATURE_FILE: Final = "model.sig"
_NEW: Final = "make one: openssl ecparam -name prime256v1 -genkey -noout -out FILE"


def check_signing(plan: CheckoutPlan, key: Path) -> None:
    """Raise what would keep a checkout from being signed, before anything is written: UsageError for the package or the
    key, Unsafe if others may read that, or if the folder has files that the signature would cover and must not."""
    if not all(find_spec(name) for name in ("model_signing", "OpenSSL")):
        raise UsageError("an OMS signature needs the package 'model-signing'", hint="pip install 'llmos[oms]'")
    try:
        status = os.stat(key)
    except OSError as exc:
        raise from_os_error(exc, f"reading the key {key}") from exc
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise Unsafe(f"the key {key} can be read by others", hint=f"chmod 600 {key}; or make a new one")
    _signer(key)
    planned = {entry.path for entry in plan.files}
    if SIGNATURE_FILE in planned:
        raise Unsafe(f"the object has a file {SIGNATURE_FILE} of its own", hint="check it out without --oms")
    other = next((path for path in _files(plan.target) if path not in planned | {SIGNATURE_FILE}), None)
    if other:
        raise Unsafe(
            f"{plan.target} holds {other[:200]!r}, which is not part of the object and would be signed with it",
            hint="check out into a new folder",
        )


def sign_checkout(plan: CheckoutPlan, key: Path) -> Path:
    """Sign the files of a checkout that is there; returns where the signature is."""
    from model_signing.hashing import Config

    target = plan.target / SIGNATURE_FILE
    hashing = Config().set_ignored_paths(paths=[SIGNATURE_FILE])
    temp = durable.temp_path(plan.target)
    try:
        _signer(key).set_hashing_config(hashing).sign(plan.target, temp)
        durable.seal(temp, 0o644)
        durable.publish(temp, target)
    except BaseException:
        durable.remove(temp)
        raise
    return target


def _signer(key: Path) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from model_signing.signing import Config

    try:
        return Config().use_elliptic_key_signer(private_key=key)
    except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm):
        raise UsageError(f"{key} holds no private elliptic-curve key that can be read", hint=_NEW) from None


def _files(folder: Path) -> Iterator[str]:
    for at, subfolders, files in os.walk(folder):
        subfolders.sort()
        yield from (Path(at, name).relative_to(folder).as_posix() for name in sorted(files))

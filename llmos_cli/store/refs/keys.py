"""Ed25519 keys and signatures: the one place that knows the `cryptography` package.

A private key is a PEM file (PKCS #8, as `openssl genpkey -algorithm ed25519` writes it) that nobody but its owner may
read; a public key is the text "ed25519:" and 64 hex digits.
"""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from llmos_cli.errors import Unsafe, UsageError, from_os_error
from llmos_cli.formats.signature import KEY_PREFIX
from llmos_cli.store.disk import durable

_PRIVATE: Final = 0o600
_KEY_BYTES: Final = 4096


@dataclass(frozen=True)
class SigningKey:
    """`public` is the public key, 64 hex digits; `sign` makes the 64 bytes of a signature."""

    public: str
    sign: Callable[[bytes], bytes]


def has_cryptography() -> bool:
    return find_spec("cryptography") is not None


def require_cryptography() -> None:
    """Raise UsageError if signatures can be neither made nor checked here."""
    if not has_cryptography():
        raise UsageError("signatures need the package 'cryptography'", hint="pip install 'llmos[sign]'")


def new_key(path: Path) -> str:
    """Make a private key at `path`, where nothing may be yet; returns the public key as text."""
    require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _PRIVATE)
    except FileExistsError as exc:
        raise Unsafe(f"{path} exists: a key is never overwritten", hint="name a new file") from exc
    except OSError as exc:
        raise from_os_error(exc, f"writing {path}") from exc
    with open(fd, "wb", buffering=0) as file:
        durable.write_all(file, data)
    durable.seal(path, None)
    durable.sync_folder(path.absolute().parent)
    return KEY_PREFIX + _public(key)


def load_key(path: Path) -> SigningKey:
    """Read a private key; raises Unsafe if others may read its file, UsageError if it is no Ed25519 key."""
    require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(_KEY_BYTES)
    except OSError as exc:
        raise from_os_error(exc, f"reading the key {path}") from exc
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise Unsafe(f"the key {path} can be read by others", hint=f"chmod 600 {path}; or make a new one")
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError(f"{path} holds no private key that can be read", hint=_NEW) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} holds a key that is not Ed25519", hint=_NEW)
    return SigningKey(_public(key), key.sign)


def verify(public: str, message: bytes, signature: bytes) -> bool:
    """Whether the owner of a public key (64 hex digits) has signed a message."""
    require_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


_NEW: Final = "make one: llmos tag --new-key FILE"


def _public(key: object) -> str:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    assert isinstance(key, Ed25519PrivateKey)
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return raw.hex()

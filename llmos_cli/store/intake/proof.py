"""Whether a file is what others say it is: by SHA-256, as hubs and registries name big files, or by git's name."""

import os
import re
from pathlib import Path
from typing import BinaryIO, Final

from llmos_cli.errors import Damaged, from_os_error
from llmos_cli.formats import limits
from llmos_cli.formats.ids import IdHasher, ObjectId

SHA256: Final = "sha256"
GIT: Final = "git"
_BLOCK_BYTES: Final = 4 * limits.MiB
_NAMES: Final = {SHA256: re.compile(r"[0-9a-f]{64}\Z"), GIT: re.compile(r"[0-9a-f]{40}\Z")}


def digest_of(method: str, digits: object) -> str | None:
    """ "sha256:..." or "git:...", if the digits can be that; None if not."""
    return f"{method}:{digits}" if isinstance(digits, str) and _NAMES[method].match(digits) else None


def guess_digest(digits: str) -> str | None:
    """The digest that a file named by it has; None if its name is none."""
    return digest_of(SHA256, digits) or digest_of(GIT, digits)


def prove(file: BinaryIO, digest: str) -> ObjectId | None:
    """The id of an open file whose bytes have this digest; None if they have not."""
    import hashlib  # most commands that could ask do not

    method, _, expected = digest.partition(":")
    whole = IdHasher()
    try:
        size = os.fstat(file.fileno()).st_size
        git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        state = hashlib.sha256() if method == SHA256 else git
        file.seek(0)
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
            whole.update(block)
    except OSError as exc:
        raise from_os_error(exc, f"reading {file.name}") from exc
    return whole.id() if state.hexdigest() == expected else None


def require_digest(path: Path, digest: str) -> None:
    """Raise Damaged unless the file has this digest."""
    try:
        with open(path, "rb", buffering=0) as file:
            proven = prove(file, digest)
    except OSError as exc:
        raise from_os_error(exc, f"reading {path}") from exc
    if not proven:
        raise Damaged(f"{path} does not have the bytes that its name stands for", hint="download it again there")

"""The cache of Hugging Face's own tools, read where it lies: `models--ORG--NAME/` holds `blobs/` named by digest, and
`snapshots/COMMIT/` with a link to a blob for each file of that commit; `refs/` says at which commit a branch was.
"""

import re
from pathlib import Path
from typing import Final

from llmos_cli.errors import Damaged, NotFound, UsageError, from_os_error
from llmos_cli.store.intake.proof import guess_digest

BLOBS: Final = "blobs"
SNAPSHOTS: Final = "snapshots"
_REPO: Final = re.compile(r"(?:models|datasets|spaces)--[A-Za-z0-9._-]+\Z")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}\Z")
_REF_BYTES: Final = 200


def snapshot_folder(path: Path) -> Path:
    """The snapshot that a path into the cache means: of a repository's folder, or of CACHE/ORG/NAME[@REVISION], that of
    the revision (by default main, or the only one there is). Any other path is returned as it is.

    Raises NotFound if that revision is not in the cache, UsageError if it is not clear which one is meant.
    """
    name, _, revision = path.name.partition("@")
    if _REPO.match(name) and (path.parent / name / SNAPSHOTS).is_dir():
        return _choose(path.parent / name, revision)
    if not path.exists():
        for repo in (path.parent.parent / f"models--{path.parent.name}--{name}", path.parent / f"models--{name}"):
            if (repo / SNAPSHOTS).is_dir():
                return _choose(repo, revision)
    return path


def cached_file(path: Path) -> tuple[bool, str | None]:
    """Whether a link is a file of a snapshot, and the digest its blob is named by, if that is one.

    A link counts only if it leads into the `blobs/` of its own repository. Raises Damaged if the blob is not there.
    """
    snapshots = next((folder for folder in path.absolute().parents if folder.name == SNAPSHOTS), None)
    if snapshots is None:
        return False, None
    try:
        blobs = (snapshots.parent / BLOBS).resolve()
        target = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return False, None
    if target.parent != blobs or target.is_dir():
        return False, None
    if not target.exists():
        raise Damaged(f"{path} has no bytes: the cache holds this snapshot in part", hint="download it again there")
    return target.is_file(), guess_digest(target.name)


def _choose(repo: Path, revision: str) -> Path:
    try:
        there = sorted(path.name for path in (repo / SNAPSHOTS).iterdir() if _COMMIT.match(path.name))
    except OSError as exc:
        raise from_os_error(exc, f"listing {repo}") from exc
    wanted = revision or "main"
    commit = wanted if _COMMIT.match(wanted) else _read_ref(repo, wanted)
    if commit in there:
        return repo / SNAPSHOTS / commit
    if revision:
        raise NotFound(f"{repo} has no snapshot of {revision[:200]!r}", hint=f"there are {', '.join(there) or 'none'}")
    if len(there) == 1:
        return repo / SNAPSHOTS / there[0]
    if not there:
        raise NotFound(f"{repo} has no snapshots")
    raise UsageError(f"{repo} has {len(there)} snapshots", hint=f"name one: {repo / SNAPSHOTS / there[0]}")


def _read_ref(repo: Path, name: str) -> str | None:
    if not re.match(r"[A-Za-z0-9][A-Za-z0-9._/+-]*\Z", name) or ".." in name:
        return None
    try:
        with open(repo / "refs" / name, "rb") as file:
            return file.read(_REF_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return None

"""Clone: a new store with everything a remote has, and the remote known to it as `origin`.

The remote is looked at before anything is made, so a wrong URL leaves nothing behind. From then on a failure keeps the
new store with what has arrived: pulling goes on from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmos_cli.config import Config
from llmos_cli.errors import LlmosError, Unsafe, from_os_error
from llmos_cli.formats.layout import FORMAT_FILE
from llmos_cli.formats.signature import parse_public_key
from llmos_cli.progress import Progress
from llmos_cli.remote.exchange.pull import PullResult, execute_pull, plan_pull
from llmos_cli.remote.exchange.refs import list_remote_refs
from llmos_cli.remote.open import find_remote, normal_url, open_remote, require_ready
from llmos_cli.remote.pool.pool import PoolTransport
from llmos_cli.store.local import STORE_FOLDER, init_store, open_store
from llmos_cli.store.refs.keys import require_cryptography

ORIGIN: Final = "origin"


@dataclass(frozen=True)
class ClonePlan:
    """`root` is the store to be made, `url` where from, `refs` how many the remote has. With `trusted` keys only what
    one of them has signed is taken, now and later."""

    url: str
    root: Path
    refs: int
    trusted: tuple[str, ...] = ()


def plan_clone(url: str, folder: Path, cwd: Path, progress: Progress, trusted: Sequence[str] = ()) -> ClonePlan:
    """Decide what a clone would make; raises Unsafe if the folder is in use, NotFound if there is nothing to clone,
    UsageError for a `trusted` key that is none."""
    for key in trusted:
        parse_public_key(key)
    if trusted:
        require_cryptography()
    root = ((cwd / folder).resolve() if ".." in folder.parts else cwd / folder) / STORE_FOLDER
    if (root / FORMAT_FILE).exists():
        raise Unsafe(f"{folder} holds a store already", hint=_go_on(folder))
    try:
        other = next((path for path in sorted(root.parent.iterdir()) if path.name != STORE_FOLDER), None)
    except FileNotFoundError:
        other = None
    except OSError as exc:
        raise from_os_error(exc, f"looking into {folder}") from exc
    if other:
        raise Unsafe(f"{folder} is not empty: it holds {other.name!r}", hint="clone into a new folder")
    kept = normal_url(url, cwd)
    transport = open_remote(kept, progress.warn)
    if isinstance(transport, PoolTransport):
        kept = transport.url  # all of it, whichever node was named
    require_ready(transport)
    return ClonePlan(kept, root, len(list_remote_refs(transport, progress)), tuple(dict.fromkeys(trusted)))


def execute_clone(plan: ClonePlan, progress: Progress) -> PullResult:
    """Make the store and pull every ref."""
    trust = {ORIGIN if number == 1 else f"{ORIGIN}-{number}": key for number, key in enumerate(plan.trusted, 1)}
    config = Config(remotes={ORIGIN: plan.url}, trust=trust, require_signed=(ORIGIN,) if trust else ())
    init_store(plan.root, config)
    with open_store(plan.root, progress) as store:
        remote = find_remote(store, ORIGIN, plan.root)
        try:
            return execute_pull(store, remote, plan_pull(store, remote, None, force=False), progress)
        except LlmosError as exc:
            first = f"{exc.hint}; then " if exc.hint else ""
            exc.hint = first + _go_on(plan.root.parent)
            raise


def _go_on(folder: Path) -> str:
    return f"go on with what has arrived: llmos --store {folder} pull {ORIGIN} --all"

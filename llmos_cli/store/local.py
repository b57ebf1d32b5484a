"""A store on the local disk: where its parts lie, making one, finding one, opening one.

A store is private: it is made for its owner alone, and one that belongs to somebody else is refused. Opening also
refuses a store whose FORMAT it does not know before it touches anything else in it.
"""

import contextlib
import os
import shlex
from pathlib import Path
from typing import Final

from llmos_cli.config import Config, parse_config
from llmos_cli.errors import AccessDenied, NoSpace, NotFound, Unsafe, UsageError, from_os_error
from llmos_cli.formats.layout import FORMAT_FILE, FORMAT_TEXT, PACKS, REFS, check_format
from llmos_cli.progress import Progress, Silent
from llmos_cli.store.disk import durable
from llmos_cli.store.fsck.settings import CONFIG_FILE, write_config
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.packs import sync_index

__all__ = ["Store", "find_store", "init_store", "open_store", "save_config"]

STORE_FOLDER: Final = ".llmos"
SAFE_VARIABLE: Final = "LLMOS_SAFE_STORES"
_PRIVATE: Final = 0o700
FOLDERS: Final = (PACKS, REFS, "logs", "leases", "trash", "tmp")


def init_store(root: Path, config: Config | None = None, *, safe: str = "") -> bool:
    """Make an empty store at `root`, for its owner alone; False if there is one already.

    FORMAT comes last: without it there is no store. `safe` is as for `open_store`.
    """
    if (root / FORMAT_FILE).exists():
        return False
    durable.make_folder(root.parent, mode=0o777)
    durable.make_folder(root, mode=_PRIVATE)
    refuse_foreign(root, safe)
    if not any(root.iterdir()):  # also where it was there before; what already holds something is for its owner to open
        durable.set_mode(root, _PRIVATE)
    for folder in FOLDERS:
        durable.make_folder(root / folder, mode=_PRIVATE)
    write_config(root, config or Config())
    durable.write_file(root / FORMAT_FILE, FORMAT_TEXT)
    return True


def find_store(explicit: Path | None, from_env: str | None, cwd: Path, home: Path) -> Path:
    """The folder of the store to use: --store, $LLMOS_STORE, the nearest .llmos upward, ~/.llmos; raises NotFound."""
    named = explicit or (Path(from_env) if from_env else None)
    if named:
        for root in (named, named / STORE_FOLDER):
            if _is_store(root):
                return root
        raise NotFound(f"no llmos store at {named}", hint=f"make one: llmos --store {named} init")
    for folder in (cwd, *cwd.parents, home):
        with contextlib.suppress(AccessDenied):  # somebody else's folder on the way up to the root
            if _is_store(folder / STORE_FOLDER):
                return folder / STORE_FOLDER
    raise NotFound(f"no llmos store in {cwd} or any folder above it", hint="make one here: llmos init")


def _is_store(root: Path) -> bool:
    try:
        return (root / FORMAT_FILE).exists()
    except OSError as exc:
        raise from_os_error(exc, f"looking for a store at {root}") from exc


def open_store(root: Path, progress: Progress | None = None, *, safe: str = "") -> Store:
    """Open the store at `root`; raises NotFound, Damaged or UnknownVersion, UsageError for its config.toml, Unsafe if
    it is somebody else's and not among the `safe` stores (their folders, with ":" between them, or "*" for all)."""
    refuse_foreign(root, safe)
    try:
        check_format((root / FORMAT_FILE).read_bytes())
        config_path = root / CONFIG_FILE
        config = parse_config(config_path.read_text("utf-8"), str(config_path)) if config_path.exists() else Config()
    except FileNotFoundError as exc:
        raise NotFound(f"no llmos store at {root}", hint="make one: llmos init") from exc
    except OSError as exc:
        raise from_os_error(exc, f"opening the store {root}") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"{config_path} is not text: {exc}") from exc
    _make_missing(root)
    store = Store(root, config, progress or Silent())
    store.index.refill = lambda: _fill_index(store)
    try:
        if not store.index.is_complete:
            _fill_index(store)
    except BaseException:
        store.close()
        raise
    return store


def refuse_foreign(root: Path, safe: str) -> None:
    """Raise Unsafe for a store that belongs to somebody else, unless `safe` lists it: whoever owns it decides what a
    command reads there, and might have put it where it is found (git's `safe.directory` is for the same)."""
    try:
        owner = root.stat().st_uid
    except OSError:
        return  # whoever opens it says what is wrong
    if owner == os.geteuid():
        return
    trusted = safe.split(os.pathsep)
    if "*" in trusted or any(path and Path(path).expanduser().resolve() == root.resolve() for path in trusted):
        return
    raise Unsafe(
        f"the store {root} belongs to another user ({_user(owner)})",
        hint=f"if you trust it: export {SAFE_VARIABLE}={shlex.quote(str(root.resolve()))}",
    )


def _user(uid: int) -> str:
    from pwd import getpwuid

    try:
        return getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _make_missing(root: Path) -> None:
    """Tools that copy a store leave out empty folders; where data should be, a missing folder is for fsck to report."""
    for folder in FOLDERS:
        if folder not in (PACKS, REFS) and not (root / folder).is_dir():
            with contextlib.suppress(AccessDenied, NoSpace):
                durable.make_folder(root / folder)


def _fill_index(store: Store) -> None:
    added = sync_index(store)
    store.index.mark_complete()
    if added.packs:
        store.progress.warn(f"the index was lost or unusable: rebuilt it from {added.packs} packs")


def save_config(store: Store, config: Config) -> None:
    write_config(store.root, config)
    store.config = config

"""What `app.py` hands to a command: where to look for the store, and how to speak.

A command never reads the environment or the global options by itself; it asks its session.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llmos_cli.ui.output import Output

if TYPE_CHECKING:
    from llmos_cli.store.local import Store


@dataclass(frozen=True)
class Session:
    """`store_path` is --store, `env_store` is $LLMOS_STORE and `safe_stores` $LLMOS_SAFE_STORES, the folders of other
    users' stores that may be opened, `ollama_models` where ollama keeps its models; they and `home` come from the
    environment."""

    store_path: Path | None
    env_store: str | None
    cwd: Path
    home: Path
    out: Output
    safe_stores: str = ""
    ollama_models: str = ""

    @property
    def json(self) -> bool:
        return self.out.json

    @property
    def quiet(self) -> bool:
        return self.out.quiet

    @property
    def verbose(self) -> bool:
        return self.out.verbose

    def find_store(self) -> Path:
        """The folder of the store this command works on; raises NotFound, Unsafe if it is somebody else's."""
        from llmos_cli.store.local import find_store, refuse_foreign

        root = find_store(self.store_path, self.env_store, self.cwd, self.home)
        refuse_foreign(root, self.safe_stores)
        return root

    def open_store(self) -> "Store":
        """Find the store and open it."""
        from llmos_cli.store.local import open_store

        return open_store(self.find_store(), self.out.progress, safe=self.safe_stores)


def session(ctx: typer.Context) -> Session:
    """The session of the running command."""
    found = ctx.obj
    assert isinstance(found, Session)
    return found

"""Name the places that 'push' and 'pull' exchange with.

A remote is a folder: another disk, a mounted file system, or another store. It is kept in the store's config.toml.

Examples:
  llmos remote add nas /mnt/nas/models
  llmos remote ls
  llmos remote rm nas
"""

from typing import Annotated

import typer

from llmos_cli.ui.session import session

NameArgument = Annotated[str, typer.Argument(metavar="REMOTE", help="What to call it.", show_default=False)]


def add(
    ctx: typer.Context,
    name: NameArgument,
    url: Annotated[str, typer.Argument(metavar="URL", help="A folder, as a path or file:///PATH.", show_default=False)],
) -> None:
    """Give a remote a name.

    Nothing is written there yet: the first push makes it. A folder that holds something else is refused.

    Examples:
      llmos remote add nas /mnt/nas/models
      llmos remote add team ../shared-store
    """
    from llmos_cli.remote.open import add_remote

    here = session(ctx)
    with here.open_store() as store:
        kept = add_remote(store, name, url, here.cwd)
    here.out.result({"remote": name, "url": kept})
    here.out.line(f"{name} is {kept}")
    here.out.hint(f"llmos push {name} --all, or llmos pull {name} --all")


def ls(ctx: typer.Context) -> None:
    """List the remotes.

    Examples:
      llmos remote ls
    """
    here = session(ctx)
    with here.open_store() as store:
        remotes = sorted(store.config.remotes.items())
    here.out.result({"remotes": [{"remote": name, "url": url} for name, url in remotes]})
    if remotes:
        here.out.table(["remote", "url"], [list(pair) for pair in remotes])
    else:
        here.out.say("no remotes")
        here.out.hint("llmos remote add NAME URL")


def rm(ctx: typer.Context, name: NameArgument) -> None:
    """Forget a remote. What it holds stays as it is.

    Examples:
      llmos remote rm nas
    """
    from llmos_cli.remote.open import remove_remote

    here = session(ctx)
    with here.open_store() as store:
        url = remove_remote(store, name)
    here.out.result({"remote": name, "url": url})
    here.out.line(f"forgot {name} ({url})")


SUBCOMMANDS = {"add": add, "ls": ls, "rm": rm}

"""`llmos completion`: the script that makes TAB work."""

from typing import Annotated

import typer

from llmos_cli.errors import UsageError
from llmos_cli.ui.session import session

SHELLS = ("bash", "zsh", "fish")


def completion(
    ctx: typer.Context,
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="Whose script.", show_default=False)],
) -> None:
    """Print a completion script: commands, options, values, refs.

    The script is static and reads refs by itself: a TAB starts no Python.

    Examples:
      source <(llmos completion bash)         (in ~/.bashrc)
      llmos completion zsh > ~/.zfunc/_llmos  (with ~/.zfunc in fpath)
      llmos completion fish > ~/.config/fish/completions/llmos.fish
    """
    from importlib import import_module

    from llmos_cli.ui.completion.tree import read_tree

    here = session(ctx)
    if shell not in SHELLS:
        raise UsageError(f"no completion for the shell {shell!r}", hint=f"there is one for {', '.join(SHELLS)}")
    script: str = import_module(f"llmos_cli.ui.completion.{shell}").script(read_tree(ctx.find_root().command))
    here.out.result({"shell": shell, "script": script})
    here.out.page(script.rstrip("\n"))

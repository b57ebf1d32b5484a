"""The completion scripts: what they hold, and that the ones in the repository are those of today's commands."""

from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer

from llmos_cli.app import VERBS, build
from llmos_cli.ui.completion import bash, fish, zsh
from llmos_cli.ui.completion.tree import Value, leaves, read_tree

SCRIPTS = {bash: "llmos.bash", zsh: "_llmos", fish: "llmos.fish"}
FOLDER = Path(__file__).parents[3] / "completions"


@pytest.mark.parametrize("shell", SCRIPTS, ids=lambda shell: shell.__name__.rpartition(".")[2])
def test_the_script_in_the_repository_is_up_to_date(shell: ModuleType) -> None:
    name = shell.__name__.rpartition(".")[2]
    path = FOLDER / SCRIPTS[shell]
    script = shell.script(read_tree(typer.main.get_command(build())))
    assert path.read_text("utf-8") == script, f"make it anew: llmos completion {name} > completions/{path.name}"


def test_every_command_and_option_is_in_the_tree() -> None:
    tree = read_tree(typer.main.get_command(build()))
    assert sorted(command.name for command in tree.commands) == sorted(VERBS)
    for words, command in leaves(tree):
        names = {name for option in command.options for name in option.names}
        assert "--help" in names, words
        assert command.summary, words
        flat = [name for option in command.options for name in option.names]
        assert len(flat) == len(names), f"{words} declares an option twice"


def sample(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...")],
    name: Annotated[str, typer.Argument(metavar="NAME")],
    *,
    data: Annotated[str, typer.Option("--data", "-d", metavar="REF", help="It's [the] data: all.")] = "",
    tokenizer: Annotated[str, typer.Option(metavar="train:N|REF|DIR")] = "",
    precision: Annotated[str, typer.Option(metavar="fp32|bf16")] = "",
    to: Annotated[str, typer.Option(metavar="REMOTE")] = "",
    steps: Annotated[int, typer.Option(metavar="N")] = 1,
    out: Annotated[Path | None, typer.Option()] = None,
    fast: Annotated[bool, typer.Option("--fast")] = False,
    hidden: Annotated[bool, typer.Option("--hidden", hidden=True)] = False,
) -> None:
    """Do it.

    At length.
    """


def test_what_a_value_is_comes_from_its_metavar() -> None:
    app = typer.Typer()
    app.command()(sample)
    tree = read_tree(typer.main.get_command(app))
    values = {option.names[0]: option.value for option in tree.options}
    assert tree.summary == "Do it."
    assert tree.places == (Value(("files",)),)
    assert tree.rest == Value(("files", "refs"))
    assert values["--data"] == Value(("refs",))
    assert values["--tokenizer"] == Value(("refs", "dirs"))
    assert values["--precision"] == Value((), ("fp32", "bf16"))
    assert values["--to"] == Value(("remotes",))
    assert values["--steps"] == Value()
    assert values["--out"] == Value(("files",))
    assert values["--fast"] is None
    assert "--hidden" not in values


def test_help_texts_are_quoted_for_each_shell() -> None:
    app = typer.Typer()
    app.command()(sample)
    tree = read_tree(typer.main.get_command(app))
    assert r"It'\''s \[the\] data\: all." in zsh.script(tree)
    assert r"'It\'s [the] data: all.'" in fish.script(tree)

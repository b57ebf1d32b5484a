"""Options of a command from a file: as if they had been typed, but for those that are."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from llmos_cli.errors import NotFound, UsageError
from llmos_cli.ui.settings import read_settings

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a command with a file of this text; returns what its options came to."""
    found: dict[str, Any] = {}

    def command(
        file: Annotated[Path | None, typer.Option("--file", is_eager=True, callback=read_settings)] = None,
        steps: Annotated[int | None, typer.Option("--steps")] = None,
        weight_decay: Annotated[float, typer.Option("--weight-decay")] = 0.1,
        shown: Annotated[bool, typer.Option("--plan")] = False,
        config: Annotated[Path | None, typer.Option("--config")] = None,
        data: Annotated[str | None, typer.Option("--data")] = None,
    ) -> None:
        found.update(steps=steps, weight_decay=weight_decay, plan=shown, config=config, data=data)

    def call(text: str, *words: str) -> dict[str, Any]:
        path = tmp_path / "train.toml"
        path.write_text(text)
        app = typer.Typer(add_completion=False)
        app.command()(command)
        typer.main.get_command(app)(["--file", str(path), *words], standalone_mode=False)
        return found

    return call


def test_what_stands_there_is_as_if_it_were_typed(run: Run) -> None:
    found = run('steps = 7\nweight_decay = 1\nplan = true\nconfig = "a/b.json"\ndata = "web"')
    assert found == {"steps": 7, "weight_decay": 1.0, "plan": True, "config": Path("a/b.json"), "data": "web"}
    assert type(found["weight_decay"]) is float


def test_what_is_typed_goes_before_what_stands_there(run: Run) -> None:
    found = run("steps = 7\nweight_decay = 0.5", "--steps", "9")
    assert (found["steps"], found["weight_decay"], found["data"]) == (9, 0.5, None)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("stepz = 3", "unknown key 'stepz'", "did you mean 'steps'"),
        ("weight-decay = 3", "unknown key 'weight-decay'", "did you mean 'weight_decay'"),
        ("zzz = 3", "unknown key 'zzz'", "valid keys: config, data, plan, steps, weight_decay"),
        ('file = "other.toml"', "unknown key 'file'", "valid keys"),
        ("steps = 1.5", "steps must be a whole number", "--help"),
        ("steps = true", "steps must be a whole number", "--help"),
        ('weight_decay = "much"', "weight_decay must be a number", "--help"),
        ("plan = 1", "plan must be true or false", "--help"),
        ("data = [1]", "data must be text", "--help"),
        ("[train]\nsteps = 1", "unknown key 'train'", ""),
        ("steps =", "not valid TOML", ""),
    ],
)
def test_what_is_not_an_option_or_of_its_kind_is_refused(run: Run, text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(text)
    assert "train.toml" in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_file_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none\.toml"):
        run("", "--file", str(tmp_path / "none.toml"))

"""What the script for fish offers, asked of a real fish where one is installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FISH = shutil.which("fish")
SCRIPT = Path(__file__).parents[2] / "completions" / "llmos.fish"

pytestmark = pytest.mark.skipif(FISH is None, reason="needs fish")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with web:latest and web:v2, which a remote has, too, that is gone by now."""
    here = tmp_path_factory.mktemp("tab")
    (here / "notes.txt").write_text("words")
    for words in (
        ["init"],
        ["add", "notes.txt", "web"],
        ["add", "notes.txt", "web:v2"],
        ["remote", "add", "nas", "mirror"],
        ["push", "nas", "--all"],
    ):
        subprocess.run([sys.executable, "-m", "llmos_cli", *words], cwd=here, check=True, capture_output=True)
    shutil.rmtree(here / "mirror")
    return here


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("llmos show ", {"web", "web:v2", "nas/"}),
        ("llmos show nas/", {"nas/web", "nas/web:v2"}),
        ("llmos push n", {"nas"}),
        ("llmos gc --remote ", {"nas"}),
        ("llmos checko", {"checkout"}),
    ],
)
def test_what_is_offered(folder: Path, line: str, offered: set[str]) -> None:
    ask = ["--no-config", "-c", f"source '{SCRIPT}'; complete -C '{line}'"]
    home = {"HOME": str(folder), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    done = subprocess.run([str(FISH), *ask], cwd=folder, env=home, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert {text.partition("\t")[0] for text in done.stdout.splitlines()} == offered

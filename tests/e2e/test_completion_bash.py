"""TAB in a real bash, with the script from the repository: what is offered, what is typed, and how long it takes."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")
BASH = shutil.which("bash")
SCRIPT = Path(__file__).parents[2] / "completions" / "llmos.bash"
PROMPT = "READY> "

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")

Press = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the refs web:latest, web:v2, tiny:step-10, some files beside it, and a remote that has the refs."""
    here = tmp_path_factory.mktemp("tab")
    (here / "corpus").mkdir()
    (here / "corpus" / "a text.txt").write_text("words")
    (here / "notes.txt").write_text("words")
    for words in (["init"], *(["add", "notes.txt", ref] for ref in ("web", "web:v2", "tiny:step-10"))):
        subprocess.run([sys.executable, "-m", "llmos_cli", *words], cwd=here, check=True, capture_output=True)
    for words in (["remote", "add", "nas", "mirror"], ["push", "nas", "--all"], ["rm", "web"]):
        subprocess.run([sys.executable, "-m", "llmos_cli", *words], cwd=here, check=True, capture_output=True)
    shutil.rmtree(here / "mirror")
    with open(here / ".llmos" / "config.toml", "a", encoding="utf-8") as config:
        config.write('"backup" = "/mnt/backup"\n')
    return here


@pytest.fixture(scope="module")
def shell(folder: Path) -> Iterator["pexpect.spawn[str]"]:
    """An interactive bash that has no python and no llmos in its PATH: a TAB may start neither."""
    empty = folder / "bin"
    empty.mkdir()
    environment = {"PATH": str(empty), "HOME": str(folder / "nobody"), "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    bash = pexpect.spawn(
        BASH, ["--norc", "--noprofile"], cwd=folder, env=environment, encoding="utf-8", timeout=20, dimensions=(50, 160)
    )
    bash.sendline(f"PS1='{PROMPT}'; bind 'set bell-style none'; bind 'set enable-bracketed-paste off'")
    bash.expect_exact(f"\r\n{PROMPT}")
    bash.sendline(f"source {SCRIPT}; set -u; shopt -s failglob; bind 'set completion-query-items 0'")
    bash.expect_exact(PROMPT)
    yield bash
    bash.close(force=True)


@pytest.fixture
def press(shell: "pexpect.spawn[str]") -> Press:
    def press(line: str, tabs: int = 1) -> str:
        """Type `line` and press TAB; returns all that then stands on the screen, the last line last."""
        shell.send(line + "\t" * tabs)
        shell.send("\x05#\r")  # Ctrl-E, a comment sign and Enter: nothing runs, but the line is complete
        shell.expect_exact(["#\r\n"])
        screen = shell.before or ""
        shell.expect_exact(PROMPT)
        assert "bash:" not in screen, f"a TAB must never print an error: {screen!r}"
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x07", "", screen)

    return press


def typed(screen: str) -> str:
    """The line as completion left it."""
    return screen.rpartition(PROMPT)[2].rsplit("\r\n", 1)[-1].strip()


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("llmos check", "llmos checkout"),
        ("llmos gc --dr", "llmos gc --dry-run"),
        ("llmos show we", "llmos show web:v2"),
        ("llmos show tiny:", "llmos show tiny:step-10"),
        ("llmos show web:v", "llmos show web:v2"),
        ("llmos show ti", "llmos show tiny:step-10"),
        ("llmos train x --data ti", "llmos train x --data tiny:step-10"),
        ("llmos train x --data=ti", "llmos train x --data=tiny:step-10"),
        ("llmos train x --precision b", "llmos train x --precision bf16"),
        ("llmos --json --store .llmos show ti", "llmos --json --store .llmos show tiny:step-10"),
        ("llmos show --json ti", "llmos show --json tiny:step-10"),
        ("llmos add no", "llmos add notes.txt"),
        ("llmos add corpus/a", r"llmos add corpus/a\ text.txt"),
        ("llmos add notes.txt ti", "llmos add notes.txt tiny:step-10"),
        ("llmos checkout web cor", "llmos checkout web corpus/"),
        ("llmos completion z", "llmos completion zsh"),
        ("llmos push ba", "llmos push backup"),
        ("llmos remote a", "llmos remote add"),
        ("llmos rm web ti", "llmos rm web tiny:step-10"),
        ("llmos show @ab", "llmos show @ab"),
        ("llmos show na", "llmos show nas/"),
        ("llmos show nas/ti", "llmos show nas/tiny:step-10"),
        ("llmos show nas/web:", "llmos show nas/web:v2"),
        ("llmos diff web:v2 nas/t", "llmos diff web:v2 nas/tiny:step-10"),
        ("llmos ls nas/t", "llmos ls nas/tiny:step-10"),
        ("llmos show other/t", "llmos show other/t"),
        ("llmos pull n", "llmos pull nas"),
        ("llmos gc --remote n", "llmos gc --remote nas"),
        ("llmos nonsense x", "llmos nonsense x"),
    ],
)
def test_a_tab_completes(press: Press, line: str, completed: str) -> None:
    assert typed(press(line)) == completed


def test_two_tabs_list_refs(press: Press) -> None:
    screen = press("llmos show ", 2)
    assert {"web:v2", "tiny:step-10", "nas/", "backup/"} <= set(screen.split())
    assert "notes.txt" not in screen, "a file is not a ref"


def test_two_tabs_list_commands(press: Press) -> None:
    offered = set(press("llmos ", 2).split())
    assert {"init", "add", "train", "serve", "completion"} <= offered


def test_a_store_elsewhere_is_read(press: Press, shell: "pexpect.spawn[str]", folder: Path) -> None:
    shell.sendline("cd /; unset LLMOS_STORE")
    shell.expect_exact(f"\r\n{PROMPT}")
    assert typed(press("llmos show ti")) == "llmos show ti"
    assert typed(press(f"llmos --store {folder} show ti")).endswith("show tiny:step-10")
    assert typed(press(f"llmos show --store={folder}/.llmos ti")).endswith("tiny:step-10")
    shell.sendline(f"LLMOS_STORE={folder}")
    shell.expect_exact(f"\r\n{PROMPT}")
    assert typed(press("llmos show ti")) == "llmos show tiny:step-10"
    shell.sendline(f"unset LLMOS_STORE; cd {folder}")
    shell.expect_exact(f"\r\n{PROMPT}")


def test_the_script_forks_nowhere() -> None:
    source = SCRIPT.read_text("utf-8")
    assert not re.search(r"\$\((?!\()|<\(|[^|]\|[^|]*\bread\b", source), "command substitution costs a fork a TAB"

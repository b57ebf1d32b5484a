"""Start-up is guarded by what gets loaded, not by seconds: `--help` of every command in a fresh interpreter."""

import json
import subprocess
import sys

import pytest

from llmos_cli.app import GROUPS, VERBS

HEAVY = (
    "accelerate",
    "fastapi",
    "numba",
    "numpy",
    "rich",
    "safetensors",
    "sqlite3",
    "starlette",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
    "zstandard",
)
PROBE = """
import json, sys
from llmos_cli.app import main
code = main({arguments!r})
sys.stderr.write(json.dumps([code, sorted(set({heavy!r}) & set(sys.modules))]))
"""


def probe(*arguments: str) -> tuple[str, int, list[str]]:
    """Standard output, exit code and heavy modules of a run in a fresh interpreter."""
    source = PROBE.format(arguments=list(arguments), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    return done.stdout, code, loaded


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_command_loads_nothing_heavy_and_shows_examples(verb: str) -> None:
    page, code, loaded = probe(verb, "--help")
    assert (code, loaded) == (0, []), "TAB-happy people read --help; it must not wait for what it does not use"
    assert f"Usage: llmos {verb}" in page
    (summary,) = [verbs[verb] for verbs in GROUPS.values() if verb in verbs]
    text = " ".join(line.strip() for line in page.partition("\n\n")[2].partition("\n\n")[0].splitlines())
    assert text == summary, "the table in app.py and the command's first line of help are one text"
    assert "Examples:" in page, "a page that shows no command to copy helps nobody"
    examples = page.partition("Examples:")[2].strip().splitlines()
    assert any(f"llmos {verb}" in line or f"{verb}" in line for line in examples)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], []])
def test_the_root_page_loads_nothing_heavy_not_even_pydantic(arguments: list[str]) -> None:
    source = PROBE.format(arguments=arguments, heavy=(*HEAVY, "pydantic"))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stderr) == [0, []]


def test_the_root_page_lists_every_command_within_80_columns() -> None:
    page, code, _ = probe("--help")
    assert code == 0
    for verb in VERBS:
        assert f"\n  {verb} " in page
    assert max(len(line) for line in page.splitlines()) <= 80
    for text in ("Store:", "Exchange:", "Make:", "Run:", "System:", "Examples:", "Exit codes:"):
        assert text in page


def test_a_bare_llmos_shows_the_same_page() -> None:
    assert probe()[0] == probe("--help")[0] == probe("-h")[0]

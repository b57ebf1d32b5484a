"""`llmos demo` as a newcomer runs it, with few training steps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # a machine that does other things too is slow


def llmos(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmos_cli", *words], cwd=cwd, capture_output=True, text=True, timeout=500, check=False
    )


def test_the_demo_ends_with_a_store_to_go_on_with(tmp_path: Path) -> None:
    done = llmos("demo", "--dir", "d", "--steps", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "have the same ids in the store and in its clone" in done.stderr
    assert re.search(r"answer over HTTP .* 48 tokens", done.stdout)
    assert "Made from" in done.stdout

    here, there = tmp_path / "d", tmp_path / "d" / "clone"
    listed = json.loads(llmos("ls", "--json", cwd=here).stdout)
    assert {"code:latest", "tiny:latest", "tiny-int8:latest"} <= {ref["ref"] for ref in listed["refs"]}
    assert {ref["id"] for ref in listed["refs"]} == {
        ref["id"] for ref in json.loads(llmos("ls", "--json", cwd=there).stdout)["refs"]
    }
    for store in (here, there):
        checked = llmos("fsck", cwd=store)
        assert checked.returncode == 0, checked.stdout
    said = llmos("generate", "tiny-int8", "import os", "--max-tokens", "4", cwd=there)
    assert said.returncode == 0, said.stderr

    again = llmos("demo", "--dir", "d", "--steps", "3", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists and is not empty" in again.stderr

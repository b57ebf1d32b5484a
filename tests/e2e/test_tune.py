"""A search that is killed and stopped in the middle goes on with every trial, and ends where train would."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

STEPS = 40
SEARCH = f"""
[search]
lr = {{low = 1e-4, high = 1e-1, log = true}}

[train]
depth = 1
steps = {STEPS}
batch = 2
save_every = 10
"""
TUNE = ["tune", "best", "search.toml", "--data", "text", "--trials", "3", "--pruner", "none"]


class Sandbox:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("LLMOS")} | {
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "llmos_cli", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self, *words: str, code: int = 0) -> Any:
        process = self.start(*words, "--json")
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, err
        return json.loads((out if code == 0 else err).splitlines()[-1])

    def until(self, process: subprocess.Popen[str], trial: int, steps: int) -> None:
        """Wait until a trial has logged so many steps."""
        deadline = time.monotonic() + 120
        while (
            sum(
                path.read_bytes().count(b"\n")
                for path in (self.folder / ".llmos/logs/train").glob(f"best-trial-{trial}-*")
            )
            < steps
        ):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "it does not come so far"
            time.sleep(0.005)

    def alive(self) -> list[str]:
        """Processes that work in the folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if (entry / "cwd").resolve() == self.folder and (entry / "cmdline").read_bytes():
                        found.append(entry.name)
                except OSError:
                    continue
        return found


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    text = "\n".join(f"{n} squared is {n * n}, and {n} halved is {n / 2}." for n in range(400))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "search.toml").write_text(SEARCH)
    sandbox = Sandbox(tmp_path)
    sandbox.result("init")
    sandbox.result("shard", "text.txt", "text", "--tokenizer", "train:300", "--seq-len", "32")
    return sandbox


def test_killed_and_stopped_it_goes_on_with_every_trial(sandbox: Sandbox) -> None:
    first = sandbox.start(*TUNE, "--jobs", "2")
    sandbox.until(first, 1, STEPS // 2)
    first.kill()
    first.communicate()
    second = sandbox.start(*TUNE)
    sandbox.until(second, 1, STEPS - 5)
    second.terminate()
    _, err = second.communicate(timeout=120)
    assert second.returncode == 128 + signal.SIGTERM
    assert "hint: the same command goes on" in err
    assert sandbox.alive() == [], "no worker outlives its search"

    done = sandbox.result(*TUNE)
    assert [trial["state"] for trial in done["trials"]] == ["done"] * 3
    assert [trial["number"] for trial in done["trials"]] == [0, 1, 2]
    assert done["trials"][0]["params"] == {"lr": 0.001}, "the first trial takes the defaults of train"
    assert all(max(map(int, trial["losses"])) == STEPS for trial in done["trials"])
    best = min(done["trials"], key=lambda trial: trial["loss"])
    assert done["best"] == best
    assert sandbox.result("show", "best")["id"] == done["id"] == sandbox.result("show", best["run"])["id"]

    lr = repr(best["params"]["lr"])
    again = ["--data", "text", "--depth", "1", "--steps", str(STEPS), "--batch", "2", "--lr", lr]
    assert sandbox.result("train", "alone", *again)["id"] == done["id"], "a trial is a run of train, and made before"

    before = time.time()
    assert sandbox.result(*TUNE)["trials"] == done["trials"], "nothing is left to do"
    assert not [path for path in (sandbox.folder / ".llmos/logs/train").iterdir() if path.stat().st_mtime > before]


def test_a_search_of_what_cannot_be_trained_ends_with_the_reason(sandbox: Sandbox) -> None:
    error = sandbox.result("tune", "text", "search.toml", "--data", "text", code=2)["error"]
    assert error["message"] == "text:latest is a dataset, not a model"
    error = sandbox.result("tune", "best", "search.toml", "--data", "text", "--split", "valid", code=10)["error"]
    assert "has no valid split" in error["message"]
    (sandbox.folder / "search.toml").write_text(
        "[search]\nlr = [1e30]\n[train]\nsteps = 3\nbatch = 1\ndepth = 1\nclip = 0\n"
    )
    error = sandbox.result("tune", "best", "search.toml", "--data", "text", "--trials", "1", code=1)["error"]
    assert error["message"].startswith("none of 1 trial was finished: the ")

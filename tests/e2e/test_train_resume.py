"""A run that is killed, stopped and resumed ends in the same ids as one that ran through."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS = 80
TRAIN = ["train", "tiny", "--data", "text", "--depth", "1", "--steps", str(STEPS), "--batch", "4", "--save-every", "9"]
TRAIN += ["--lr", "0.01", "--accumulate", "2", "--seed", "3"]


class Sandbox:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / ".llmos"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("LLMOS")} | {
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",  # handing out steps this small takes longer than computing them
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

    def run(self, *words: str, code: int = 0) -> tuple[str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, err
        return out, err

    def result(self, *words: str) -> dict[str, Any]:
        out, err = self.run(*words, "--json")
        assert err == ""
        found = json.loads(out.splitlines()[-1])
        assert isinstance(found, dict)
        return found

    def steps(self) -> list[int]:
        """The steps in the metrics log."""
        paths = list((self.store / "logs" / "train").glob("*.jsonl"))
        assert len(paths) <= 1
        lines = [line for path in paths for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [json.loads(line)["step"] for line in lines]

    def interrupt(
        self, number: signal.Signals, *words: str, at: int, meanwhile: Callable[[int], None] | None = None
    ) -> tuple[int, str]:
        """Run a command and send it a signal once it logs and has logged `at` steps; returns exit code and stderr.

        `meanwhile` is called with its process id while it stands still.
        """
        before = self._logged_at()
        process = self.start(*words)
        deadline = time.monotonic() + 120
        while self._logged_at() == before or len(self.steps()) < at:
            assert process.poll() is None, f"it ended before: {process.communicate()[1]}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if meanwhile:
            process.send_signal(signal.SIGSTOP)
            meanwhile(process.pid)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=120)
        return process.returncode, err

    def _logged_at(self) -> int:
        return max((path.stat().st_mtime_ns for path in (self.store / "logs").glob("train/*.jsonl")), default=0)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path / "a")
    made.folder.mkdir()
    text = "\n".join(f"{n} squared is {n * n}, and {n} halved is {n / 2}." for n in range(1200))
    (made.folder / "text.txt").write_text(text)
    made.run("init")
    made.run("shard", "text.txt", "text", "--tokenizer", "train:300", "--seq-len", "32")
    return made


@pytest.mark.slow
def test_killed_stopped_and_resumed_gives_the_same_ids(sandbox: Sandbox, tmp_path: Path) -> None:
    shutil.copytree(sandbox.folder, tmp_path / "b")
    other = Sandbox(tmp_path / "b")
    straight = sandbox.result(*TRAIN)
    assert straight["step"] == STEPS
    assert sandbox.steps() == list(range(1, STEPS + 1))

    # Before anything was saved: --resume starts at step 0.
    code, _ = other.interrupt(signal.SIGKILL, *TRAIN, at=2)
    assert code == -signal.SIGKILL
    # Between two checkpoints: once step 18 is being saved in the background, step 9 is in the store.
    code, _ = other.interrupt(signal.SIGKILL, *TRAIN, "--resume", at=20)
    assert code == -signal.SIGKILL
    logged = other.steps()
    assert logged == list(range(1, len(logged) + 1))
    # Work is never thrown away, nor mixed with another run's.
    _, err = other.run(*TRAIN, code=2)
    assert "--resume" in err
    _, err = other.run(*TRAIN, "--lr", "0.02", "--resume", code=2)
    assert "lr (0.02 asked, 0.01 in the checkpoint)" in err
    # Ctrl-C and SIGTERM commit where they are, at whatever step that is.
    code, err = other.interrupt(signal.SIGINT, *TRAIN, "--resume", at=21)
    assert code == 130, err
    assert "llmos train tiny --resume" in err

    def second_trainer(first: int) -> None:
        _, message = other.run(*TRAIN, "--resume", code=11)
        assert f"process {first}" in message

    code, err = other.interrupt(signal.SIGTERM, "train", "tiny", "--resume", at=40, meanwhile=second_trainer)
    assert code == 143, err

    resumed = other.result("train", "tiny", "--resume", "--save-every", "4")
    for key in ("id", "checkpoint", "loss", "tokens", "step"):
        assert resumed[key] == straight[key]
    assert other.steps() == list(range(1, STEPS + 1))
    assert other.result(*TRAIN)["unchanged"] is True
    other.run("fsck")


@pytest.mark.slow
def test_the_proof_for_ones_own_configuration(sandbox: Sandbox) -> None:
    """It kills and resumes for real, and leaves nothing to be found."""
    before = sandbox.run("ls", "--json")[0]
    found = sandbox.result(*TRAIN, "--verify-resume")
    assert found["equal"] is True
    first, second = found["killed_at"]
    assert 0 < first < second <= found["steps"] == 24
    assert 0 < found["resumed_at"][0] <= first
    assert found["resumed_at"][0] <= found["resumed_at"][1] <= second
    assert sandbox.run("ls", "--json")[0] == before
    assert sandbox.steps() == []
    assert [path.name for path in (sandbox.store / "refs").iterdir()] == ["text"]
    # What it made is not taken for what this run has made.
    assert sandbox.result(*TRAIN, "--steps", "24")["unchanged"] is False
    sandbox.run("fsck")


@pytest.mark.slow
def test_the_proof_for_a_classifier_over_the_end_of_an_epoch(sandbox: Sandbox) -> None:
    """160 examples are ten steps of 16: the 24 steps of the proof see each of them more than twice."""
    lines = [json.dumps({"text": f"{n} squared is {n * n}", "label": "odd" if n % 2 else "even"}) for n in range(160)]
    (sandbox.folder / "told.jsonl").write_text("\n".join(lines))
    sandbox.run("shard", "told.jsonl", "told", "--task", "classify", "--tokenizer", "text")
    asked = ["--depth", "1", "--batch", "16", "--accumulate", "4", "--ema", "0.9", "--keep-best", "loss"]
    found = sandbox.result("train", "c", "--data", "told", *asked, "--verify-resume")
    assert found["equal"] is True
    assert len(found["killed_at"]) == len(found["resumed_at"]) == 2
    assert found["resumed_at"][1] > 0


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_full_disk_during_a_checkpoint(sandbox: Sandbox) -> None:
    disk = sandbox.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        shutil.move(sandbox.store, disk / ".llmos")
        here = ("--store", str(disk / ".llmos"))
        _, err = sandbox.run(*here, *TRAIN, "--steps", "24", "--save-every", "2", code=15)
        assert "no space" in err
        assert "tiny:checkpoint holds step" in err
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        sandbox.run(*here, "fsck")
        out, _ = sandbox.run(*here, "train", "tiny", "--resume", "--json")
        assert json.loads(out)["step"] == 24
    finally:
        subprocess.run(["umount", disk], check=True)

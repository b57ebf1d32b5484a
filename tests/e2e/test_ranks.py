"""Two real processes over gloo: what they compute is what one computes, and none is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
GRADIENTS = """
import sys
import numpy as np
from safetensors.torch import save_file
from llmos_cli.models.config import llama_config
from llmos_cli.models.load import new_model
from llmos_cli.train.device import open_accelerator
from llmos_cli.train.loop import accumulate_gradients, settle
from llmos_cli.train.parallel.ranks import Rank, agree, any_of, joined
from llmos_cli.train.optimizer import build_optimizer
from llmos_cli.train.tasks.language import next_tokens

index, count, parts, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
rank = Rank(index, count, index, count, f"file://{folder}/meeting")
ids = np.random.default_rng(0).integers(0, 61, (8, 16))
learned = np.ones_like(ids, bool)
learned[:3, 4:] = False  # rows that weigh less
work = next_tokens({"input_ids": ids}, learned)
with joined(rank), open_accelerator("fp32", count) as accelerator:
    model = new_model(llama_config(1, 61, 16), seed=1).train()
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, lr=0.1, weight_decay=0.0))
    if count > 1:
        settle(accelerator, prepared, optimizer, work, parts)
    loss = accumulate_gradients(accelerator, prepared, work, parts)
    assert any_of(index == count - 1, accelerator.device)
    assert not any_of(False, accelerator.device)
    assert agree("the same") and (count == 1 or not agree(str(index)))
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    save_file(grads | {"loss": loss.clone()}, f"{folder}/{count}-{parts}-{index}.safetensors")
"""
STEPS = 160
TRAIN = ["train", "tiny", "--data", "text", "--depth", "1", "--steps", str(STEPS), "--batch", "8", "--save-every", "20"]


def environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LLMOS")}
    return kept | {"HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_rows_in_parts_and_ranks_give_one_gradient(tmp_path: Path) -> None:
    runs = [(0, 1, 1), (0, 1, 4), (0, 2, 2), (1, 2, 2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", GRADIENTS, *map(str, run), str(tmp_path)],
            env=environment(tmp_path),
            stderr=subprocess.PIPE,
            text=True,
        )
        for run in runs
    ]
    for process in started:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    whole, parts, first, second = (
        load_file(tmp_path / f"{count}-{parts}-{index}.safetensors") for index, count, parts in runs
    )
    for other in (parts, first, second):
        for name, grad in whole.items():
            torch.testing.assert_close(other[name], grad, rtol=1e-6, atol=1e-6)


class Sandbox:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "llmos_cli", *words],
            cwd=self.folder,
            env=environment(self.folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self, *words: str) -> Any:
        process = self.start(*words, "--json")
        out, err = process.communicate(timeout=240)
        assert (process.returncode, err) == (0, "")
        return json.loads(out.splitlines()[-1])

    def log(self, name: str = "tiny") -> list[Any]:
        found = [
            line
            for path in (self.folder / ".llmos/logs/train").glob(f"{name}-*.jsonl")
            for line in path.read_text().splitlines(keepends=True)
        ]
        return [json.loads(line) for line in found if line.endswith("\n")]

    def until(self, process: subprocess.Popen[str], steps: int) -> None:
        """Wait until this process has logged so many steps."""
        began, deadline = time.time(), time.monotonic() + 180
        while len(log := self.log()) < steps or log[-1]["time"] < began:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "it does not come so far"
            time.sleep(0.005)

    def others(self, but: int = 0) -> list[int]:
        """Processes that work in the folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != but:
                try:
                    if (entry / "cwd").resolve() == self.folder and (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue
        return sorted(found)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    text = "\n".join(f"{n} squared is {n * n}, and {n} halved is {n / 2}." for n in range(400))
    (tmp_path / "text.txt").write_text(text)
    sandbox = Sandbox(tmp_path)
    sandbox.result("init")
    sandbox.result("shard", "text.txt", "text", "--tokenizer", "train:300", "--seq-len", "32")
    return sandbox


def test_one_two_and_one_process_see_the_same_samples(sandbox: Sandbox) -> None:
    """Stopped by a signal, and by the death of a process; each leg goes on in another number of them."""
    straight = Sandbox(sandbox.folder.with_name("straight"))
    shutil.copytree(sandbox.folder, straight.folder)
    beside = straight.start(*TRAIN, "--json")
    first = sandbox.start(*TRAIN)
    sandbox.until(first, 15)
    first.terminate()
    first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM

    second = sandbox.start(*TRAIN, "--resume", "--procs", "2")
    sandbox.until(second, 40)
    second.send_signal(signal.SIGINT)
    _, err = second.communicate(timeout=120)
    assert (second.returncode, err.count("error:")) == (130, 1), err
    assert f"error: stopped at step {sandbox.log()[-1]['step']} of {STEPS}; tiny:checkpoint holds" in err
    assert sandbox.others() == [], "no process outlives its run"

    third = sandbox.start(*TRAIN, "--resume", "--procs", "2")
    sandbox.until(third, 80)
    ranks = [pid for pid in sandbox.others(but=third.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    _, err = third.communicate(timeout=120)
    assert third.returncode == 1
    assert err.count("error:") == 1
    assert "of the run was ended by SIGKILL" in err
    assert "hint: go on with: llmos train tiny --resume" in err
    assert sandbox.others() == []

    done = sandbox.result(*TRAIN, "--resume")
    expected = json.loads(beside.communicate(timeout=240)[0].splitlines()[-1])
    assert done["step"] == expected["step"] == STEPS
    assert done["tokens"] == expected["tokens"]
    log, other = sandbox.log(), straight.log()
    assert [line["step"] for line in log] == list(range(1, STEPS + 1)), "one curve"
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in log] == pytest.approx([line[key] for line in other], rel=1e-3)

"""The same job here and on a local Ray, of which a worker is killed in the middle: one and the same dataset."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmos_cli.data.on_ray import check_place
from llmos_cli.errors import UsageError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
]
MAIN = [sys.executable, str(Path(__file__).with_name("small_slices.py"))]


def llmos(store: Path, *words: str) -> list[str]:
    return [*MAIN, "--store", str(store), *words]


def descendants(pid: int) -> dict[int, str]:
    """The processes below one, with what they call themselves."""
    children: dict[int, list[int]] = {}
    titles: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            titles[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.name))
    found, waiting = {}, [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found[child] = titles[child]
            waiting.append(child)
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "many.jsonl"
    with path.open("w") as out:
        for number in range(30_000):
            out.write(json.dumps({"text": f"document {number} says {number * number} and then {number % 97}"}) + "\n")
    return path


def dataset_id(store: Path) -> str:
    shown = subprocess.run(llmos(store, "show", "web", "--json"), capture_output=True, check=True, timeout=200)
    return str(json.loads(shown.stdout)["id"])


@pytest.mark.slow
def test_a_worker_that_is_killed_changes_nothing_and_no_process_stays(tmp_path: Path, corpus: Path) -> None:
    for name in ("here", "there"):
        subprocess.run(llmos(tmp_path / name, "init"), check=True, capture_output=True)
    words = ["shard", corpus.name, "web", "--tokenizer", "train:300", "--seq-len", "64"]
    subprocess.run(llmos(tmp_path / "here", *words), check=True, capture_output=True, cwd=tmp_path, timeout=200)
    running = subprocess.Popen(
        llmos(tmp_path / "there", *words, "--on", "ray"),
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},  # where Ray keeps a token
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    killed, seen = 0, set()
    while running.poll() is None:
        below = descendants(running.pid)
        seen |= set(below)
        workers = [pid for pid, title in below.items() if title.startswith("ray::encode_bytes")]
        if workers and not killed:
            os.kill(workers[0], signal.SIGKILL)
            killed = workers[0]
        time.sleep(0.02)
    assert running.stderr is not None
    assert running.returncode == 0, running.stderr.read()
    running.stderr.close()
    assert killed
    assert dataset_id(tmp_path / "there") == dataset_id(tmp_path / "here")
    assert not [pid for pid in seen if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("text", ["dask", "ray://", "ray:/head"])
def test_what_names_no_cluster_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--on"):
        check_place(text)

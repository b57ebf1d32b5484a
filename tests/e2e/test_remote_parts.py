"""The real command looks at a published remote and takes parts of it, by HTTP, through a proxy that counts bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import store_servers
from fault_proxy import Fault, FaultProxy, Request

from llmos_cli import __file__ as package
from llmos_cli.formats.safetensors import encode_header, read_table

pytestmark = pytest.mark.slow
LAYERS, LAYER = 8, 1_000_000
Start = Callable[..., subprocess.Popen[str]]


class CountingProxy(FaultProxy):
    """Counts the bytes of the answers' bodies."""

    sent = 0

    def ask(self, request: Request, body: bytes) -> Any:
        answer = super().ask(request, body)
        self.sent += len(answer.body)
        return answer


@pytest.fixture
def start(tmp_path: Path) -> Start:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMOS_")}
    environment = {**kept, "HOME": str(tmp_path), "PYTHONPATH": str(Path(package).parents[1])}

    def begin(store: str, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "llmos_cli", "--store", store, *words, "--json"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)  # type: ignore[call-overload]

    return begin


@pytest.fixture
def proxy(tmp_path: Path, start: Start) -> Iterator[CountingProxy]:
    """In front of a server of the published remote `nas`, which has `tiny` and, with other layers 5, `tuned`."""
    header = encode_header([(f"model.layers.{number}.w", "U8", (LAYER,)) for number in range(LAYERS)], {})
    noise = [random.Random(number).randbytes(LAYER) for number in range(LAYERS)]
    run(start, "writer", "init")
    for name in ("tiny", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(header + b"".join(noise))
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        run(start, "writer", "add", name, name)
        noise[5] = random.Random(99).randbytes(LAYER)
    run(start, "writer", "remote", "add", "nas", "nas")
    run(start, "writer", "push", "nas", "--all")
    run(start, "writer", "remote", "publish", "nas")
    with store_servers.web(tmp_path / "nas", tmp_path / "logs") as url:
        counting = CountingProxy(url)
        try:
            yield counting
        finally:
            counting.close()


def run(start: Start, store: str, *words: str, code: int = 0) -> dict[str, Any]:
    process = start(store, *words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return json.loads(out) if out else {}


def test_look_take_a_part_then_the_whole(start: Start, proxy: CountingProxy, tmp_path: Path) -> None:
    run(start, "reader", "init")
    run(start, "reader", "remote", "add", "nas", proxy.url)
    listed = run(start, "reader", "ls", "nas")["refs"]
    assert [item["ref"] for item in listed] == ["tiny:latest", "tuned:latest"]
    assert run(start, "reader", "show", "nas/tiny", "--tensors")["tensors"]["count"] == LAYERS
    assert len(run(start, "reader", "log", "nas/tiny")["history"]) == 1
    found = run(start, "reader", "diff", "nas/tiny", "nas/tuned")
    assert [item["name"] for item in found["tensors"] if item["status"] != "equal"] == ["model.layers.5.w"]
    assert proxy.sent < LAYER / 4

    proxy.sent = 0
    part = run(start, "reader", "pull", "nas", "tiny", "--rank", "1/4")
    assert part["tensors"] == ["model.layers.2.w", "model.layers.3.w"]
    assert 2 * LAYER < proxy.sent < 2 * LAYER + LAYER / 4

    proxy.faults = [Fault(where=lambda request: "packs/" in request.path, drip=500_000)]
    process = start("reader", "pull", "nas", "tiny", "--layers", "4-6")
    end = time.monotonic() + 60
    while not any("packs/" in request.path for request in proxy.seen[-1:]) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert [item["ref"] for item in run(start, "reader", "ls")["refs"]] == ["tiny-1-of-4:latest"]

    proxy.faults = [Fault(where=lambda request: "packs/" in request.path, times=2, cut=1000)]
    run(start, "reader", "pull", "nas", "tiny", "--layers", "4-6")
    proxy.forget()
    proxy.sent = 0
    assert run(start, "reader", "pull", "nas", "tiny")["ref"] == "tiny:latest"
    assert 3 * LAYER < proxy.sent < 3 * LAYER + LAYER / 4  # of layers 0, 1 and 7
    run(start, "reader", "checkout", "tiny", "out")
    for path in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "tiny" / path).read_bytes()
    run(start, "reader", "checkout", "tiny-part", "part")
    data = (tmp_path / "part/model.safetensors").read_bytes()
    table = read_table(lambda first, last: data[first:last], len(data), "part")
    assert [info.name for info in table] == [f"model.layers.{number}.w" for number in (4, 5, 6)]
    run(start, "reader", "fsck")


def test_a_server_that_is_gone(start: Start, proxy: CountingProxy) -> None:
    run(start, "reader", "init")
    run(start, "reader", "remote", "add", "nas", proxy.url)
    proxy.faults = [Fault(status=404)]
    run(start, "reader", "show", "nas/tiny", code=10)
    proxy.faults = [Fault(status=403)]
    run(start, "reader", "show", "nas/tiny", code=12)

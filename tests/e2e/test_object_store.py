"""The real command against a real S3: Ceph's gateway, with a proxy in front that can be slow, counts and loses bytes.

Whatever a command prints is searched for the secret key.
"""

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy, fault_proxy, until
from store_servers import S3Server

from llmos_cli import __file__ as package
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import parse_ref
from llmos_cli.store.local import init_store, open_store
from llmos_cli.store.transaction import begin

pytestmark = [pytest.mark.ceph, pytest.mark.slow]
MB = 1_000_000


@dataclass
class Shell:
    """A folder to type `llmos` in; `server` is what the credentials are for."""

    folder: Path
    server: S3Server
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "LLMOS_"))}
        root = str(Path(package).parents[1])
        given = {"PYTHONPATH": root, "HOME": str(self.folder), **self.server.environment, **self.extra}
        return {**kept, **{name: value for name, value in given.items() if value}}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "llmos_cli", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes)  # type: ignore[call-overload]

    def finish(self, process: subprocess.Popen[str], code: int) -> tuple[dict[str, Any], str]:
        out, err = process.communicate(timeout=120)
        assert self.server.secret not in out + err
        assert process.returncode == code, out + err
        return (json.loads(out.splitlines()[-1]) if out.startswith("{") else {}), err

    def run(self, *arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
        return self.finish(self.start("--json", *arguments), code)

    def fill(self, sizes: Sequence[int]) -> dict[str, str]:
        """A store with noise under n0, n1, ...: one pack each. Returns the ids."""
        ids = {}
        init_store(self.folder / ".llmos")
        with open_store(self.folder / ".llmos") as store:
            for number, size in enumerate(sizes):
                with begin(store, purpose="test", ref=parse_ref(f"n{number}")) as tx:
                    entry = tx.add_bytes("noise.bin", random.Random(number).randbytes(size))
                    ids[f"n{number}:latest"] = str(tx.commit(Manifest("files", (entry,)), message="add").id)
        return ids


@pytest.fixture
def shell(tmp_path: Path, rgw: S3Server) -> Callable[[str], Shell]:
    def make(name: str) -> Shell:
        (tmp_path / name).mkdir()
        return Shell(tmp_path / name, rgw)

    return make


@pytest.fixture
def proxy(rgw: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(rgw.endpoint) as made:
        yield made


@pytest.fixture
def prefix() -> str:
    return f"e2e/{secrets.token_hex(8)}"


def values(shell: Shell) -> dict[str, str]:
    return {item["ref"]: item["id"] for item in shell.run("ls")[0]["refs"]}


def packs(server: S3Server, prefix: str) -> list[str]:
    return [key for key in server.keys(prefix) if key.startswith("packs/")]


def test_push_there_and_clone_elsewhere_ends_in_the_same_ids(
    shell: Callable[[str], Shell], rgw: S3Server, prefix: str
) -> None:
    here, there = shell("here"), shell("there")
    ids = here.fill([3 * MB, 20 * MB])
    added, _ = here.run("remote", "add", "ceph", rgw.url(prefix))
    assert added["creates"] == "conditional put"
    assert rgw.keys(prefix) == []
    pushed, _ = here.run("push", "ceph", "--all")
    assert {item["ref"]: item["id"] for item in pushed["refs"]} == ids
    assert pushed["sent"] > 23 * MB
    cloned, _ = there.run("clone", rgw.url(prefix), "copy")
    assert {item["ref"]: item["id"] for item in cloned["refs"]} == ids
    there.run("--store", "copy", "checkout", "n1", "out")
    assert (there.folder / "out/noise.bin").read_bytes() == random.Random(1).randbytes(20 * MB)
    assert there.run("--store", "copy", "fsck")[0]["problems"] == []
    kept = (here.folder / ".llmos/config.toml").read_text()
    assert rgw.secret not in kept
    assert rgw.key not in kept


def test_a_push_that_has_nothing_to_do_asks_a_few_questions(
    shell: Callable[[str], Shell], rgw: S3Server, proxy: FaultProxy, prefix: str
) -> None:
    here = shell("here")
    here.fill([MB // 10] * 5)
    here.run("remote", "add", "ceph", rgw.url(prefix, endpoint=proxy.url))
    here.run("push", "ceph", "--all")
    proxy.forget()
    again, _ = here.run("push", "ceph", "n3")
    assert again["sent"] == 0
    assert proxy.count() <= 5, [f"{seen.method} {seen.path}" for seen in proxy.seen]
    assert {seen.method for seen in proxy.seen} == {"GET"}
    proxy.forget()
    here.run("push", "ceph", "--all")
    assert proxy.count() <= 4 + 5  # and the value of each ref


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_push_that_was_stopped_sends_one_pack_again_at_most(
    shell: Callable[[str], Shell], rgw: S3Server, proxy: FaultProxy, prefix: str, blow: signal.Signals
) -> None:
    here, there = shell("here"), shell("there")
    ids = here.fill([12 * MB] * 5)
    here.run("remote", "add", "ceph", rgw.url(prefix, endpoint=proxy.url))
    proxy.faults = [Fault(lambda seen: seen.method == "PUT" and seen.size > MB, delay=0.2)]
    running = here.start("push", "ceph", "--all")
    until(lambda: len(packs(rgw, prefix)) >= 2)
    running.send_signal(blow)
    began = time.monotonic()
    code = {signal.SIGKILL: -9, signal.SIGINT: 130}[blow]
    _, err = here.finish(running, code)
    assert time.monotonic() - began < 10
    assert blow != signal.SIGINT or "stopping" in err
    arrived = len(packs(rgw, prefix))
    assert 2 <= arrived < 5
    assert not any(key.startswith("refs/") for key in rgw.keys(prefix))
    again, _ = here.run("push", "ceph", "--all")
    assert again["packs"] == 5 - arrived
    sent = sum(seen.size for seen in proxy.seen if seen.method == "PUT" and seen.size > MB)
    assert sent < 6.2 * 12 * MB
    there.run("clone", rgw.url(prefix), "copy")
    assert {item["ref"]: item["id"] for item in there.run("--store", "copy", "ls")[0]["refs"]} == ids


def test_a_pull_that_was_killed_fetches_one_pack_again_at_most(
    shell: Callable[[str], Shell], rgw: S3Server, proxy: FaultProxy, prefix: str
) -> None:
    here, there = shell("here"), shell("there")
    here.fill([12 * MB] * 5)
    here.run("push", rgw.url(prefix), "--all")
    there.run("init")
    there.run("remote", "add", "ceph", rgw.url(prefix, endpoint=proxy.url))
    proxy.faults = [Fault(lambda seen: "bytes=" in seen.headers.get("range", ""), delay=0.15)]
    running = there.start("pull", "ceph", "--all")
    until(lambda: len(list((there.folder / ".llmos").glob("packs/*/*.pack"))) >= 2)
    running.kill()
    there.finish(running, -9)
    assert values(there) == {}
    arrived = len(list((there.folder / ".llmos").glob("packs/*/*.pack")))
    proxy.faults = []
    again, _ = there.run("pull", "ceph", "--all")
    assert again["packs"] <= 5 - arrived
    assert values(there) == values(here)
    assert there.run("fsck")[0]["problems"] == []


def test_a_remote_that_is_not_there_ends_with_16_and_says_what_to_do(shell: Callable[[str], Shell]) -> None:
    here = shell("here")
    here.fill([MB])
    _, err = here.run("push", "s3://bucket/x?endpoint=http://127.0.0.1:1", "n0", code=16)
    assert "run the command again" in err


def test_wrong_credentials_end_with_12_and_are_not_shown(
    shell: Callable[[str], Shell], rgw: S3Server, prefix: str
) -> None:
    here = shell("here")
    here.fill([MB])
    here.extra = {"AWS_SECRET_ACCESS_KEY": "canary-of-another-kind"}
    _, err = here.run("push", rgw.url(prefix), "n0", code=12)
    assert "canary" not in err
    assert "AWS_SECRET_ACCESS_KEY" in err


def test_a_bucket_that_is_not_there_ends_with_10(shell: Callable[[str], Shell], rgw: S3Server) -> None:
    here = shell("here")
    here.run("init")
    _, err = here.run("remote", "add", "x", f"s3://absent/x?endpoint={rgw.endpoint}", code=10)
    assert "make the bucket" in err


def test_the_endpoint_may_come_from_the_environment(shell: Callable[[str], Shell], rgw: S3Server, prefix: str) -> None:
    here = shell("here")
    here.extra = {"AWS_ENDPOINT_URL": rgw.endpoint}
    ids = here.fill([MB])
    here.run("push", f"s3://llmos-test/{prefix}", "n0")
    here.run("clone", f"s3://llmos-test/{prefix}", "copy")
    assert here.run("--store", "copy", "ls")[0]["refs"][0]["id"] == ids["n0:latest"]


def test_a_profile_in_the_home_folder_counts(shell: Callable[[str], Shell], rgw: S3Server, prefix: str) -> None:
    here = shell("here")
    here.fill([MB])
    here.extra = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_PROFILE": "team"}
    (here.folder / ".aws").mkdir()
    credentials = here.folder / ".aws/credentials"
    credentials.write_text(f"[team]\naws_access_key_id = {rgw.key}\naws_secret_access_key = {rgw.secret}\n")
    here.run("push", rgw.url(prefix), "n0")
    assert len(packs(rgw, prefix)) == 1
    here.extra["AWS_PROFILE"] = "absent"
    _, err = here.run("push", rgw.url(prefix), "n0", code=12)
    assert "ProfileNotFound" in err

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import AccessDenied, Busy, Damaged
from llmos_cli.formats.ids import object_id
from llmos_cli.store import leases
from llmos_cli.store.disk.identity import is_alive, this_process
from llmos_cli.store.leases import STALE_SECONDS, hold, hold_alone, live_leases
from llmos_cli.store.local import Store

IDS = [object_id(b"1"), object_id(b"2")]


def forge(store: Store, name: str = "forged.json", **changes: object) -> Path:
    """A lease as this process would write it, with some fields changed."""
    fields: dict[str, object] = dataclasses.asdict(this_process())
    fields |= {"purpose": "test", "objects": [str(IDS[0])], "writes": True, "since": time.time()}
    path = store.leases / name
    path.write_text(json.dumps(fields | changes))
    return path


def test_a_lease_lasts_as_long_as_its_block(store: Store) -> None:
    before = time.time()
    with hold(store, "serving", IDS) as lease:
        assert live_leases(store) == [lease]
        assert lease.objects == tuple(IDS)
        assert lease.since <= before
        assert not lease.writes
    assert not live_leases(store)
    assert not list(store.leases.iterdir())


def test_an_error_in_the_block_gives_the_lease_back(store: Store) -> None:
    with pytest.raises(RuntimeError), hold(store, "serving", IDS):
        raise RuntimeError
    assert not list(store.leases.iterdir())


def test_leases_of_the_dead_are_removed(store: Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    forge(store, pid=child.pid)
    assert not live_leases(store)
    assert not list(store.leases.iterdir())


def test_a_reused_process_number_is_not_the_holder(store: Store) -> None:
    forge(store, started="1")
    assert not live_leases(store)


def test_a_process_of_an_earlier_boot_is_dead(store: Store) -> None:
    forge(store, boot="another-boot x")
    assert not live_leases(store)


@pytest.mark.parametrize("foreign", ["host", "container"])
def test_a_process_that_cannot_be_asked_counts_until_its_lease_is_stale(store: Store, lab: Any, foreign: str) -> None:
    boot = this_process().boot.partition(" ")[0]
    path = forge(store, host="elsewhere") if foreign == "host" else forge(store, boot=f"{boot} pid:[1]", pid=1)
    assert [lease.purpose for lease in live_leases(store)] == ["test"]
    lab.age(path, STALE_SECONDS + 60)
    assert not live_leases(store)
    assert not path.exists()


def test_a_stopped_process_still_holds(store: Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        os.kill(child.pid, signal.SIGSTOP)
        started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
        path = forge(store, pid=child.pid, started=started)
        os.utime(path, (1, 1))
        assert len(live_leases(store)) == 1
    finally:
        child.kill()
        child.communicate()
    assert not live_leases(store)


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 200, b"[]", b"{}", b"7", b'{"pid": 1}'])
def test_an_unreadable_lease_stops_gc_until_it_is_stale(store: Store, lab: Any, content: bytes) -> None:
    path = store.leases / "odd.json"
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"odd\.json"):
        live_leases(store)
    with pytest.raises(Damaged):
        lab.gc()
    lab.age(path, STALE_SECONDS + 60)
    assert not live_leases(store)


@pytest.mark.parametrize("field", ["host", "boot", "pid", "started", "purpose", "objects", "writes", "since"])
def test_a_lease_without_a_field_is_unreadable(store: Store, field: str) -> None:
    path = forge(store)
    fields = json.loads(path.read_bytes())
    del fields[field]
    path.write_text(json.dumps(fields))
    with pytest.raises(Damaged):
        live_leases(store)


def test_leases_that_cannot_be_listed_are_not_nobody(
    store: Store, as_nobody: Callable[[Callable[[], Any]], Any]
) -> None:
    store.root.parent.chmod(0o755)
    forge(store).chmod(0)

    def listing() -> str:
        try:
            return str(len(live_leases(store)))
        except AccessDenied as exc:
            return exc.code

    if os.geteuid() == 0:
        assert as_nobody(listing) == "access-denied"
        store.leases.chmod(0)
        assert as_nobody(listing) == "access-denied"
        store.leases.chmod(0o755)


def test_a_lease_is_renewed_and_survives_being_removed(store: Store, monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.01)
    with hold(store, "serving", IDS) as lease:
        lab.age(lease.path, 1e6)
        deadline = time.monotonic() + 10
        while time.time() - lease.path.stat().st_mtime > 1000:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        lease.path.unlink()
        time.sleep(0.05)
        assert "lease" in {thread.name for thread in threading.enumerate()}
    assert not list(store.leases.iterdir())


def test_renewing_does_not_move_the_beginning(store: Store, lab: Any) -> None:
    """What a transaction published before the last renewal is as young as the rest of it."""
    with hold(store, "adding", [], writes=True) as lease:
        os.utime(lease.path)
        assert live_leases(store)[0].since == lease.since


def test_only_one_may_hold_a_name(store: Store) -> None:
    with hold_alone(store, "gc", "collecting"):
        with (
            pytest.raises(Busy, match=f"collecting: already running as process {os.getpid()}"),
            hold_alone(store, "gc", "collecting"),
        ):
            pass
        with hold_alone(store, "other", "something else"):
            assert len(live_leases(store)) == 2
    assert not list(store.leases.iterdir())


def test_the_name_of_a_dead_holder_is_free(store: Store) -> None:
    forge(store, name="only-gc-1.json", started="1")
    with hold_alone(store, "gc", "collecting"):
        assert len(live_leases(store)) == 1
    assert not list(store.leases.iterdir())


def test_of_many_processes_one_holds_the_name(
    store: Store, in_processes: Callable[[int, Callable[[int], Any]], list[Any]]
) -> None:
    forge(store, name="only-gc-1.json", started="1")
    inside = store.root / "inside"

    def work(number: int) -> str:
        try:
            with hold_alone(store, "gc", "collecting"):
                with open(inside, "x"):
                    time.sleep(0.05)
                inside.unlink()
                return "held"
        except Busy:
            return "busy"

    answers = in_processes(12, work)
    assert "held" in answers
    assert set(answers) <= {"held", "busy"}


def test_this_process_is_alive_and_a_made_up_one_is_not() -> None:
    ours = this_process()
    assert is_alive(ours) is True
    assert is_alive(dataclasses.replace(ours, started="1")) is False
    assert is_alive(dataclasses.replace(ours, host="elsewhere")) is None

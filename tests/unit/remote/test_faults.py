"""Push and pull over a bad network, and to gateways that lie: bounded in time, resumable, and never anything visible
that is wrong. The server is Ceph's gateway where it is installed, else moto; a proxy before it makes the faults."""

import json
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import store_servers
from fault_proxy import Fault, FaultProxy, Request, fault_proxy, flipped
from store_servers import S3Server

from llmos_cli.app import main
from llmos_cli.errors import AccessDenied, Busy, Conflict, LlmosError, NoSpace, RemoteUnavailable, Unsafe
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.remote import probe as probing
from llmos_cli.remote.exchange.pull import PullResult, execute_pull, plan_pull
from llmos_cli.remote.exchange.push import PushResult, execute_push, plan_push
from llmos_cli.remote.exchange.refs import read_remote_ref, remote_log
from llmos_cli.remote.open import Remote
from llmos_cli.remote.transports import locks
from llmos_cli.remote.transports.address import WebAddress, parse_address
from llmos_cli.remote.transports.locks import MARKER
from llmos_cli.remote.transports.objectstore import ObjectStoreTransport, Patience
from llmos_cli.remote.transports.published import WebTransport
from llmos_cli.store.handle import Store

pytestmark = pytest.mark.timeout(90)
Exchange = Any
HURRIED = Patience(budget=1.8, first=1.0, stall=0.5, part=1.5)


@dataclass
class Far:
    """A prefix of its own at the server: `push` and `pull` go through the proxy, `keys` past it."""

    proxy: FaultProxy
    server: S3Server
    prefix: str

    def remote(self) -> Remote:
        return Remote("far", self.transport())

    def transport(self) -> ObjectStoreTransport:
        return ObjectStoreTransport(parse_address(self.server.url(self.prefix, endpoint=self.proxy.url)), HURRIED)

    def push(self, store: Store, *refs: str, force: bool = False) -> PushResult:
        remote = self.remote()
        plan = plan_push(store, remote, [parse_ref(ref) for ref in refs], force=force)
        return execute_push(store, remote, plan, Silent())

    def pull(self, store: Store, *refs: str) -> PullResult:
        remote = self.remote()
        plan = plan_pull(store, remote, [parse_ref(ref) for ref in refs], force=False)
        return execute_pull(store, remote, plan, Silent())

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self.server.keys(self.prefix) if key.startswith(prefix)]

    def spoil(self, *faults: Fault) -> None:
        self.proxy.faults = list(faults)


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue("moto" if store_servers.missing(store_servers.CEPH_COMMANDS) else "rgw")
    return found


@pytest.fixture
def far(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    with fault_proxy(server.endpoint) as proxy:
        yield Far(proxy, server, f"faults/{secrets.token_hex(8)}")


def is_pack(request: Request) -> bool:
    return ".pack" in request.path


def reads_pack(request: Request) -> bool:
    return request.method == "GET" and is_pack(request)


def writes_pack(request: Request) -> bool:
    return request.method in ("PUT", "POST") and is_pack(request)


def writes_ref(request: Request) -> bool:
    return request.method == "PUT" and "/refs/" in request.path


PASSING = {
    "500 three times": Fault(status=500, times=3),
    "503 three times": Fault(status=503, times=3),
    "429 three times": Fault(status=429, times=3),
    "reset three times": Fault(status=0, times=3),
    "packs: reset in the middle of the upload": Fault(writes_pack, swallow=1000, times=2),
    "packs: 500 in the middle of the upload": Fault(writes_pack, status=500, times=2),
    "packs: the answer is lost": Fault(writes_pack, status=0, forward=True, times=2),
    "answers cut short": Fault(reads_pack, cut=100, times=3),
    "answers that stall": Fault(reads_pack, stall=True, times=1),
    "one wrong bit": Fault(reads_pack, change=flipped, times=1),
    "bytes that are missing": Fault(reads_pack, change=lambda data: data[:50], times=1),
    "refs: the answer is lost": Fault(writes_ref, status=0, forward=True, times=1),
    "refs: 500, and yet it was done": Fault(writes_ref, status=500, forward=True, times=1),
    "refs: 409 for a moment": Fault(writes_ref, status=409, times=1),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_does_no_harm(exchange: Exchange, far: Far, name: str) -> None:
    """The fault comes in the way of a push and then of a pull; each is counted anew."""
    here, there = exchange.store("here"), exchange.store("there")
    version = exchange.commit(here, "a", f=exchange.noise(1), g=exchange.noise(2, 9_000_000))
    fault = PASSING[name]
    hits = fault.hits = 0
    far.spoil(fault)
    far.push(here, "a")
    hits, fault.hits = fault.hits, 0
    far.pull(there, "a")
    assert exchange.value(there, "a") == version
    assert exchange.files(there, "a") == exchange.files(here, "a")
    assert far.keys("refs/") == ["refs/a/latest/0000000001"]
    assert hits + fault.hits > 0
    assert exchange.problems(there) == []


STAYING = {
    "500": (Fault(status=500), RemoteUnavailable),
    "503 for packs": (Fault(is_pack, status=503), RemoteUnavailable),
    "reset": (Fault(status=0), RemoteUnavailable),
    "stalled": (Fault(stall=True), RemoteUnavailable),
    "dripping": (Fault(lambda request: request.method == "GET", drip=2), RemoteUnavailable),
    "a login page": (Fault(status=200, body=b"<html>Please log in</html>"), LlmosError),
    "wrong bits": (Fault(reads_pack, change=flipped), LlmosError),
    "empty answers": (Fault(reads_pack, change=lambda data: b""), LlmosError),
    "gone": (Fault(reads_pack, status=404), LlmosError),
    "no room": (Fault(status=507), NoSpace),
    "refused": (Fault(status=403, body=b"<Error><Code>AccessDenied</Code></Error>"), AccessDenied),
    "quota": (Fault(status=403, body=b"<Error><Code>QuotaExceeded</Code></Error>"), NoSpace),
    "clock": (Fault(status=403, body=b"<Error><Code>RequestTimeTooSkewed</Code></Error>"), AccessDenied),
    "expired": (Fault(status=400, body=b"<Error><Code>ExpiredToken</Code></Error>"), AccessDenied),
    "elsewhere": (Fault(status=307, headers={"Location": "http://127.0.0.1:1/"}), LlmosError),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_ends_in_time_and_shows_nothing(exchange: Exchange, far: Far, name: str) -> None:
    here, there = exchange.store("here"), exchange.store("there")
    exchange.commit(here, "a", f=exchange.noise(1))
    far.push(here, "a")
    new = exchange.commit(here, "a", f=exchange.noise(2))
    fault, expected = STAYING[name]
    far.spoil(fault)
    with pytest.raises(expected) as pushed:
        far.push(here, "a")
    with pytest.raises(expected) as pulled:
        far.pull(there, "a")
    for caught in (pushed, pulled):
        assert caught.value.exit_code in (12, 13, 15, 16)
        assert caught.value.hint
        assert far.server.secret not in f"{caught.value.message}{caught.value.hint}"
    assert far.keys("refs/") == ["refs/a/latest/0000000001"]
    assert exchange.value(there, "a") is None
    assert exchange.problems(there) == exchange.problems(here) == []
    far.spoil()
    far.push(here, "a")
    far.pull(there, "a")
    assert exchange.value(there, "a") == new


def test_a_write_that_is_answered_and_lost_is_noticed(exchange: Exchange, far: Far) -> None:
    here = exchange.store("here")
    exchange.commit(here, "a", f=exchange.noise(1))
    far.spoil(Fault(writes_pack, status=200, headers={"ETag": '"x"'}))
    with pytest.raises(RemoteUnavailable, match="does not have what it was just sent"):
        far.push(here, "a")
    assert far.keys("refs/") == far.keys("packs/") == []


def test_a_head_that_is_answered_proves_nothing(exchange: Exchange, far: Far) -> None:
    here = exchange.store("here")
    exchange.commit(here, "a", f=exchange.noise(1))
    far.spoil(Fault(reads_pack, status=404, body=b"<Error><Code>NoSuchKey</Code></Error>"))
    with pytest.raises(RemoteUnavailable, match="does not have what it was just sent"):
        far.push(here, "a")
    assert far.keys("refs/") == []


def test_a_list_that_is_behind_makes_a_conflict_not_a_loss(exchange: Exchange, far: Far) -> None:
    here, there = exchange.store("here"), exchange.store("there")
    exchange.commit(here, "a", f=exchange.noise(1))
    far.push(here, "a")
    far.pull(there, "a")
    plan_push(there, far.remote(), [parse_ref("a")], force=False)  # the proxy has seen the list
    newer = exchange.commit(here, "a", f=exchange.noise(2))
    far.push(here, "a")
    exchange.commit(there, "a", f=exchange.noise(3))
    far.spoil(Fault(lambda request: request.is_list, stale=True))
    with pytest.raises(Conflict):
        far.push(there, "a")
    far.spoil()
    assert read_remote_ref(far.transport(), parse_ref("a"), Silent()).id == newer


def test_a_pack_list_that_is_behind_sends_nothing_twice(exchange: Exchange, far: Far) -> None:
    here = exchange.store("here")
    exchange.commit(here, "a", f=exchange.noise(1))
    plan_push(here, far.remote(), [parse_ref("a")], force=False)
    far.push(here, "a")
    exchange.commit(here, "b", f=exchange.noise(2))
    far.spoil(Fault(lambda request: request.is_list and "packs" in request.path, stale=True))
    far.proxy.seen = []
    far.push(here, "b")
    assert sum(writes_pack(seen) for seen in far.proxy.seen) == 1
    assert len(far.keys("packs/")) == 2
    assert far.keys("refs/") == ["refs/a/latest/0000000001", "refs/b/latest/0000000001"]


@pytest.fixture
def deaf(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    """A gateway that ignores conditions: moto, which minds no signatures, behind a proxy that takes them away."""
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    with fault_proxy(moto.endpoint) as proxy:
        proxy.faults = [Fault(strip="If-None-Match")]
        yield Far(proxy, moto, f"deaf/{secrets.token_hex(8)}")


def test_a_gateway_that_ignores_conditions_is_found_out_and_locks_take_their_place(deaf: Far) -> None:
    assert probing.probe(deaf.transport()) == probing.LOCKS
    assert deaf.keys("") == []
    deaf.transport().initialise()
    assert deaf.keys("") == ["FORMAT", MARKER]
    deaf.transport().initialise()
    assert probing.probe(deaf.transport()) == probing.LOCKS
    start = threading.Barrier(8)

    def race(me: int) -> bool:
        transport = deaf.transport()
        start.wait()
        return transport.create("refs/n/t/0000000001", b"%d" % me)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert won.count(True) == 1
    assert deaf.server.get(f"{deaf.prefix}/refs/n/t/0000000001") == b"%d" % won.index(True)
    assert deaf.keys("locks/") == [MARKER]


def test_a_claim_of_a_dead_process_is_passed_over(deaf: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = deaf.transport()
    transport.require_locks()
    transport.put("locks/refs/n/t/0000000001/00000000000000000000000000000000", b"")
    monkeypatch.setattr(locks, "_PATIENCE_SECONDS", 1.0)
    with pytest.raises(Busy):
        transport.create("refs/n/t/0000000001", b"x")
    assert deaf.keys("refs/") == []
    time.sleep(1.0)  # the server counts in seconds
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)
    assert transport.create("refs/n/t/0000000001", b"x")
    assert deaf.keys("locks/") == [MARKER]


def test_remote_add_says_how_refs_move_and_remembers_it(
    deaf: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    url = deaf.server.url(deaf.prefix, endpoint=deaf.proxy.url)
    assert main(["init"]) == 0
    assert main(["remote", "add", "far", url]) == 0
    assert "does not honour conditional puts" in capfd.readouterr().err
    assert main(["remote", "ls", "--json"]) == 0
    (listed,) = json.loads(capfd.readouterr().out)["remotes"]
    assert "creates=locks" in listed["url"]
    assert main(["remote", "add", "far", url, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["creates"] == "lock objects"
    (tmp_path / "f").write_bytes(b"some bytes")
    assert main(["add", "f", "f"]) == main(["push", "far", "f"]) == main(["clone", url, "copy"]) == 0
    assert deaf.keys("locks/") == [MARKER]


def test_a_gateway_that_honours_conditions_is_believed(far: Far) -> None:
    assert probing.probe(far.transport()) == probing.CONDITIONAL
    far.transport().initialise()
    assert far.keys("") == ["FORMAT"]


@pytest.mark.ceph
@pytest.mark.slow
def test_thirty_two_push_to_one_ref_and_nothing_is_lost(
    exchange: Exchange,
    far: Far,
    rgw: S3Server,  # moto is no judge of this: it looks and stores in two steps
) -> None:
    """Each has a value of its own and starts at the same moment; whoever is told that the ref moved looks again and
    says that it shall be replaced. Every value ends up in the log, once, and can be pulled."""
    stores = [exchange.store(f"s{number}") for number in range(32)]
    values = [exchange.commit(store, "a", f=exchange.noise(number, 2000)) for number, store in enumerate(stores)]
    far.transport().initialise()
    start, conflicts = threading.Barrier(32), []

    def race(store: Store) -> None:
        remote = Remote("far", ObjectStoreTransport(parse_address(far.server.url(far.prefix))))  # no proxy on the way
        plan = plan_push(store, remote, [parse_ref("a")], force=True)
        start.wait()
        while True:
            try:
                execute_push(store, remote, plan, Silent())
                return
            except Conflict as exc:
                conflicts.append(exc)
            plan = plan_push(store, remote, [parse_ref("a")], force=True)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(race, stores))
    assert len(conflicts) >= 31  # of those who saw no ref one could win
    transport = far.transport()
    log = list(remote_log(transport, read_remote_ref(transport, parse_ref("a"), Silent())))
    assert [move.sequence for move in log] == list(range(32, 0, -1))
    assert {move.id for move in log} == set(values)
    far.pull(exchange.store("reader"), "a")
    assert exchange.value(exchange.store("reader"), "a") == log[0].id
    assert len(far.keys("packs/")) == 32


def test_what_is_remembered_may_be_lost_or_damaged(exchange: Exchange, far: Far) -> None:
    here, there = exchange.store("here"), exchange.store("there")
    exchange.commit(here, "a", f=exchange.noise(1))
    exchange.commit(here, "b", f=exchange.noise(2))
    far.push(here, "a", "b")
    far.pull(there, "a")
    cache = there.root / "cache"
    (file,) = [path for path in cache.iterdir() if not path.name.startswith("refs-")]

    def asked() -> int:
        far.proxy.forget()
        plan_pull(there, far.remote(), [parse_ref("b")], force=False)
        return sum(is_pack(request) for request in far.proxy.seen)

    remembered = asked()
    for spoiled in (b"", b"nonsense", flipped(file.read_bytes()), file.read_bytes()[:-20]):
        file.write_bytes(spoiled)
        assert asked() > remembered
        assert asked() == remembered
    shutil.rmtree(cache)
    far.pull(there, "b")
    assert exchange.files(there, "b") == exchange.files(here, "b")


# --------------------------------------------------------------------------------------------------------- redirects


@pytest.fixture
def elsewhere(server: S3Server) -> Iterator[FaultProxy]:
    """Another address, which answers everything with bytes of its own."""
    with fault_proxy(server.endpoint) as proxy:
        proxy.faults = [Fault(status=200, body=b"internal" * 100, headers={"ETag": '"1"', "Last-Modified": _LONG_AGO})]
        yield proxy


_LONG_AGO = "Wed, 21 Oct 2015 07:28:00 GMT"


def test_what_comes_from_another_address_is_not_believed_and_sees_no_credentials(
    exchange: Exchange, far: Far, elsewhere: FaultProxy
) -> None:
    here, there = exchange.store("here"), exchange.store("there")
    exchange.commit(here, "a", f=exchange.noise(1))
    far.push(here, "a")
    far.spoil(Fault(reads_pack, status=307, headers={"Location": f"{elsewhere.url}/internal"}))
    with pytest.raises(LlmosError):
        far.pull(there, "a")
    assert exchange.value(there, "a") is None
    assert elsewhere.seen, "obstore has learned not to follow: say so in objectstore.py"
    for request in elsewhere.seen:
        assert "authorization" not in {name.lower() for name in request.headers}
        assert far.server.secret not in str(request)


def test_nothing_is_written_to_another_address(exchange: Exchange, far: Far, elsewhere: FaultProxy) -> None:
    here = exchange.store("here")
    exchange.commit(here, "a", f=exchange.noise(1))
    far.transport().initialise()
    far.spoil(Fault(writes_pack, status=307, headers={"Location": f"{elsewhere.url}/internal"}))
    with pytest.raises(Unsafe, match="sends on to another address") as caught:
        far.push(here, "a")
    assert caught.value.exit_code == 14
    assert elsewhere.seen == []


def test_a_secure_address_never_leads_to_an_open_one(
    elsewhere: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_servers.secure_redirect(tmp_path, f"{elsewhere.url}/internal") as url:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.pem"))
        web = WebTransport(WebAddress(url), HURRIED)
        with pytest.raises(Unsafe, match="sends on to another address"):
            web.read("FORMAT")
    assert elsewhere.seen == []

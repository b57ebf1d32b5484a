"""Models from a hub, against one on loopback that is spoilt in every way a network knows."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy, fault_proxy, flipped, until
from hub_server import REPO, Hub, hub_server
from huggingface_hub import constants

from llmos_cli.app import main
from llmos_cli.errors import (
    AccessDenied,
    Conflict,
    Damaged,
    LlmosError,
    NotFound,
    RemoteUnavailable,
    Unsafe,
    UsageError,
)
from llmos_cli.formats.names import RefName
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.progress import Silent
from llmos_cli.remote.hub.download import Patience, Web
from llmos_cli.remote.hub.hub import (
    HubAddress,
    HubPlan,
    HubResult,
    execute_hub_pull,
    open_hub,
    parse_hub_address,
    plan_hub_pull,
)
from llmos_cli.store.gc.gc import plan_gc
from llmos_cli.store.handle import Store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.partials import LIFE_SECONDS
from llmos_cli.store.refs.refs import read_ref, ref_names

QUICK = Patience(budget=1.5, first=1.5, stall=0.5, slow=2000.0, pause=0.02)


def weights(seed: int, rows: int = 3000) -> bytes:
    data = random.Random(seed).randbytes(rows * 64)
    return encode_header([("layer", "BF16", (rows, 32))], {}) + data


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": weights(1),
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"import os",
    "onnx/config.json": b"{}",
    "LICENSE": b"Apache-2.0",
}
TAKEN = {name: FILES[name] for name in ("LICENSE", "config.json", "model.safetensors", "tokenizer.json")}


@dataclass
class Puller:
    """Pulls into one store, from the hub or from a proxy before it."""

    store: Store
    url: str
    token: str | None = None
    patience: Patience = QUICK

    def plan(self, *patterns: str, revision: str = "main", ref: str = "tiny", force: bool = False) -> HubPlan:
        web = Web(self.url, self.token, self.patience)
        return plan_hub_pull(self.store, web, HubAddress(REPO, revision), RefName(ref), patterns, force=force)

    def pull(self, *patterns: str, **options: Any) -> HubResult:
        plan = self.plan(*patterns, **options)
        return execute_hub_pull(self.store, Web(self.url, self.token, self.patience), plan, Silent())

    def files(self, ref: str = "tiny") -> dict[str, bytes]:
        entry = read_ref(self.store, RefName(ref))
        assert entry
        return {item.path: read_file(self.store, item) for item in read_manifest(self.store, entry.id).files}

    def partials(self) -> list[Path]:
        return sorted(self.store.tmp.glob("*.part"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        server.publish("main", FILES)
        yield server


@pytest.fixture
def puller(hub: Hub, exchange: Any) -> Puller:
    return Puller(exchange.store("mine"), hub.url)


@pytest.fixture
def proxy(hub: Hub) -> Iterator[FaultProxy]:
    """Before what big files are served from."""
    with fault_proxy(hub.cdn) as proxy:
        hub.cdn = proxy.url
        yield proxy


def test_a_model_is_pinned_and_says_where_it_came_from(puller: Puller, hub: Hub, exchange: Any) -> None:
    done = puller.pull()
    assert puller.files() == TAKEN
    manifest = read_manifest(puller.store, done.id)
    assert manifest.kind == "model"
    assert manifest.recipe
    assert manifest.recipe.command == "pull"
    assert manifest.recipe.params["revision"] == hub.branches["main"]
    sources = {source.name: source.size for source in manifest.recipe.sources}
    assert sources == {f"hf://{REPO}@{hub.branches['main']}/{name}": len(data) for name, data in TAKEN.items()}
    assert puller.partials() == []
    assert exchange.problems(puller.store) == []


def test_the_same_commit_by_any_name_is_the_same_object_and_asks_for_no_file(puller: Puller, hub: Hub) -> None:
    first = puller.pull()
    hub.seen.clear()
    assert puller.pull(revision=hub.branches["main"]) == HubResult(first.id, 0, None)
    assert [path.partition("/revision/")[0] for _, path, _ in hub.seen] == [f"/api/models/{REPO}"]


def test_of_the_next_revision_only_what_changed_is_fetched(puller: Puller, hub: Hub) -> None:
    first = puller.pull()
    old = hub.branches["main"]
    hub.publish("main", FILES | {"config.json": b'{"model_type": "gpt2"}'})
    hub.seen.clear()
    second = puller.pull()
    assert puller.files() == TAKEN | {"config.json": b'{"model_type": "gpt2"}'}
    assert [path.rpartition("/")[2] for _, path, _ in hub.seen if "/resolve/" in path] == ["config.json"]
    manifest = read_manifest(puller.store, second.id)
    assert manifest.recipe
    assert all(hub.branches["main"] in source.name for source in manifest.recipe.sources)
    assert puller.pull(revision=old).id == first.id


def test_named_files_are_taken_and_no_others(puller: Puller) -> None:
    puller.pull("*.bin", "onnx/*")
    assert puller.files() == {name: FILES[name] for name in ("onnx/config.json", "pytorch_model.bin")}


def test_pickles_alone_are_not_taken_unasked(puller: Puller, hub: Hub) -> None:
    hub.publish("main", {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    with pytest.raises(NotFound, match=r"no weights as safetensors, but pytorch_model\.bin") as caught:
        puller.pull()
    assert "--files 'pytorch_model.bin'" in str(caught.value.hint)


def test_a_ref_that_holds_something_else_stays(puller: Puller, exchange: Any) -> None:
    mine = exchange.commit(puller.store, "tiny", a=b"my own work")
    with pytest.raises(Conflict, match="did not come from hf://org/tiny"):
        puller.pull()
    assert exchange.value(puller.store, "tiny") == mine
    assert puller.pull(force=True).id != mine


def test_what_has_arrived_is_not_fetched_again(puller: Puller, hub: Hub, proxy: FaultProxy) -> None:
    proxy.faults = [Fault(cut=100_000)]
    with pytest.raises(RemoteUnavailable, match="does not serve") as caught:
        Puller(puller.store, hub.url, patience=replace(QUICK, budget=0.0)).pull()
    assert "goes on from what has arrived" in str(caught.value.hint)
    assert ref_names(puller.store) == []
    there = max(path.stat().st_size for path in puller.partials())
    assert 0 < there <= 100_000
    proxy.forget()
    hub.seen.clear()
    puller.pull()
    assert puller.files() == TAKEN
    assert hub.bytes_from("cdn") == [f"bytes={there}-"]


def test_a_connection_that_breaks_again_and_again_is_taken_up_again(puller: Puller, proxy: FaultProxy) -> None:
    proxy.faults = [Fault(cut=70_000, times=2)]
    puller.pull()
    assert puller.files() == TAKEN


def test_a_server_that_ignores_ranges_is_read_from_the_start(puller: Puller, proxy: FaultProxy) -> None:
    proxy.faults = [Fault(cut=70_000, times=1), Fault(strip="Range")]
    puller.pull()
    assert puller.files() == TAKEN


def test_wrong_bytes_are_asked_for_again(puller: Puller, proxy: FaultProxy) -> None:
    proxy.faults = [Fault(change=flipped, times=1)]
    puller.pull()
    assert puller.files() == TAKEN


def test_wrong_bytes_are_never_stored(puller: Puller, proxy: FaultProxy) -> None:
    proxy.faults = [Fault(change=flipped)]
    with pytest.raises(Damaged, match=r"model.safetensors that are not those of hf://org/tiny"):
        puller.pull()
    assert ref_names(puller.store) == []
    assert not any(path.stat().st_size > 10_000 for path in puller.partials())


def test_wrong_bytes_of_a_small_file_are_never_stored(puller: Puller, hub: Hub) -> None:
    with fault_proxy(hub.url) as proxy:
        proxy.faults = [Fault(where=lambda request: request.path.endswith("/config.json"), change=flipped)]
        with pytest.raises(Damaged, match=r"config\.json"):
            Puller(puller.store, proxy.url).pull()
    assert ref_names(puller.store) == []


def test_a_partial_that_rotted_is_fetched_anew(puller: Puller, hub: Hub, proxy: FaultProxy) -> None:
    proxy.faults = [Fault(cut=100_000)]
    with pytest.raises(RemoteUnavailable):
        Puller(puller.store, hub.url, patience=replace(QUICK, budget=0.0)).pull()
    partial = max(puller.partials(), key=lambda path: path.stat().st_size)
    partial.write_bytes(bytes(partial.stat().st_size))
    proxy.forget()
    puller.pull()
    assert puller.files() == TAKEN


@pytest.mark.parametrize(
    "fault",
    [
        Fault(change=lambda data: b"<html>please log in</html>"),
        Fault(change=lambda data: data[:-1]),
        Fault(change=lambda data: data + b"more"),
        Fault(stall=True),
        Fault(drip=100),
        Fault(status=503),
        Fault(status=0),
    ],
    ids=["a page", "cut short", "too long", "stalled", "a drip", "503", "reset"],
)
def test_a_hub_that_does_not_deliver_is_given_up_in_bounded_time(
    puller: Puller, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.faults = [fault]
    with pytest.raises(RemoteUnavailable, match=r"does not serve hf://org/tiny, file model.safetensors"):
        puller.pull()
    assert ref_names(puller.store) == []


@pytest.mark.parametrize("status", [429, 503])
def test_a_storm_passes(puller: Puller, hub: Hub, status: int) -> None:
    with fault_proxy(hub.url) as proxy:
        proxy.faults = [Fault(status=status, headers={"Retry-After": "0"}, times=5)]
        Puller(puller.store, proxy.url).pull()
    assert puller.files() == TAKEN


def test_a_hub_that_asks_for_more_time_than_there_is_is_believed(puller: Puller, hub: Hub) -> None:
    with fault_proxy(hub.url) as proxy:
        proxy.faults = [Fault(status=429, headers={"Retry-After": "3600"})]
        with pytest.raises(RemoteUnavailable, match="asks to wait 3600 seconds"):
            Puller(puller.store, proxy.url).plan()
        assert proxy.count() == 1


def test_who_is_not_let_in_is_told_so(puller: Puller, hub: Hub) -> None:
    hub.token, hub.gated = "hf_right", True
    with pytest.raises(AccessDenied) as caught:
        Puller(puller.store, hub.url, "hf_wrong").plan()
    assert "HF_TOKEN" in str(caught.value.hint)
    assert "hf_wrong" not in f"{caught.value} {caught.value.hint}"


def test_what_is_not_there_is_not_found(puller: Puller, hub: Hub) -> None:
    with pytest.raises(NotFound, match="no revision v9"):
        puller.plan(revision="v9")
    with pytest.raises(NotFound, match="no hf://org/other"):
        plan_hub_pull(puller.store, Web(hub.url, None, QUICK), HubAddress("org/other"), RefName("a"), (), force=False)
    hub.token = "hf_right"  # a private repository looks as if it were not there
    with pytest.raises(NotFound, match="no hf://org/tiny"):
        puller.plan()


def test_the_token_goes_to_the_hub_and_nowhere_else(puller: Puller, hub: Hub) -> None:
    hub.token = "hf_secret"
    Puller(puller.store, hub.url, "hf_secret").pull()
    assert puller.files() == TAKEN
    sent = {
        where: {headers.get("Authorization") for at, _, headers in hub.seen if at == where} for where in ("hub", "cdn")
    }
    assert sent == {"hub": {"Bearer hf_secret"}, "cdn": {None}}


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/",
        "http://user:password@127.0.0.1/x",
        "gopher://127.0.0.1/",
    ],
)
def test_a_redirect_astray_is_not_followed(puller: Puller, hub: Hub, target: str) -> None:
    hub.redirect = target
    with pytest.raises(Unsafe, match="not followed"):
        puller.pull()
    assert ref_names(puller.store) == []


@pytest.mark.parametrize(
    ("endpoint", "target"),
    [
        ("https://hub.example", "http://cdn.example/x"),
        ("https://hub.example", "https://127.0.0.1/x"),
        ("https://hub.example", "https://10.0.0.1/x"),
        ("https://hub.example", "https://[::1]/x"),
        ("https://hub.example", "https://100.100.100.200/x"),
    ],
)
def test_a_hub_out_there_leads_neither_inside_nor_to_plain_http(endpoint: str, target: str) -> None:
    with pytest.raises(Unsafe, match="not followed"), Web(endpoint, None, QUICK).get(target):
        pass


def test_a_name_that_stands_for_an_address_inside_is_found_out_before_anything_is_sent(hub: Hub) -> None:
    port = hub.cdn.rpartition(":")[2]
    web = Web("http://hub.example", None, QUICK)  # a public one, as far as it is known
    with pytest.raises(Unsafe, match=r"127\.0\.0\.1|::1"), web.get(f"http://localhost:{port}/x"):
        pass
    assert hub.seen == []


def test_redirects_in_a_circle_end(puller: Puller, hub: Hub) -> None:
    hub.redirect = f"{hub.url}/{REPO}/resolve/{hub.branches['main']}/model.safetensors"
    with pytest.raises(RemoteUnavailable, match="redirects more than"):
        puller.pull()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"<html>a portal</html>", Damaged),
        (b"[]", Damaged),
        (json.dumps({"sha": "../../etc", "siblings": []}).encode(), Damaged),
        (json.dumps({"sha": "0" * 40, "siblings": []}).encode(), NotFound),
        (json.dumps({"sha": "0" * 40, "siblings": [{"rfilename": "a.json", "size": 1}]}).encode(), Damaged),
        (
            json.dumps({"sha": "0" * 40, "siblings": [{"rfilename": "a.json", "size": 1, "blobId": "../x"}]}).encode(),
            Damaged,
        ),
        (
            json.dumps(
                {"sha": "0" * 40, "siblings": [{"rfilename": "../a/b.json", "size": 1, "blobId": "0" * 40}]}
            ).encode(),
            Unsafe,
        ),
    ],
)
def test_an_answer_that_cannot_be_trusted_is_refused(
    puller: Puller, hub: Hub, answer: bytes, error: type[LlmosError]
) -> None:
    with fault_proxy(hub.url) as proxy:
        proxy.faults = [Fault(change=lambda data: answer)]
        with pytest.raises(error):
            Puller(puller.store, proxy.url).plan("*", "../*")


def test_a_commit_that_was_asked_for_must_be_the_one_that_is_given(puller: Puller, hub: Hub) -> None:
    asked = "1" * 40
    hub.branches[asked] = hub.branches["main"]
    with pytest.raises(Unsafe, match="where 1111"):
        puller.plan(revision=asked)


@pytest.mark.parametrize(
    "text", ["hf://", "hf://a/b/c", "hf://../b", "hf://a/b@", "hf://a/b@../x", "hf://a b/c", "hf://-a/b"]
)
def test_a_malformed_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="malformed address"):
        parse_hub_address(text)


@pytest.mark.parametrize("endpoint", ["hub.example", "file:///etc", "https://me:secret@hub.example", "https://a b"])
def test_a_malformed_endpoint_is_refused_and_not_repeated(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(UsageError, match="HF_ENDPOINT is not the URL of a hub") as caught:
        open_hub()
    assert "secret" not in f"{caught.value} {caught.value.hint}"


def test_where_no_hub_may_be_asked_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteUnavailable, match="HF_HUB_OFFLINE is set"):
        open_hub()


def test_an_address_is_read() -> None:
    assert parse_hub_address("hf://gpt2") == HubAddress("gpt2")
    assert parse_hub_address("hf://Org/Na.me@refs/pr/1") == HubAddress("Org/Na.me", "refs/pr/1")
    assert HubAddress("Org/Na.me").ref == RefName("Na.me")


def test_gc_takes_what_nobody_goes_on_with(puller: Puller, hub: Hub, proxy: FaultProxy) -> None:
    proxy.faults = [Fault(cut=100_000)]
    with pytest.raises(RemoteUnavailable):
        Puller(puller.store, hub.url, patience=replace(QUICK, budget=0.0)).pull()
    partials = puller.partials()
    assert partials
    assert not any(path in partials for path, _ in plan_gc(puller.store).temporary)
    old = time.time() - LIFE_SECONDS - 60
    for path in partials:
        os.utime(path, (old, old))
    assert {path for path, _ in plan_gc(puller.store).temporary} >= set(partials)


def test_the_command_goes_on_after_a_kill(hub: Hub, tmp_path: Path) -> None:
    """kill -9 in the middle of a slow answer; the next run asks for the rest."""
    hub.publish("main", FILES | {"model.safetensors": weights(2, rows=40_000)})
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "llmos_cli", "--store", str(tmp_path / "s")]
    (tmp_path / "home").mkdir()
    subprocess.run([*command, "init"], check=True, env=environment, capture_output=True)
    (store,) = tmp_path.glob("s/**/FORMAT")
    parts = store.parent / "tmp"

    def arrived() -> int:
        return max((path.stat().st_size for path in parts.glob("*.part")), default=0)

    with fault_proxy(hub.cdn) as proxy:
        upstream, hub.cdn = hub.cdn, proxy.url
        proxy.faults = [Fault(drip=400_000)]
        pulling = subprocess.Popen([*command, "pull", f"hf://{REPO}"], env=environment, stderr=subprocess.PIPE)
        until(lambda: arrived() > 300_000)
        pulling.send_signal(signal.SIGKILL)
        pulling.communicate()
        hub.cdn = upstream
    there = arrived()
    hub.seen.clear()
    done = subprocess.run(
        [*command, "--json", "pull", f"hf://{REPO}"], check=True, env=environment, capture_output=True, text=True
    )
    answer = json.loads(done.stdout)
    assert (answer["ref"], answer["refs"][0]["status"]) == ("tiny:latest", "new")
    assert answer["revision"] == hub.branches["main"]
    assert hub.bytes_from("cdn") == [f"bytes={there}-"]
    assert "hf_secret" not in done.stdout + done.stderr
    again = subprocess.run(
        [*command, "pull", f"hf://{REPO}"], check=True, env=environment, capture_output=True, text=True
    )
    assert "up to date with hf://org/tiny" in again.stdout


def test_a_hub_has_no_all(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", f"hf://{REPO}", "--all"]) == 2
    assert "has one name here" in capfd.readouterr().err

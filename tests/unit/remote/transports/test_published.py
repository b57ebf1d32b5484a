"""A folder remote behind a plain web server: published, it can be pulled from."""

from pathlib import Path
from typing import Any

import pytest
import store_servers

from llmos_cli.errors import AccessDenied, Damaged, NotFound, RemoteUnavailable, Unsafe, UsageError
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange.pull import execute_pull, plan_pull
from llmos_cli.remote.exchange.push import plan_push
from llmos_cli.remote.open import Remote, is_ready, normal_url, open_transport
from llmos_cli.remote.transports import hdfs
from llmos_cli.remote.transports.listing import LISTING, parse_listing, publish, render_listing

Exchange = Any


def pull(store: Any, url: str) -> None:
    remote = Remote("web", open_transport(url))
    execute_pull(store, remote, plan_pull(store, remote, None, force=False), Silent())


def test_what_is_published_can_be_pulled_and_a_push_renews_it(exchange: Exchange, tmp_path: Path) -> None:
    here, there = exchange.store("here"), exchange.store("there")
    first = exchange.commit(here, "a", f=exchange.noise(1))
    exchange.push(here, "a")
    with store_servers.web(tmp_path / "nas", tmp_path / "logs") as url:
        with pytest.raises(NotFound, match="has no LISTING") as caught:
            pull(there, url)
        assert "remote publish" in str(caught.value.hint)
        publish(here, exchange.remote().transport)
        pull(there, url)
        assert exchange.value(there, "a") == first
        second = exchange.commit(here, "a", f=exchange.noise(2, 9_000_000))
        exchange.push(here, "a")
        pull(there, url)
        assert exchange.value(there, "a") == second
        assert exchange.files(there, "a") == exchange.files(here, "a")
        assert exchange.problems(exchange.store("nas")) == []
        transport = open_transport(url)
        assert is_ready(transport)
        assert transport.size("packs/absent") is None
        exchange.commit(here, "b", f=exchange.noise(3))
        plan_push(here, Remote("web", transport), None, force=False)
        for attempt in (
            transport.initialise,
            lambda: transport.create("refs/b/latest/0000000001", b"x"),
            lambda: transport.delete("FORMAT"),
        ):
            with pytest.raises(AccessDenied, match="can only be read"):
                attempt()
    with pytest.raises(RemoteUnavailable):
        pull(there, url)


def test_a_remote_without_the_file_is_not_renewed(exchange: Exchange) -> None:
    here = exchange.store("here")
    exchange.commit(here, "a", f=exchange.noise(1))
    exchange.push(here, "a")
    assert not (exchange.folder / "nas" / LISTING).exists()


def test_a_listing_reads_back_or_is_damaged() -> None:
    keys = {"FORMAT": 8, "packs/ab/x.pack": 0, "refs/n/t/0000000001": 12}
    data = render_listing(keys)
    assert parse_listing(data) == keys
    assert parse_listing(render_listing({})) == {}
    for spoiled in (b"", data[:-1], data[1:], data.replace(b"8", b"9", 1), b"<html></html>", b"\xff" * 40):
        with pytest.raises(Damaged):
            parse_listing(spoiled)
    with pytest.raises(Damaged):
        parse_listing(render_listing({"../../etc/passwd": 1}))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://host/models/", "https://host/models"),
        ("HTTP://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("hdfs://nn:8020/models/", "hdfs://nn:8020/models"),
    ],
)
def test_an_address_is_kept_in_one_form(text: str, kept: str) -> None:
    assert normal_url(text, Path("/work")) == kept


@pytest.mark.parametrize(
    "text",
    [
        "https://user:canary-secret@host/x",
        "https://host/x?token=canary-secret",
        "https://host/../x",
        "https://",
        "https://host/a b",
        "hdfs://nn/../x",
        "hdfs://user@nn/x",
        "hdfs:///x",
    ],
)
def test_a_malformed_address_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        normal_url(text, Path("/work"))
    assert "canary" not in f"{caught.value.message}{caught.value.hint}"


@pytest.mark.parametrize("text", ["http://169.254.169.254/latest", "http://[fe80::1]/x"])
def test_the_machines_own_network_services_are_no_remote(text: str) -> None:
    with pytest.raises(Unsafe):
        normal_url(text, Path("/work"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://127.0.0.1:1/x", RemoteUnavailable),
        ("hdfs://127.0.0.1:1/x", RemoteUnavailable),
        ("az://container/x?account=team&endpoint=http://127.0.0.1:1/team", AccessDenied),
    ],
)
def test_what_cannot_be_reached_is_said_with_what_to_do(
    url: str, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(hdfs._BOUNDS, "dfs.client.failover.max.attempts", "2")
    with pytest.raises(expected) as caught:
        open_transport(url).size("FORMAT")
    assert url in str(caught.value)
    assert caught.value.hint

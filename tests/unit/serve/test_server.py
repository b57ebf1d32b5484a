import socket
from pathlib import Path

import pytest

from llmos_cli.errors import LlmosError, Unsafe, UsageError
from llmos_cli.serve.server import allowed_hosts, bind, read_key, url_of


def test_port_zero_is_a_free_one() -> None:
    with bind("127.0.0.1", 0) as bound:
        assert url_of(bound).startswith("http://127.0.0.1:")
        assert bound.getsockname()[1] > 0


def test_a_taken_port_is_named_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(LlmosError, match=f"port {port} on 127.0.0.1 is taken") as caught:
            bind("127.0.0.1", port)
    assert caught.value.exit_code == 11
    assert "--port 0" in (caught.value.hint or "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "::ffff:127.0.0.1"])
def test_an_address_that_others_can_reach_is_refused(host: str) -> None:
    with pytest.raises(Unsafe, match="answer everybody") as caught:
        bind(host, 0)
    assert caught.value.exit_code == 14
    assert "--api-key-file" in (caught.value.hint or "")


def test_a_key_allows_it_and_then_any_name() -> None:
    with bind("0.0.0.0", 0, guarded=True) as bound:
        assert url_of(bound).startswith("http://127.0.0.1:")
        assert allowed_hosts(bound, "0.0.0.0") is None


@pytest.mark.parametrize("host", ["", "not a host", "nowhere.invalid", "a" * 300])
def test_what_is_no_address_is_a_usage_error(host: str) -> None:
    with pytest.raises(UsageError, match="not an address of this machine"):
        bind(host, 0)


def test_an_address_of_another_machine_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="not an address of this machine"):
        bind("192.0.2.1", 0, guarded=True)


def test_a_loopback_bind_answers_loopback_names_and_its_own() -> None:
    with bind("127.0.0.2", 0) as bound:
        assert allowed_hosts(bound, "127.0.0.2") == {"localhost", "127.0.0.1", "[::1]", "127.0.0.2"}


def test_a_port_can_be_taken_again_right_after_a_server(engine, serve) -> None:
    import httpx

    url = serve(engine)
    httpx.get(f"{url}/health")
    with bind("127.0.0.1", 0) as bound:
        assert url_of(bound) != url


def test_a_key_is_one_word_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("a-key-of-enough-letters\n")
    path.chmod(0o644)
    with pytest.raises(Unsafe, match="others can read") as caught:
        read_key(path)
    assert caught.value.hint == f"chmod 600 {path}"
    path.chmod(0o600)
    assert read_key(path) == b"a-key-of-enough-letters"
    for bad in ("", "short", "two words of sixteen letters", "ä" * 20):
        path.write_text(bad)
        with pytest.raises(UsageError, match="no API key"):
            read_key(path)
    with pytest.raises(LlmosError, match="reading the API key"):
        read_key(tmp_path / "none")

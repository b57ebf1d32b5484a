"""`push --prune` and `pull --prune`: what one side has given up goes on the other, and nothing else."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.app import main
from llmos_cli.errors import Conflict
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.remote.exchange.prune import remove_there, surplus_there
from llmos_cli.remote.exchange.refs import read_remote_ref

Run = Callable[..., tuple[int, Any, str]]
Exchange = Any


@pytest.fixture
def llmos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Two stores, `here` and `there`, that know the remote `nas`, which has `a` and `b` of both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run(*words: str) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = main([*words, "--json"])
        out, err = capfd.readouterr()
        return code, json.loads(out) if out else None, err

    for store in ("here", "there"):
        assert run("init", store)[0] == 0
        assert run("--store", store, "remote", "add", "nas", "nas")[0] == 0
    for number, name in enumerate("ab"):
        (tmp_path / name).write_bytes(random.Random(number).randbytes(9000))
        assert run("--store", "here", "add", name, name)[0] == 0
    assert run("--store", "here", "push", "nas", "--all")[0] == 0
    assert run("--store", "there", "pull", "nas", "--all")[0] == 0
    return run


def names(llmos: Run, store: str) -> list[str]:
    return [item["ref"] for item in llmos("--store", store, "ls")[1]["refs"]]


def test_what_is_removed_here_goes_there_and_then_from_who_pulled_it(llmos: Run) -> None:
    llmos("--store", "there", "add", "a", "own")
    llmos("--store", "here", "rm", "b")
    assert llmos("--store", "here", "push", "nas", "--all")[1]["pruned"] == []
    tried = llmos("--store", "here", "push", "nas", "--all", "--prune", "--dry-run")[1]
    assert (tried["pruned"], tried["dry_run"]) == (["b:latest"], True)
    assert llmos("--store", "there", "pull", "nas", "--all", "--prune")[1]["pruned"] == []
    assert llmos("--store", "here", "push", "nas", "--all", "--prune")[1]["pruned"] == ["b:latest"]
    assert names(llmos, "nas") == ["a:latest"]
    assert llmos("--store", "there", "pull", "nas", "--all", "--prune", "--dry-run")[1]["pruned"] == ["b:latest"]
    assert names(llmos, "there") == ["a:latest", "b:latest", "own:latest"]
    assert llmos("--store", "there", "pull", "nas", "--all", "--prune")[1]["pruned"] == ["b:latest"]
    assert names(llmos, "there") == ["a:latest", "own:latest"]
    assert llmos("--store", "here", "add", "b", "b")[0] == llmos("--store", "here", "push", "nas", "b")[0] == 0


def test_what_has_moved_since_it_was_pulled_stays(llmos: Run) -> None:
    llmos("--store", "there", "add", "a", "b")
    llmos("--store", "here", "rm", "b")
    llmos("--store", "here", "push", "nas", "--all", "--prune")
    assert llmos("--store", "there", "pull", "nas", "--all", "--prune")[1]["pruned"] == []
    assert names(llmos, "there") == ["a:latest", "b:latest"]


def test_a_store_that_shares_nothing_does_not_empty_a_remote(llmos: Run) -> None:
    llmos("init", "other")
    llmos("--store", "other", "remote", "add", "nas", "nas")
    code, _, err = llmos("--store", "other", "push", "nas", "--all", "--prune")
    assert (code, "would remove all 2" in err) == (14, True)
    assert names(llmos, "nas") == ["a:latest", "b:latest"]


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_it_goes_with_all(llmos: Run, verb: str) -> None:
    assert llmos("--store", "here", verb, "nas", "a", "--prune")[0] == 2


def test_a_ref_that_moves_meanwhile_is_not_removed(exchange: Exchange) -> None:
    here, other = exchange.store("here"), exchange.store("other")
    exchange.commit(here, "a", f=exchange.noise(1))
    exchange.commit(here, "kept", f=exchange.noise(1))
    exchange.push(here, "a", "kept")
    exchange.commit(other, "kept", f=exchange.noise(1))
    remote = exchange.remote()
    (seen,) = surplus_there(other, remote, Silent())
    newer = exchange.commit(here, "a", f=exchange.noise(2))
    exchange.push(here, "a")
    with pytest.raises(Conflict):
        remove_there(remote.transport, seen, Silent())
    assert read_remote_ref(remote.transport, parse_ref("a"), Silent()).id == newer

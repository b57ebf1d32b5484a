"""Pools, backup and restore as they are typed."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.app import main

Run = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def llmos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in an empty folder: exit code, stdout (parsed with --json), stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMOS_STORE", raising=False)

    def run(*words: str) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = main(list(words))
        out, err = capfd.readouterr()
        return code, json.loads(out) if "--json" in words and out else out, err

    return run


@pytest.fixture
def filled(llmos: Run) -> Run:
    """A store with four refs, and a pool of four nodes that has them."""
    assert llmos("init")[0] == 0
    for number in range(4):
        Path(f"{number}.bin").write_bytes(random.Random(number).randbytes(50_000))
        assert llmos("add", f"{number}.bin", f"web:v{number}")[0] == 0
    assert llmos("remote", "add", "team", "--pool", "--replicas", "2", "a", "b", "c", "d")[0] == 0
    assert llmos("push", "team", "--all")[0] == 0
    return llmos


def test_a_pool_is_shown_with_what_each_node_holds(filled: Run, tmp_path: Path) -> None:
    code, found, _ = filled("remote", "show", "team", "--json")
    assert code == 0
    assert (found["packs"], found["replicas"], found["refs"], found["packs_a_node"]) == (4, 2, 4, 2.0)
    assert [node["url"] for node in found["nodes"]] == [str(tmp_path / name) for name in "abcd"]
    assert sum(node["packs"] for node in found["nodes"]) == 8
    code, out, _ = filled("remote", "show", "team")
    assert out.startswith("team: 4 packs, 203 kB, 4 refs; 2 copies on 4 nodes, about 2 packs a node\n")
    code, out, _ = filled("remote", "status", "team")
    assert (code, out.splitlines()[-1]) == (0, "all is well")
    assert filled("remote", "show", str(tmp_path / "b"), "--json")[1]["pool"] == found["pool"]
    assert filled("remote", "show", "nowhere")[0] == 10


def test_a_node_is_wiped_repaired_and_rotten(filled: Run) -> None:
    shutil.rmtree("b")
    code, status, _ = filled("remote", "status", "team", "--json")
    assert (code, status["healthy"], status["nodes_up"]) == (0, False, 3)
    assert len(status["under_replicated"]) == 8 - sum(node["packs"] for node in status["nodes"])
    code, plan, _ = filled("remote", "repair", "team", "--dry-run", "--json")
    assert (code, plan["copies"], plan["dry_run"]) == (0, len(status["under_replicated"]), True)
    assert not Path("b").exists()
    code, out, _ = filled("remote", "repair", "team")
    assert code == 0
    assert "filled and let in again: it is empty" in out
    assert filled("remote", "status", "team", "--json")[1]["healthy"] is True
    assert filled("remote", "repair", "team")[1] == "nothing to repair\n"
    pack = next(Path("c").glob("packs/*/*.pack"), None) or next(Path("d").glob("packs/*/*.pack"))
    pack.chmod(0o644)
    pack.write_bytes(pack.read_bytes()[:-1] + b"?")
    code, found, err = filled("remote", "scrub", "team", "--json")
    assert (code, json.loads(err)["error"]["hint"]) == (13, "llmos remote repair team")
    assert [Path(item["key"]).name for item in found["damaged"]] == [pack.name]
    assert filled("remote", "repair", "team", "--quick", "--json")[1]["copies"] == 0
    assert filled("remote", "repair", "team", "--json")[1]["copies"] == 1
    code, out, _ = filled("remote", "scrub", "team", "--percent", "50")
    assert (code, out.endswith("every byte is what it was\n")) == (0, True)


def test_nodes_come_and_go(filled: Run, tmp_path: Path) -> None:
    code, found, _ = filled("remote", "add-node", "team", "e", "--json")
    assert (code, found["epoch"], len(found["nodes"])) == (0, 2, 5)
    assert filled("remote", "ls", "--json")[1]["remotes"][0]["url"].endswith("/e")
    assert filled("remote", "add-node", "team", "e")[0] == 2
    assert filled("remote", "repair", "team")[0] == 0
    shutil.rmtree("a")
    assert filled("remote", "rm-node", "team", "nothing")[0] == 10
    code, out, err = filled("remote", "rm-node", "team", "a")
    assert (code, out) == (0, "a no longer in team\n")
    assert "llmos remote repair team moves what has to move" in err
    assert filled("remote", "repair", "team")[0] == 0
    assert filled("remote", "status", "team", "--json")[1]["healthy"] is True
    assert filled("clone", "c", "copy")[0] == 0
    assert filled("--store", "copy", "remote", "ls", "--json")[1]["remotes"][0]["url"].count(",") == 3
    assert filled("--store", "copy", "checkout", "web:v3", "out")[0] == 0
    assert Path("out/3.bin").read_bytes() == Path("3.bin").read_bytes()


def test_too_few_nodes_are_16_and_fewer_copies_3(filled: Run) -> None:
    assert filled("remote", "add", "mirror", "--pool", "--replicas", "3", "x", "y", "z")[0] == 0
    shutil.move("x", "away")
    code, _, err = filled("push", "mirror", "web:v0")
    assert code == 16
    assert "hint: bring the nodes back" in err
    code, found, err = filled("push", "mirror", "web:v0", "--allow-degraded", "--json")
    assert (code, found["degraded_packs"], found["refs"][0]["status"]) == (3, 1, "new")
    assert json.loads(err.splitlines()[-1])["error"]["code"] == "partly-done"
    shutil.move("away", "x")
    assert filled("remote", "repair", "mirror")[0] == 0
    assert filled("push", "mirror", "web:v0", "--allow-degraded")[0] == 0
    assert filled("remote", "add", "nas", "nas")[0] == 0
    assert filled("push", "nas", "web:v0", "--allow-degraded")[0] == 2


def test_what_makes_no_pool_is_refused(filled: Run) -> None:
    assert filled("remote", "add", "more", "p", "q")[0] == 2
    assert filled("remote", "add", "more", "--pool", "--replicas", "3", "p", "q")[0] == 2
    assert filled("remote", "add", "team", "--pool", "p", "q")[0] == 2
    assert filled("remote", "add", "nas", "nas")[0] == 0
    for words in (["show"], ["status"], ["scrub"], ["repair"]):
        code, _, err = filled("remote", *words, "nas")
        assert (code, "nas is not a pool" in err) == (2, True)
    assert filled("remote", "add", "more", "--pool", "a", "p")[0] == 2, "a belongs to team"
    assert not Path("p").exists()
    assert filled("remote", "add", "again", "--pool", "b")[0] == 0, "one node tells of all"


def test_backup_and_restore_there_and_back(filled: Run) -> None:
    code, planned, _ = filled("backup", "team", "--dry-run", "--json")
    assert (code, planned["refs"], planned["packs"], planned["snapshot"]) == (0, 4, 0, None), "it was pushed already"
    code, done, _ = filled("backup", "team", "--json")
    assert (code, done["sent"], done["manifests"]) == (0, 0, 4)
    code, found, _ = filled("backup", "team", "--list", "--json")
    assert [item["id"] for item in found["snapshots"]] == [done["id"]]
    log = {path.relative_to(".llmos"): path.read_bytes() for path in Path(".llmos/refs").glob("*/*/*")}
    shutil.rmtree(".llmos")
    shutil.rmtree("d")
    assert filled("init")[0] == 0
    code, out, _ = filled("restore", "pool:a,b,c", "--dry-run")
    assert (code, out.count("would restore web:v")) == (0, 4)
    code, back, _ = filled("restore", "./a", "--json")
    assert (code, back["snapshot"], {ref["status"] for ref in back["refs"]}) == (0, done["snapshot"], {"new"})
    assert {path.relative_to(".llmos"): path.read_bytes() for path in Path(".llmos/refs").glob("*/*/*")} == log
    assert filled("fsck")[0] == 0
    assert filled("restore", "./a")[1] == "4 refs unchanged\n"
    Path("n").write_bytes(b"new")
    assert filled("add", "n", "web:v1")[0] == 0
    code, _, err = filled("restore", "./a", "web:v1")
    assert (code, "web:v1 has moved on" in err) == (17, True)
    code, out, _ = filled("restore", "./a", "web:v1", "--force")
    assert (code, "(set back, forced)" in out) == (0, True)


def test_old_snapshots_go_and_the_list_says_what_is_left(filled: Run) -> None:
    assert filled("remote", "add", "nas", "nas")[0] == 0
    first = filled("backup", "nas", "--json")[1]
    old = Path("nas/snapshots") / first["snapshot"]
    again = filled("backup", "nas", "--keep-daily", "2", "--dry-run", "--json")[1]
    assert (again["pruned"], old.exists()) == ([], True)
    Path("n").write_bytes(b"new")
    assert filled("add", "n", "web:v1")[0] == 0
    code, out, _ = filled("backup", "nas", "--keep-daily", "1")
    assert (code, "removed snapshot @" in out, old.exists()) == (0, True, False)
    code, out, _ = filled("backup", "nas", "--list")
    assert len(out.splitlines()) == 2
    assert filled("backup", "nas", "--list", "--keep-daily", "1")[0] == 2
    assert filled("backup", "nowhere")[0] == 10
    assert filled("restore", "nas", "--at", "2020-01-01")[0] == 10
    assert filled("restore", "nas", "--at", "tomorrow")[0] == 2
    assert filled("restore", "nas", "nothing")[0] == 10

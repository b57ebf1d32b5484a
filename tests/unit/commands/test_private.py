"""A store is its owner's: nobody else can look into it, and nobody is led into somebody else's."""

import json
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.app import main

Llmos = Callable[..., Any]
AsUser = Callable[..., tuple[int, str]]
ALICE, BOB = 54321, 54322

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")


@pytest.fixture
def as_user(llmos: Llmos, tmp_path: Path) -> AsUser:
    """Run one command line as somebody else, in a child; gives its exit code and what it wrote to both streams.

    What others run has run before: whoever they are, they may not be able to read this Python's own files.
    """
    first = tmp_path / "first"
    (tmp_path / "f").write_bytes(b"1")
    for words in (("init",), ("add", tmp_path / "f", "x"), ("push", tmp_path / "away", "--all"), ("tag", "x", "y")):
        assert llmos("--store", first, *words).code == 0
    for words in (("push", tmp_path / "away", "--all"), ("pull", tmp_path / "away", "--all"), ("ls",)):
        assert llmos("--store", first, "--json", *words).code == 0
    llmos("--store", "nowhere", "ls")

    def run(uid: int, *words: str | Path) -> tuple[int, str]:
        answer_out, answer_in = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons dislike fork beside threads
            pid = os.fork()
        if pid == 0:
            try:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
                sys.stdout = sys.stderr = os.fdopen(answer_in, "w")
                os._exit(main([str(word) for word in words]))
            finally:
                os._exit(99)
        os.close(answer_in)
        with open(answer_out, "rb") as pipe:
            written = pipe.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written

    return run


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda mask: os.umask(mask) and None
    os.umask(before)


@pytest.fixture
def open_folder(folder: Path) -> Path:
    """The current folder, and the way to it, for everybody to enter."""
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    return folder


def modes(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): oct(stat.S_IMODE(path.stat().st_mode)) for path in (root, *root.glob("**/*"))}


def open_to_others(root: Path) -> set[str]:
    return {name for name, mode in modes(root).items() if int(mode, 8) & 0o077 and not name.endswith(".pack")}


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_whatever_the_umask_a_store_is_its_owners_alone(
    llmos: Llmos, folder: Path, umask: Callable[[int], None], mask: int
) -> None:
    umask(mask)
    assert llmos("init", "deep/er").code == 0
    root = folder / "deep" / "er" / ".llmos"
    (folder / "f").write_bytes(os.urandom(3000))
    for words in (("add", "f", "x"), ("tag", "x", "y"), ("rm", "x"), ("gc",), ("remote", "add", "away", "../away")):
        assert llmos("--store", root, *words).code == 0
    found = modes(root)
    assert found["."] == "0o700"
    assert found["config.toml"] == "0o600"
    assert {mode for name, mode in found.items() if name.endswith(".pack")} == {"0o444"}
    assert open_to_others(root) == set()
    assert modes(folder)["deep"] == oct(0o777 & ~mask)  # what is around it is the user's


def test_a_folder_that_was_there_is_closed_only_if_it_is_empty(llmos: Llmos, folder: Path) -> None:
    (folder / "empty").mkdir(mode=0o755)
    (folder / "used").mkdir(mode=0o755)
    (folder / "used" / "letters.txt").write_text("dear")
    for name in ("empty", "used"):
        assert llmos("--store", name, "init").code == 0
    assert modes(folder / "empty")["."] == "0o700"
    assert modes(folder / "used")["."] == "0o755"
    assert open_to_others(folder / "used") <= {".", "FORMAT", "letters.txt", "index.db"}


def test_a_store_its_owner_has_opened_for_a_group_stays_open(llmos: Llmos, store: Path) -> None:
    for path in (store, *(path for path in store.glob("**/*") if path.is_dir())):
        path.chmod(0o2770)
    (store.parent / "new").write_bytes(os.urandom(100))
    assert llmos("add", "new", "team").code == 0
    folders = {path for path in store.glob("**/*") if path.is_dir()}
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in folders} == {"0o2770"}


@root_only
def test_a_store_of_somebody_else_is_refused_until_one_says_it_is_safe(
    llmos: Llmos, store: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(store, ALICE, ALICE)
    for words in (("ls",), ("--store", store, "ls"), ("fsck", "--repair"), ("add", "a.txt", "x"), ("serve", "notes")):
        ran = llmos(*words)
        assert (ran.code, ran.out) == (14, ""), words
        assert f"the store {store} belongs to another user (uid {ALICE})" in ran.err
        assert f"hint: if you trust it: export LLMOS_SAFE_STORES={store}" in ran.err
    for value in ("/elsewhere", "", f"{store}x", str(store.parent)):
        monkeypatch.setenv("LLMOS_SAFE_STORES", value)
        assert llmos("ls").code == 14, value
    for value in (str(store), f"/elsewhere:{store}/", "*"):
        monkeypatch.setenv("LLMOS_SAFE_STORES", value)
        assert llmos("ls").code == 0, value


@root_only
def test_a_store_that_others_planted_above_is_not_used(as_user: AsUser, open_folder: Path) -> None:
    common = open_folder / "common"
    common.mkdir()
    common.chmod(0o1777)
    assert as_user(ALICE, "--store", common / ".llmos", "init")[0] == 0
    (common / "bobs").mkdir()
    os.chown(common / "bobs", BOB, BOB)
    os.chdir(common / "bobs")
    assert as_user(BOB, "ls")[0] == 10  # Bob may not even see that it is a store
    (common / ".llmos").chmod(0o755)
    for uid in (BOB, 0):
        code, said = as_user(uid, "ls")
        assert (code, "belongs to another user" in said) == (14, True)


@root_only
def test_nobody_else_can_look_into_a_store(as_user: AsUser, store: Path, open_folder: Path) -> None:
    assert as_user(ALICE, "--store", store, "ls")[0] == 12


@root_only
def test_a_shared_remote_serves_several_users(as_user: AsUser, open_folder: Path) -> None:
    """Made by root, open to all: each pushes, and each gets what the others have pushed."""
    remote = open_folder / "remote"
    remote.mkdir()
    remote.chmod(0o1777)
    for uid in (ALICE, BOB):
        home = open_folder / str(uid)
        home.mkdir()
        for number in range(8):  # packs fall into several folders, and some of both users into one
            (home / f"f{number}").write_bytes(os.urandom(200))
        os.chown(home, uid, uid)
        code, said = as_user(uid, "--store", home / ".llmos", "init")
        assert code == 0, (uid, said)
        for number in range(8):
            assert as_user(uid, "--store", home / ".llmos", "add", home / f"f{number}", f"of-{uid}:v{number}")[0] == 0
    for uid in (ALICE, BOB, ALICE):
        home = open_folder / str(uid)
        code, said = as_user(uid, "--store", home / ".llmos", "push", remote, "--all")
        assert code == 0, (uid, said)
        assert as_user(uid, "--store", home / ".llmos", "tag", f"of-{uid}:v0", "common:" + str(uid))[0] == 0
        code, said = as_user(uid, "--store", home / ".llmos", "push", remote, "--all")
        assert code == 0, (uid, said)
    code, said = as_user(BOB, "--store", open_folder / str(BOB) / ".llmos", "--json", "pull", remote, "--all")
    assert code == 0, said
    listed = json.loads(as_user(BOB, "--store", open_folder / str(BOB) / ".llmos", "--json", "ls")[1])
    assert {item["ref"] for item in listed["refs"]} >= {f"of-{ALICE}:v7", f"of-{BOB}:v7", f"common:{ALICE}"}

"""What goes wrong on a user's machine, tried on the command line: exit code, one sentence, a hint, nothing changed."""

import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.app import VERBS
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import Chunk, FileEntry, Manifest, encode_manifest

Llmos = Callable[..., Any]

# How each verb is called on a ref that does not exist; those that need no store at all come last.
CALLS: dict[str, tuple[str, ...]] = {
    "add": ("a.txt", "name", "--base", "nots"),
    "checkout": ("nots", "out"),
    "diff": ("nots", "notes"),
    "du": ("nots",),
    "eval": ("nots", "--data", "notes"),
    "fsck": (),
    "gc": (),
    "generate": ("nots", "text"),
    "log": ("nots",),
    "ls": (),
    "merge": ("nots", "whole"),
    "pull": ("there", "nots"),
    "push": ("there", "nots"),
    "quantize": ("nots", "small"),
    "remote": ("ls",),
    "rm": ("nots",),
    "serve": ("nots", "--port", "0"),
    "shard": ("a.txt", "name", "--tokenizer", "nots"),
    "show": ("nots",),
    "tag": ("nots", "name"),
    "train": ("name", "--data", "nots"),
}
NEED_NO_STORE = {"init", "clone", "doctor", "completion", "demo"}
LOOKS = {"show", "log", "diff"}  # verbs that take REMOTE/REF
NAME_NO_REF = {"fsck", "gc", "ls", "remote"}


def test_the_table_knows_every_verb() -> None:
    assert CALLS.keys() <= set(VERBS)
    assert CALLS.keys() >= NAME_NO_REF


@pytest.mark.parametrize("verb", CALLS)
def test_every_command_outside_a_store(llmos: Llmos, folder: Path, verb: str) -> None:
    (folder / "a.txt").write_text("words")
    ran = llmos(verb, *CALLS[verb])
    assert (ran.code, ran.out) == (10, "")
    assert "error: no llmos store in" in ran.err
    assert "hint: make one here: llmos init" in ran.err
    assert [path.name for path in folder.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("verb", sorted(CALLS.keys() - NAME_NO_REF))
def test_every_command_with_an_unknown_ref(llmos: Llmos, store: Path, verb: str) -> None:
    llmos("remote", "add", "there", store.parent / "there")
    before = llmos("ls", "--json").json
    ran = llmos(verb, *CALLS[verb])
    assert (ran.code, ran.out) == (10, "")
    assert "error: " in ran.err
    assert "nots" in ran.err or "there" in ran.err
    assert "hint: " in ran.err
    assert llmos("ls", "--json").json == before


@pytest.mark.parametrize("verb", sorted(CALLS.keys() - NAME_NO_REF))
def test_every_command_with_a_malformed_name(llmos: Llmos, store: Path, verb: str) -> None:
    for name in ("no/slash", "..", "a:b:c", "name:", "@xyz", "na\x1b[31mme"):
        ran = llmos(verb, *(name if word == "nots" else word for word in CALLS[verb]))
        folder = verb == "shard" and name in ("no/slash", "..")  # a tokenizer may be one, and this one is not there
        remote = verb in {*LOOKS, "train"} and name == "no/slash"  # there may be a remote "no", and this one has none
        assert ran.code == (10 if folder or remote else 2), (name, ran.err)
        assert ran.out == ""
        assert ran.err.startswith("error: ")
        assert "\x1b" not in ran.err


def test_an_ambiguous_id_prefix_asks_for_more(llmos: Llmos, store: Path) -> None:
    """Two small files whose manifests' ids begin with the same four digits, found by trying."""
    seen: dict[str, str] = {}
    for number in itertools.count():
        text = str(number)
        chunk = Chunk(object_id(text.encode()), len(text))
        oid = object_id(encode_manifest(Manifest("files", (FileEntry("x", (chunk,)),))))
        prefix = str(oid)[:4]
        if prefix in seen:
            break
        seen[prefix] = text
    ids = []
    for content in (seen[prefix], text):
        (store.parent / "x").write_text(content)
        ids.append(llmos("add", "x", "x", "--json").json["id"])
    assert ids[0] != ids[1]
    ran = llmos("show", f"@{prefix}")
    assert ran.code == 2
    assert f"the id prefix @{prefix} is ambiguous" in ran.err
    assert "hint: type more digits" in ran.err
    assert llmos("show", f"@{ids[0]}").code == 0


def safetensors(tensors: dict[str, tuple[int, int]], data: int, *, declared: int | None = None) -> bytes:
    """A file of one-dimensional U8 tensors at the given offsets; `declared` is a header length that lies."""
    table = {name: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for name, (a, b) in tensors.items()}
    header = json.dumps(table).encode()
    return struct.pack("<Q", len(header) if declared is None else declared) + header + bytes(data)


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (safetensors({"a": (0, 8), "b": (8, 16)}, 16)[:-1], 13, "is cut short"),
        (safetensors({"a": (0, 8), "b": (4, 12)}, 12), 13, "overlap at 'b'"),
        (safetensors({"a": (0, 8)}, 8, declared=5000), 13, "header"),
        (safetensors({"a": (0, 8)}, 8, declared=1 << 60), 13, "header"),
        (safetensors({"../../x": (0, 8)}, 8), 14, "'../../x'"),
        (b"", 13, "w.safetensors"),
    ],
    ids=["truncated", "overlap", "long header", "huge header", "path", "empty"],
)
def test_a_safetensors_file_that_lies(llmos: Llmos, store: Path, content: bytes, code: int, said: str) -> None:
    (store.parent / "w.safetensors").write_bytes(content)
    ran = llmos("add", "w.safetensors", "w")
    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err
    assert llmos("show", "w").code == 10


def test_an_empty_ref_file_is_named_and_can_be_mended(llmos: Llmos, store: Path) -> None:
    oid = llmos("show", "notes:v1", "--json").json["id"]
    (move,) = (store / "refs" / "notes" / "v1").iterdir()
    move.chmod(0o644)
    move.write_bytes(b"")
    for words in (("show", "notes:v1"), ("checkout", "notes:v1", "out"), ("ls",), ("fsck",)):
        ran = llmos(*words)
        assert ran.code == 13
        assert "notes:v1" in ran.out + ran.err
    assert llmos("show", "notes").code == 0
    assert llmos("tag", f"@{oid}", "notes:v1", "--force").code == 0
    assert llmos("show", "notes:v1", "--json").json["id"] == oid
    assert llmos("ls").code == 0


@pytest.mark.parametrize("verb", CALLS)
def test_no_command_works_on_a_store_of_an_unknown_format(llmos: Llmos, store: Path, verb: str) -> None:
    (store / "FORMAT").write_text("llmos 99\n")
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    ran = llmos(verb, *CALLS[verb])
    assert (ran.code, ran.out) == (13, "")
    assert "unknown format '99'" in ran.err
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def without_rights(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command line as somebody who may not read everything, which root may."""
    command = [sys.executable, "-m", "llmos_cli", *words]
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root may read everything, and there is no setpriv to give that up")
        command = [setpriv, "--bounding-set=-dac_override,-dac_read_search", *command]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    "words",
    [
        ("add", "locked", "x"),
        ("add", "half", "x"),
        ("shard", "locked", "x"),
        ("checkout", "notes", "locked"),
        ("--store", "locked", "ls"),
        ("init", "locked"),
    ],
    ids=" ".join,
)
def test_a_folder_that_may_not_be_read(llmos: Llmos, store: Path, words: tuple[str, ...]) -> None:
    here = store.parent
    (here / "half").mkdir()
    (here / "half" / "readable").write_text("x")
    (here / "half" / "secret").write_text("x")
    (here / "half" / "secret").chmod(0)
    (here / "locked").mkdir(mode=0)
    try:
        ran = without_rights(*words, cwd=here)
    finally:
        (here / "locked").chmod(0o755)
    assert (ran.returncode, ran.stdout) == (12, "")
    assert "Permission denied" in ran.stderr
    assert "locked" in ran.stderr or "half/secret" in ran.stderr
    assert llmos("show", "x").code == 10


def test_two_writers_of_one_ref_and_one_loses(llmos: Llmos, store: Path) -> None:
    """Both read that the ref is absent, then both write: the second is told, and its object is not lost silently."""
    from llmos_cli.errors import Conflict
    from llmos_cli.formats.names import parse_ref
    from llmos_cli.progress import Silent
    from llmos_cli.store.intake.add import execute_add, plan_add
    from llmos_cli.store.local import open_store

    codes: list[int] = []
    meet = threading.Barrier(2)

    class Meets(Silent):
        def task(self, label: str, *, total: int | None = None, unit: str = "B") -> Any:
            meet.wait(20)
            return super().task(label, total=total, unit=unit)

    def write(name: str) -> None:
        with open_store(store) as opened:
            try:
                execute_add(opened, plan_add([store.parent / name]), parse_ref("race"), Meets())
                codes.append(0)
            except Conflict as exc:
                codes.append(exc.exit_code)

    threads = [threading.Thread(target=write, args=(name,)) for name in ("a.txt", "b.txt")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(codes) == [0, 17]
    assert len(llmos("log", "race", "--json").json["history"]) == 1
    assert llmos("fsck").code == 0


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A folder on a disk of one megabyte."""
    path = folder / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("verb", ["add", "shard"])
def test_a_full_disk(llmos: Llmos, folder: Path, small_disk: Path, verb: str) -> None:
    here = ("--store", small_disk / ".llmos")
    assert llmos(*here, "init").code == 0
    (folder / "small").write_text("words")
    assert llmos(*here, "add", "small", "first").code == 0
    (folder / "big").write_text("".join(os.urandom(60).hex() + "\n" for _ in range(24_000)))
    options = ("--tokenizer", "train:257") if verb == "shard" else ()
    ran = llmos(*here, verb, "big", "big", *options)
    assert (ran.code, ran.out) == (15, "")
    assert "no space" in ran.err
    assert "bug" not in ran.err
    assert [row["ref"] for row in llmos(*here, "ls", "--json").json["refs"]] == ["first:latest"]
    assert llmos(*here, "fsck").code == 0
    assert llmos(*here, "checkout", "first", "out").code == 0

"""init, add, checkout, ls, show, log, tag, rm, du: what a user sees of a store."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmos = Callable[..., Any]


def write_model(folder: Path) -> None:
    """A Hugging Face model folder with two tensors."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        }
    ).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(32)))


def test_init_makes_a_store_once(llmos: Llmos, folder: Path) -> None:
    ran = llmos("init")
    assert ran.out == f"made a store at {folder / '.llmos'}\n"
    assert "hint: llmos add" in ran.err
    before = sorted(path.name for path in (folder / ".llmos").iterdir())
    again = llmos("init")
    assert (again.code, again.out) == (0, f"{folder / '.llmos'} is a store already\n")
    assert sorted(path.name for path in (folder / ".llmos").iterdir()) == before


def test_init_in_a_folder_and_exactly_at_store(llmos: Llmos, folder: Path) -> None:
    assert llmos("init", "sub/deep", "--json").json["store"] == str(folder / "sub/deep/.llmos")
    assert llmos("init", "--store", "exact", "--json").json["store"] == str(folder / "exact")
    assert (folder / "exact" / "FORMAT").exists()


def test_init_where_it_may_not_write(llmos: Llmos, folder: Path) -> None:
    (folder / "file").write_text("x")
    ran = llmos("init", "file")
    assert ran.code != 0
    assert "Traceback" not in ran.err


def test_add_a_folder_and_check_it_out_again(llmos: Llmos, store: Path) -> None:
    here = store.parent
    (here / "src" / "sub").mkdir(parents=True)
    (here / "src" / "one.bin").write_bytes(os.urandom(3000))
    (here / "src" / "sub" / "two.txt").write_text("two")
    (here / "src" / "empty").write_bytes(b"")
    added = llmos("add", "src", "code:v1", "--json").json
    assert added["kind"] == "files"
    assert added["files"] == 3
    assert added["ref"] == "code:v1"
    written = llmos("checkout", "code:v1", "out", "--json").json
    assert (written["files"], written["id"]) == (3, added["id"])
    for name in ("one.bin", "sub/two.txt", "empty"):
        assert (here / "out" / name).read_bytes() == (here / "src" / name).read_bytes()


def test_adding_the_same_again_changes_nothing(llmos: Llmos, store: Path) -> None:
    first = llmos("add", "a.txt", "b.txt", "notes", "--json").json
    assert first["unchanged"]
    assert first["new_bytes"] == 0
    assert "has it already" in llmos("add", "a.txt", "b.txt", "notes").out
    assert len(llmos("log", "notes", "--json").json["history"]) == 2


def test_add_skips_links_and_pipes_with_a_warning(llmos: Llmos, store: Path) -> None:
    src = store.parent / "src"
    src.mkdir()
    (src / "real").write_text("x")
    os.mkfifo(src / "pipe")
    (src / "link").symlink_to("real")
    ran = llmos("add", "src", "odd")
    assert ran.code == 0
    assert "warning: skipped src/link" in ran.err
    assert "warning: skipped src/pipe" in ran.err
    assert [file["path"] for file in llmos("show", "odd", "--json").json["files"]] == ["real"]


def test_add_dry_run_stores_nothing(llmos: Llmos, store: Path) -> None:
    ran = llmos("add", "a.txt", "new", "--dry-run")
    assert "would add 1 file" in ran.out
    assert llmos("show", "new").code == 10
    assert llmos("add", "a.txt", "new", "--dry-run", "--json").json["dry_run"] is True


def test_add_names_what_is_not_there(llmos: Llmos, store: Path) -> None:
    ran = llmos("add", "nothing.txt", "new")
    assert ran.code == 10
    assert "nothing.txt" in ran.err


def test_a_model_folder_is_a_model_and_shows_its_tensors(llmos: Llmos, store: Path) -> None:
    write_model(store.parent / "llama")
    assert llmos("add", "llama", "base", "--json").json["kind"] == "model"
    shown = llmos("show", "base", "--json").json
    assert shown["tensors"] == {"count": 2, "parameters": 10, "dtypes": {"BF16": 1, "F32": 1}}
    page = llmos("show", "base").out
    assert "10 values in 1 BF16 tensor, 1 F32 tensor" in page
    assert "model.safetensors" in page


def test_a_broken_safetensors_file_is_named_and_changes_nothing(llmos: Llmos, store: Path) -> None:
    write_model(store.parent / "llama")
    whole = (store.parent / "llama" / "model.safetensors").read_bytes()
    (store.parent / "llama" / "model.safetensors").write_bytes(whole[:-1])
    ran = llmos("add", "llama", "base")
    assert ran.code == 13
    assert "model.safetensors" in ran.err
    assert llmos("show", "base").code == 10


def test_checkout_replaces_files_only_with_force(llmos: Llmos, store: Path) -> None:
    out = store.parent / "out"
    out.mkdir()
    (out / "a.txt").write_text("mine")
    ran = llmos("checkout", "notes", "out")
    assert ran.code == 14
    assert "a.txt" in ran.err
    assert "--force" in ran.err
    assert (out / "a.txt").read_text() == "mine"
    assert not (out / "b.txt").exists()
    assert llmos("checkout", "notes", "out", "--dry-run", "--force").code == 0
    assert (out / "a.txt").read_text() == "mine"
    assert llmos("checkout", "notes", "out", "--force").code == 0
    assert (out / "a.txt").read_text() == "first\n"


def test_checkout_of_an_earlier_value_and_of_an_id(llmos: Llmos, store: Path) -> None:
    assert llmos("checkout", "notes~1", "before").code == 0
    assert [path.name for path in (store.parent / "before").iterdir()] == ["a.txt"]
    oid = llmos("show", "notes", "--json").json["id"]
    assert llmos("checkout", f"@{oid[:8]}", "by-id").code == 0
    assert len(list((store.parent / "by-id").iterdir())) == 2


def test_ls_lists_refs_and_takes_a_pattern(llmos: Llmos, store: Path) -> None:
    rows = llmos("ls", "--json").json["refs"]
    assert [(row["ref"], row["kind"], row["size"]) for row in rows] == [
        ("notes:latest", "files", 13),
        ("notes:v1", "files", 6),
    ]
    assert [row["ref"] for row in llmos("ls", "*:v*", "--json").json["refs"]] == ["notes:v1"]
    assert len(llmos("ls", "notes", "--json").json["refs"]) == 2
    table = llmos("ls").out.splitlines()
    assert table[0].split() == ["REF", "KIND", "ID", "SIZE", "CHANGED"]
    assert table[1].split()[:2] == ["notes:latest", "files"]
    none = llmos("ls", "x*")
    assert (none.code, none.out) == (0, "")
    assert "no ref matches" in none.err


def test_ls_of_an_empty_store_says_what_to_do(llmos: Llmos, folder: Path) -> None:
    llmos("init")
    ran = llmos("ls")
    assert (ran.code, ran.out) == (0, "")
    assert "is empty" in ran.err
    assert "hint: llmos add" in ran.err


def test_show_names_the_other_refs_and_limits_the_files(llmos: Llmos, store: Path) -> None:
    llmos("tag", "notes", "best")
    assert "also  best:latest" in llmos("show", "notes").out
    many = store.parent / "many"
    many.mkdir()
    for number in range(12):
        (many / f"{number:02}").write_text(str(number))
    llmos("add", "many", "many")
    assert "and 2 more (--files lists them)" in llmos("show", "many").out
    assert llmos("show", "many", "--files").out.rstrip().endswith("11")


def test_log_shows_history_newest_first(llmos: Llmos, store: Path) -> None:
    logged = llmos("log", "notes", "--json").json
    assert [entry["sequence"] for entry in logged["history"]] == [2, 1]
    assert logged["history"][0]["id"] == logged["id"]
    assert "@" in logged["history"][0]["who"]
    lines = llmos("log", "notes").out.splitlines()
    assert lines[0] == "History of notes:latest"
    assert lines[2].split()[0] == "now"
    assert lines[3].split()[0] == "~1"


def test_tag_moves_a_ref_only_with_force(llmos: Llmos, store: Path) -> None:
    ran = llmos("tag", "notes", "notes:v1")
    assert ran.code == 17
    assert "hint: move it: llmos tag notes notes:v1 --force" in ran.err
    assert llmos("tag", "notes", "notes:v1", "--force", "--json").json["changed"] is True
    assert llmos("tag", "notes", "notes:v1", "--json").json["changed"] is False


def test_rm_removes_names_and_says_how_to_undo(llmos: Llmos, store: Path) -> None:
    oid = llmos("show", "notes:v1", "--json").json["id"]
    assert llmos("rm", "notes:v1", "--dry-run").out == f"would remove notes:v1 (@{oid[:12]})\n"
    assert llmos("show", "notes:v1").code == 0
    ran = llmos("rm", "notes:v1")
    assert ran.out == f"removed notes:v1 (@{oid[:12]})\n"
    assert "gc" in ran.err
    undo = ran.err.split("undo: llmos ")[1].split()
    assert llmos("show", "notes:v1").code == 10
    assert llmos(*undo).code == 0
    assert llmos("show", "notes:v1", "--json").json["id"] == oid


def test_rm_checks_every_name_before_it_removes_any(llmos: Llmos, store: Path) -> None:
    assert llmos("rm", "notes", "nots").code == 10
    assert llmos("rm", "notes", "notes~1").code == 2
    assert llmos("rm", "notes", "@0123").code == 2
    assert llmos("show", "notes").code == 0


def test_names_with_escape_sequences_reach_no_terminal(llmos: Llmos, store: Path) -> None:
    (store.parent / "evil\x1b[2J").write_text("x")
    ran = llmos("add", "evil\x1b[2J", "evil")
    assert ran.code == 14
    assert "\x1b" not in ran.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_read_permission_is_named(llmos: Llmos, store: Path) -> None:
    locked = store.parent / "locked"
    locked.mkdir(mode=0o000)
    ran = llmos("add", "locked", "x")
    assert ran.code == 12
    assert "locked" in ran.err

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NotFound, Unsafe, UsageError
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Silent
from llmos_cli.store.intake.add import execute_add, plan_add
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest


def put(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def add(store: Store, *paths: Path) -> Any:
    progress = Silent()
    commit = execute_add(store, plan_add(paths), RefName("x"), progress)
    return commit, progress.warnings


def test_a_folder_a_file_and_several_files(store: Store, tmp_path: Path, lab: Any) -> None:
    folder = put(tmp_path / "in", a=b"1", sub__b=b"", sub__deep__c=b"3")
    add(store, folder)
    assert lab.read("x") == {"a": b"1", "sub/b": b"", "sub/deep/c": b"3"}
    add(store, folder / "a")
    assert lab.read("x") == {"a": b"1"}
    add(store, folder / "a", folder / "sub" / "deep" / "c")
    assert lab.read("x") == {"a": b"1", "c": b"3"}


def test_a_plan_reads_no_file_and_counts(tmp_path: Path) -> None:
    plan = plan_add([put(tmp_path / "in", b=b"22", a=b"1")])
    assert [name for name, _ in plan.files] == ["a", "b"]
    assert (plan.kind, plan.total_bytes, plan.skipped) == ("files", 3, ())


def test_links_pipes_and_repositories_inside_a_folder_are_left_out_with_a_warning(
    store: Store, tmp_path: Path, lab: Any
) -> None:
    folder = put(tmp_path / "in", a=b"1", sub__b=b"2", _dot_git__config=b"x", _dot_llmos__FORMAT=b"x")
    (folder / "link").symlink_to(folder / "a")
    (folder / "linked folder").symlink_to(folder / "sub")
    (folder / "nowhere").symlink_to(folder / "missing")
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "up").symlink_to("..")
    os.mkfifo(folder / "pipe")
    _, warnings = add(store, folder)
    assert lab.read("x") == {"a": b"1", "sub/b": b"2"}
    said = {text.split(": ")[0].removeprefix(f"skipped {folder}/") for text in warnings}
    assert said == {"link", "linked folder", "nowhere", "itself", "up", "pipe", ".git", ".llmos"}


def test_a_folder_of_the_hugging_face_cache_is_its_blobs(store: Store, tmp_path: Path, lab: Any) -> None:
    blobs = put(tmp_path / "hub" / "blobs", abc123=b"weights", _dot_secret=b"")
    snapshot = tmp_path / "hub" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "weights.bin").symlink_to(Path("../../blobs") / "abc123")
    (snapshot / "folder").symlink_to(blobs)
    _, warnings = add(store, snapshot)
    assert lab.read("x") == {"weights.bin": b"weights"}
    assert len(warnings) == 1


def test_a_link_named_by_the_user_is_followed(store: Store, tmp_path: Path, lab: Any) -> None:
    put(tmp_path / "in", a=b"1")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    add(store, tmp_path / "link")
    assert lab.read("x") == {"a": b"1"}


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["A", "a"], Unsafe),
        (["café", "cafe\u0301"], Unsafe),
        (["aux.txt"], Unsafe),
        (["a:b"], Unsafe),
        (["new\nline"], Unsafe),
        (["back\\slash"], Unsafe),
    ],
)
def test_names_that_no_system_can_hold_are_refused_before_anything_is_read(
    tmp_path: Path, names: list[str], error: type[LlmosError]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x")
    with pytest.raises(error):
        plan_add([folder])


def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "in")
    with open(os.fsencode(tmp_path / "in") + b"/\xff", "wb"):
        pass
    with pytest.raises(Unsafe):
        plan_add([tmp_path / "in"])


def test_the_same_name_twice(tmp_path: Path) -> None:
    one, two = put(tmp_path / "one", a=b"1"), put(tmp_path / "two", a=b"2")
    with pytest.raises(Unsafe, match="stands twice"):
        plan_add([one, two])


def test_nothing_to_add(tmp_path: Path) -> None:
    (tmp_path / "in" / "empty").mkdir(parents=True)
    with pytest.raises(UsageError, match="nothing to add"):
        plan_add([tmp_path / "in"])
    with pytest.raises(NotFound, match="missing"):
        plan_add([tmp_path / "missing"])
    with pytest.raises(Unsafe):
        plan_add([Path("/dev/null")])


def test_a_tree_too_deep_is_refused_not_walked_forever(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(300):
        deep = deep / "d"
    deep.mkdir(parents=True)
    with pytest.raises(Unsafe, match="deeper"):
        plan_add([tmp_path])


def test_what_may_not_be_read_is_named(tmp_path: Path, as_nobody: Any) -> None:
    folder = put(tmp_path / "in", open=b"1", secret=b"2", closed__f=b"3")
    for path in (tmp_path, folder):
        path.chmod(0o755)

    def attempt() -> str:
        try:
            plan_add([folder])
        except AccessDenied as exc:
            return exc.message
        return ""

    if os.geteuid() == 0:
        (folder / "closed").chmod(0)
        assert str(folder / "closed") in as_nobody(attempt)
        (folder / "closed").chmod(0o755)
        (folder / "secret").chmod(0)
        assert str(folder / "secret") in as_nobody(attempt)


def weights(lab: Any) -> bytes:
    data: bytes = lab.safetensors({"w": np.zeros((2, 2), dtype=np.float32)})
    return data


def test_the_kind_is_seen_from_the_files(store: Store, tmp_path: Path, lab: Any) -> None:
    model = put(tmp_path / "model", config_dot_json=b"{}", model_dot_safetensors=weights(lab), tokenizer_dot_json=b"{}")
    tokenizer = put(tmp_path / "tokenizer", tokenizer_dot_json=b"{}")
    assert plan_add([model]).kind == "model"
    assert plan_add([tokenizer]).kind == "tokenizer"
    assert plan_add([model / "config.json"]).kind == "files"
    commit, _ = add(store, model)
    assert read_manifest(store, commit.id).kind == "model"


def test_a_sharded_model_must_be_whole(tmp_path: Path, lab: Any) -> None:
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}}
    folder = put(tmp_path / "in", config_dot_json=b"{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(weights(lab))
    with pytest.raises(Damaged, match=r"model-00002-of-00002\.safetensors"):
        plan_add([folder])
    (folder / "model-00002-of-00002.safetensors").write_bytes(weights(lab))
    assert plan_add([folder]).kind == "model"
    index["weight_map"]["v"] = "../evil.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Unsafe):
        plan_add([folder])


def test_a_file_that_vanishes_after_the_plan(store: Store, tmp_path: Path) -> None:
    plan = plan_add([put(tmp_path / "in", a=b"1", b=b"2")])
    (tmp_path / "in" / "b").unlink()
    with pytest.raises(NotFound, match="/b"):
        execute_add(store, plan, RefName("x"), Silent())

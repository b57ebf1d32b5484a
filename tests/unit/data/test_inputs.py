import os
from pathlib import Path

import pytest

from llmos_cli.data.inputs import Input, find_inputs
from llmos_cli.errors import AccessDenied, LlmosError, NotFound, Unsafe, UsageError
from llmos_cli.progress import Silent


def names(*words: object) -> list[str]:
    return [item.name for item in find_inputs([str(word) for word in words], Silent())]


def test_a_folder_is_read_in_sorted_order_whatever_the_disk_says(folder: Path) -> None:
    assert names(folder) == ["corpus/a.txt", "corpus/b.md", "corpus/sub/c.py"]


def test_names_do_not_depend_on_where_the_corpus_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert names(".") == names(folder)
    assert names("a.txt") == names(folder / "a.txt") == ["a.txt"]


def test_arguments_keep_their_order_and_a_file_is_taken_once(folder: Path) -> None:
    assert names(folder / "b.md", folder) == ["b.md", "corpus/a.txt", "corpus/sub/c.py"]


def test_hidden_files_and_build_folders_are_left_out_of_folders(folder: Path) -> None:
    for path in (".hidden", ".git/config", "__pycache__/x.pyc", "node_modules/m.js", "sub/.DS_Store"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("x")
    assert names(folder) == ["corpus/a.txt", "corpus/b.md", "corpus/sub/c.py"]
    assert names(folder / ".hidden") == [".hidden"]


def test_a_glob_that_no_shell_expanded_is_expanded(folder: Path) -> None:
    assert names(folder / "*.txt") == ["a.txt"]
    assert names(folder / "**" / "*.py") == ["c.py"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(folder: Path) -> None:
    (folder / "[a].txt").write_text("x")
    assert names(folder / "[a].txt") == ["[a].txt"]


def test_pipes_and_loops_in_a_folder_are_never_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "nowhere").symlink_to("gone")
    progress = Silent()
    found = find_inputs([str(folder)], progress)
    assert [item.name for item in found] == ["corpus/a.txt", "corpus/b.md", "corpus/sub/c.py"]
    assert len(progress.warnings) == 4
    for name, why in (("pipe", "named pipe"), ("loop", "folder"), ("self", "symbolic links"), ("nowhere", "nothing")):
        assert any(str(folder / name) in warning and why in warning for warning in progress.warnings)


def test_a_link_to_a_file_is_followed_and_taken_once(folder: Path) -> None:
    (folder / "z.txt").symlink_to("a.txt")
    assert names(folder) == ["corpus/a.txt", "corpus/b.md", "corpus/sub/c.py"]
    assert names(folder / "z.txt") == ["z.txt"]


def test_a_named_pipe_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(Unsafe, match="pipe is a named pipe"):
        names(folder / "pipe")


def test_a_named_loop_is_an_error_that_names_it(folder: Path) -> None:
    (folder / "self").symlink_to("self")
    with pytest.raises(LlmosError, match=r"while reading .*self"):
        names(folder / "self")


@pytest.mark.parametrize("word", ["gone.txt", "gone*.txt"])
def test_what_is_not_there_is_named(folder: Path, word: str) -> None:
    with pytest.raises(NotFound, match=r"gone"):
        names(folder / word)


def test_a_folder_without_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(UsageError, match="empty holds no files"):
        names(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(folder: Path) -> None:
    (folder / "sub").chmod(0)
    try:
        with pytest.raises(AccessDenied, match="sub"):
            names(folder)
    finally:
        (folder / "sub").chmod(0o700)


def test_a_name_that_is_not_unicode_can_stand_in_a_recipe(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path / "odd") + b"\xff.txt"
    Path(os.fsdecode(path)).write_text("x")
    assert names(os.fsdecode(path)) == ["odd\\xff.txt"]


def test_very_deep_folders_are_walked(tmp_path: Path) -> None:
    path = tmp_path / "deep"
    path.mkdir()
    here = os.open(path, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("x.txt", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    assert len(names(path)) == 1


def test_standard_input_stands_where_the_dash_is(folder: Path) -> None:
    stdin = Input(folder / "spool", "stdin", "standard input")
    found = find_inputs([str(folder / "a.txt"), "-", str(folder / "b.md")], Silent(), stdin)
    assert [item.name for item in found] == ["a.txt", "stdin", "b.md"]

"""Names from outside: paths, refs and targets."""

import itertools
import tracemalloc

import pytest

from llmos_cli.errors import Unsafe, UsageError
from llmos_cli.formats.limits import MiB
from llmos_cli.formats.names import RefName, Target, check_path, check_paths, parse_ref, parse_target

GOOD_PATHS = [
    "config.json", "a/b/c.txt", ".gitignore", "..a", "a..b", "-rf", "with space", "consul", "com", "com10", "a.con",
    "héllo", "日本語", "😀", "x" * 255, "/".join("a" * 64), "what?.txt", "a~1",
]  # fmt: skip
BAD_PATHS = [
    "", "/", "/etc/x", "//h/s", "../x", "a/../b", "a/..", "..", ".", "./a", "a/.", "a//b", "a/", "C:\\x", "C:x", "c:/x",
    "\\\\h\\s", "a\\b", "a\0b", "a\nb", "a\rb", "a\x1b[2Jb", "\x7f", "a\u202eb", "a\u200bb", "\ufeffa", "a\u2028b",
    "CON", "con.txt", "a/NUL", "nul .txt", "Com1.tar.gz", "lpt9", "com¹", "CONIN$", "x.", "x ", "a./b", "a /b",
    "x" * 256, "é" * 128, "/".join("a" * 65), "x/" * 2100 + "x", "e\u0301", "\ud800", "a\udcffb",
]  # fmt: skip


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_an_honest_path_is_accepted(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize("path", BAD_PATHS, ids=ascii)
def test_a_path_that_could_do_harm_somewhere_is_unsafe(path: str) -> None:
    with pytest.raises(Unsafe) as caught:
        check_path(path)
    assert len(caught.value.message) < 1000
    assert caught.value.message.isprintable()  # it may be shown on a terminal as it is


@pytest.mark.parametrize(
    "paths",
    [
        ["a", "a"], ["README", "readme"], ["a/b", "A/b"], ["a/b", "A/c"], ["a/b/c", "a/B/d"], ["straße", "STRASSE"],
        ["ſ́", "ś"], ["a", "a/b"], ["a/b", "a"], ["A", "a/b"], ["a/b", "A"], ["a/b/c", "a/b"],
    ],
    ids=str,
)  # fmt: skip
def test_paths_that_collide_anywhere_are_unsafe(paths: list[str]) -> None:
    for order in itertools.permutations(paths):
        with pytest.raises(Unsafe):
            check_paths(order)


def test_paths_that_only_look_alike_are_accepted() -> None:
    check_paths(["a/b", "a/c", "b/a", "ab", "a.b", "b/b/b", "b/c", "ba"])


def test_many_deep_paths_take_memory_by_their_length() -> None:
    paths = [f"{number:05}/" + "/".join(["d" * 60] * 60) for number in range(100)]
    tracemalloc.start()
    try:
        check_paths(paths)
        assert tracemalloc.get_traced_memory()[1] < 4 * MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", ["web", "Llama-3.1", "a+b_c", "7b:v1.0", "x" * 128, "a:latest", "HEAD"])
def test_an_honest_ref_is_accepted(text: str) -> None:
    ref = parse_ref(text)
    assert str(ref) == (text if ":" in text else f"{text}:latest")
    assert parse_ref(str(ref)) == ref


BAD_REFS = [
    "", ":", "a:", ":a", "a:b:c", "../../x", "..", ".a", "a..b", "a.", "-rf", "_a", "a/b", "a\\b", "x.lock", "a:x.lock",
    "a b", "a\n", "a\0", "a\x1b[2J", "@{", "a@b", "a~1", "é", "x" * 129, "x" * 10_000, "a:" + "x" * 129,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_REFS, ids=lambda text: ascii(text)[:20])
def test_a_malformed_ref_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_ref(text)
    assert len(caught.value.message) < 300
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("web", Target(RefName("web"), 0, None)),
        ("web:v1", Target(RefName("web", "v1"), 0, None)),
        ("web~", Target(RefName("web"), 1, None)),
        ("web:v1~12", Target(RefName("web", "v1"), 12, None)),
        ("web~0", Target(RefName("web"), 0, None)),
        ("@Ab12", Target(None, 0, "ab12")),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text", ["", "@", "@abc", "@xyzz", "@{1}", "~1", "a~b", "a~-1", "a~1~1", "a~٣", "a~1\n", "a@abcd", "a~" + "9" * 10]
)
def test_a_malformed_target_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_target(text)

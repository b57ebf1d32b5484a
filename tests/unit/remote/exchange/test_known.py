"""The names that TAB offers: those that have been seen at a remote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., tuple[int, Any, str]]


def seen(store: str = "reader", remote: str = "nas") -> list[str]:
    path = Path(store) / ".llmos" / "cache" / f"refs-{remote}"
    return path.read_text().split() if path.exists() else []


def test_names_are_noted_where_they_are_met(reader: Run) -> None:
    assert seen("writer") == ["tiny", "tuned"], "pushed"
    assert seen() == []
    assert reader("pull", "nas", "tiny")[0] == 0
    assert seen() == ["tiny"]
    assert reader("ls", "nas/tu*")[0] == 0
    assert seen() == ["tiny", "tuned"]


def test_names_that_are_gone_are_forgotten(reader: Run) -> None:
    assert reader("ls", "nas")[0] == 0
    assert reader("--store", "writer", "rm", "tuned")[0] == 0
    assert reader("--store", "writer", "push", "nas", "--all", "--prune")[0] == 0
    assert seen("writer") == ["tiny"]
    assert reader("ls", "nas")[0] == 0
    assert seen() == ["tiny"]


def test_a_remote_without_a_name_leaves_none(reader: Run) -> None:
    assert reader("pull", "./nas", "tiny")[0] == 0
    assert list(Path("reader/.llmos").glob("cache/refs-*")) == []

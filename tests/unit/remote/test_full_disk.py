"""A disk that is really full: a small tmpfs on either side."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import LlmosError, NoSpace

Exchange = Any
pytestmark = pytest.mark.root


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Make a folder that holds one megabyte."""
    mounted: list[Path] = []

    def mount(name: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("cannot mount a tmpfs here")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_push_to_a_full_remote_changes_nothing_there(exchange: Exchange, small: Callable[[str], Path]) -> None:
    here = exchange.store("here")
    small("nas")
    first = exchange.commit(here, "web", a=exchange.noise(1, 100_000))
    exchange.push(here, "web")
    exchange.commit(here, "web", a=exchange.noise(1, 100_000), b=exchange.noise(2, 2_000_000))
    with pytest.raises(NoSpace, match="nas"):
        exchange.push(here, "web")
    there = exchange.store("nas")
    assert exchange.value(there, "web") == first
    assert exchange.problems(there) == []
    assert exchange.leftovers("nas") == exchange.leftovers("here") == []


def test_a_pull_into_a_full_store_changes_nothing_in_it(
    exchange: Exchange, small: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = exchange.store("here")
    small("other")
    exchange.commit(here, "web", a=exchange.noise(1, 2_000_000))
    exchange.push(here, "web")
    other = exchange.store("other")
    with pytest.raises(NoSpace):
        exchange.pull(other, "web")
    monkeypatch.setattr(
        "llmos_cli.remote.exchange.pull._check_space", lambda *_: None
    )  # it fills up only while we write
    with pytest.raises(LlmosError) as caught:
        exchange.pull(other, "web")
    assert isinstance(caught.value, NoSpace)
    assert exchange.value(other, "web") is None
    assert exchange.problems(other) == []
    assert exchange.leftovers("other") == []

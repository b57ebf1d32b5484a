"""One bit flipped anywhere in a store: it is found, by whoever reads or by fsck, told by name, and never read as truth.

A small store with a frame of every codec, and every file it consists of; every byte of the small files, a spread over
the large ones, one bit each.
"""

import json
import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from llmos_cli.errors import Damaged, LlmosError, UsageError
from llmos_cli.formats.codec import CODEC_NAMES
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.fsck.fsck import FsckReport, check
from llmos_cli.store.intake import adopt
from llmos_cli.store.intake.add import execute_add, plan_add
from llmos_cli.store.local import Store, open_store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.refs.refs import read_ref

PER_FILE: Final = 30  # bytes of one file that are tried
CACHES: Final = ("index.db",)


@dataclass(frozen=True)
class Sound:
    """What a store says while it is whole: the values every ref has had, the bytes of every manifest, its files."""

    root: Path
    values: dict[str, list[ObjectId]]
    files: dict[ObjectId, dict[str, bytes]]
    stored: dict[Path, bytes]

    def restore(self) -> None:
        for path in self.root.glob("index.db*"):
            path.unlink()
        for path, data in self.stored.items():
            if path.name in CACHES:
                path.write_bytes(data)


@pytest.fixture
def sound(store: Store, lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sound:
    monkeypatch.setattr(adopt, "MIN_BYTES", 1000)
    numbers = np.random.default_rng(3)
    weights = (numbers.standard_normal(600) * 0.02).astype(np.float32)
    made = {
        "model": {"m.safetensors": lab.safetensors({"w": weights}), "readme": lab.text(900)},
        "model:next": {"m.safetensors": lab.safetensors({"w": weights + np.float32(1e-7)}), "noise": lab.noise(100)},
        "kept": {"a.bin": lab.noise(2000, 5)},
    }
    for name, files in [*made.items(), ("model", made["model:next"])]:
        folder = tmp_path / name.replace(":", "-")
        folder.mkdir(exist_ok=True)
        for path, data in files.items():
            (folder / path).unlink(missing_ok=True)
            (folder / path).write_bytes(data)
        execute_add(store, plan_add([folder]), parse_ref(name), Silent(), adopt=name == "kept")
    values = {name: [read_ref(store, parse_ref(name)).id] for name in made}  # type: ignore[union-attr]
    values["model"].append(next(oid for oid in store.index.manifests() if [oid] not in values.values()))
    contents = {}
    for ids in values.values():
        for oid in ids:
            contents[oid] = {entry.path: read_file(store, entry) for entry in read_manifest(store, oid).files}
    codecs = {row.entry.codec for oid in _objects(store) for row in store.index.locate(oid)}
    assert {CODEC_NAMES[codec] for codec in codecs} >= {"raw", "zstd", "planes", "delta", "adopted"}
    lab.sound()
    store.close()  # SQLite puts its journal into index.db
    stored = {path: path.read_bytes() for path in sorted(store.root.glob("**/*")) if path.is_file()}
    return Sound(store.root, values, contents, stored)


def _objects(store: Store) -> set[ObjectId]:
    return {entry.id for pack in store.index.packs() for entry in store.index.entries(pack)}


def _places(size: int) -> Iterator[tuple[int, int]]:
    """Where to flip, and which bit."""
    dice = random.Random(size)
    count = min(size, PER_FILE)
    for number in range(count):
        yield number * size // count + dice.randrange(max(1, size // count)), 1 << dice.randrange(8)


def read_everything(sound: Sound) -> list[str]:
    """Read every ref to its last byte. Whatever comes out must be true; gives what was said about what did not."""
    said: list[str] = []
    progress = Silent()
    try:
        with open_store(sound.root, progress) as store:
            for name, values in sound.values.items():
                try:
                    entry = read_ref(store, parse_ref(name))
                    assert entry is not None, f"{name} has vanished"
                    assert entry.id in values, f"{name} points somewhere else"
                    if entry.id != values[0]:
                        assert progress.warnings, f"{name} has an old value, and nobody says so"
                    for file in read_manifest(store, entry.id).files:
                        try:
                            assert read_file(store, file) == sound.files[entry.id][file.path], f"{name}: {file.path}"
                        except Damaged as exc:
                            said.append(exc.message)
                except Damaged as exc:
                    said.append(exc.message)
    except (Damaged, UsageError) as exc:
        said.append(exc.message)
    return [*said, *progress.warnings]


def look(sound: Sound) -> FsckReport | LlmosError:
    try:
        with open_store(sound.root, Silent()) as store:
            return check(store, quick=False, progress=Silent())
    except LlmosError as exc:
        return exc


def test_a_flipped_bit_anywhere_is_told_and_never_believed(sound: Sound, lab: Any) -> None:
    assert read_everything(sound) == []
    sound.restore()
    tried = 0
    for path, data in sound.stored.items():
        name = path.relative_to(sound.root)
        for at, bit in _places(len(data)):
            tried += 1
            here = f"{name}, byte {at} of {len(data)}, bit {bit}"
            lab.flip(path, at, bit)
            said = read_everything(sound)
            found = look(sound)
            if name.name not in CACHES:
                harmless = name.name == "config.toml" and _says_the_same(path, data)  # in the seal's own comment
                assert _check_told(found, here) or harmless, f"{here}: nobody says so ({said})"
            elif isinstance(found, FsckReport):  # a cache: put right in passing, or thrown away
                assert not found.problems, here
                assert all("the index was lost or unusable" in text for text in said), f"{here}: {said}"
            if name.name not in CACHES:
                lab.flip(path, at, bit)
            sound.restore()
    assert tried > 300
    assert read_everything(sound) == []
    last = look(sound)
    assert isinstance(last, FsckReport)
    assert not last.problems


def _says_the_same(path: Path, before: bytes) -> bool:
    try:
        return tomllib.loads(path.read_text()) == tomllib.loads(before.decode())
    except ValueError:
        return False


def _check_told(found: FsckReport | LlmosError, here: str) -> str:
    """What fsck says, or why the store does not open; a problem names what it is about and what that hurts."""
    if isinstance(found, LlmosError):
        assert found.exit_code in (2, 13), here
        return found.message
    for problem in found.problems:
        assert problem.where, here
        assert problem.referrers, f"{here}: {problem}"
    return json.dumps([[item.what, item.where] for item in (*found.problems, *found.notes)] or "").strip('"')

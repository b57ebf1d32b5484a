import hashlib
from collections.abc import Sequence
from typing import Any

import pytest

from llmos_cli.errors import Damaged
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import FileEntry
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.inspect.digests import sha256_files
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_manifest
from llmos_cli.store.refs.refs import read_ref


def files_of(store: Store, name: str) -> Sequence[FileEntry]:
    entry = read_ref(store, parse_ref(name))
    assert entry is not None
    return read_manifest(store, entry.id).files


def flip_all(lab: Any, files: Sequence[FileEntry]) -> None:
    for chunk in (chunk for entry in files for chunk in entry.chunks):
        path, offset = lab.payload_at(chunk.id)
        lab.flip(path, offset)


def test_digests_are_those_of_the_plain_files(store: Store, lab: Any) -> None:
    plain = {"big": lab.noise(20_000_000), "small": b"x", "empty": b"", "twin": b"x"}
    lab.add("x", plain)
    assert sha256_files(store, files_of(store, "x"), Silent()) == {
        path: hashlib.sha256(data).hexdigest() for path, data in plain.items()
    }


def test_the_second_time_nothing_is_read_whatever_the_name(store: Store, lab: Any) -> None:
    lab.add("x", {"a": lab.noise(5_000_000)})
    (first,) = sha256_files(store, files_of(store, "x"), Silent()).values()
    lab.add("y", lab.read("x") | {"b": b"new"})
    flip_all(lab, files_of(store, "x"))
    found = sha256_files(store, files_of(store, "y"), Silent())
    assert found["a"] == first
    assert found["b"] == hashlib.sha256(b"new").hexdigest()


def test_notes_do_not_outlive_the_index(store: Store, lab: Any) -> None:
    lab.add("x", {"a": b"data"})
    before = sha256_files(store, files_of(store, "x"), Silent())
    store.index.rebuild()
    assert sha256_files(store, files_of(store, "x"), Silent()) == before


def test_a_damaged_file_has_no_digest_and_leaves_no_note(store: Store, lab: Any) -> None:
    lab.add("x", {"a": lab.noise(1000), "b": b"fine"})
    files = files_of(store, "x")
    flip_all(lab, files[:1])
    for _ in range(2):
        with pytest.raises(Damaged, match=files[0].chunks[0].id.short):
            sha256_files(store, files, Silent())
    assert sha256_files(store, files[1:], Silent()) == {"b": hashlib.sha256(b"fine").hexdigest()}


def test_a_note_that_is_no_digest_is_replaced(store: Store, lab: Any) -> None:
    lab.add("x", {"a": b"data"})
    files = files_of(store, "x")
    good = sha256_files(store, files, Silent())
    key = object_id(b"".join(chunk.id for chunk in files[0].chunks))
    assert store.index.facts("sha256", [key])
    store.index.add_facts("sha256", [(key, b"short")])
    assert sha256_files(store, files, Silent()) == good

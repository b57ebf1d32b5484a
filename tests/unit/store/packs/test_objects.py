import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llmos_cli.errors import Damaged
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.manifest import Chunk, FileEntry
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import open_file, read_file, read_manifest, read_object, read_object_into


@pytest.fixture
def stored(store: Store, lab: Any) -> tuple[FileEntry, bytes]:
    """A file of several chunks, noise and text."""
    data = lab.noise(3 << 20, 1) + lab.text(3 << 20, 2) + bytes(1 << 20) + lab.noise(5, 3)
    commit = lab.add("x", {"f": data})
    entry = read_manifest(store, commit.id).files[0]
    assert len(entry.chunks) > 3
    return entry, data


def test_a_file_is_read_back(store: Store, stored: tuple[FileEntry, bytes]) -> None:
    entry, data = stored
    assert read_file(store, entry) == data
    assert open_file(store, entry).read(0, len(data)) == data


def test_random_reads_equal_the_file_from_many_threads(store: Store, stored: tuple[FileEntry, bytes]) -> None:
    entry, data = stored
    reader = open_file(store, entry)
    generator = random.Random(7)
    ranges = [tuple(sorted(generator.choices(range(len(data) + 1), k=2))) for _ in range(60)]
    edges = [0, len(data), *(reader._starts)]
    ranges += [(max(0, edge - 1), min(len(data), edge + 1)) for edge in edges]

    def same(place: tuple[int, ...]) -> bool:
        start, end = place
        out = bytearray(end - start)
        reader.readinto(start, memoryview(out))
        return out == data[start:end] and reader.read(start, min(end, start + 10)) == data[start : min(end, start + 10)]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(same, ranges))


@pytest.mark.parametrize(("start", "size"), [(-1, 1), (0, 7340039), (7340038, 1)])
def test_a_read_outside_the_file_is_refused(
    store: Store, stored: tuple[FileEntry, bytes], start: int, size: int
) -> None:
    with pytest.raises(ValueError, match="outside 'f'"):
        open_file(store, stored[0]).readinto(start, memoryview(bytearray(size)))


def test_empty_files_and_reads(store: Store, lab: Any) -> None:
    commit = lab.add("x", {"empty": b"", "f": b"bytes"})
    empty, full = read_manifest(store, commit.id).files
    assert read_file(store, empty) == b""
    assert open_file(store, empty).read(0, 0) == b""
    assert open_file(store, full).read(5, 5) == b""


@pytest.mark.parametrize("place", ["header", "payload"])
@pytest.mark.parametrize("offset", [0, 5, 60, 100])
def test_a_flipped_bit_is_an_error_that_names_the_object(store: Store, lab: Any, place: str, offset: int) -> None:
    data = lab.noise(5000)
    lab.add("x", {"f": data})
    path, at = lab.payload_at(object_id(data))
    lab.flip(path, at + offset - (128 if place == "header" else 0))
    out = bytearray(len(data))
    for _ in range(2):
        with pytest.raises(Damaged, match=object_id(data).short) as caught:
            read_object_into(store, object_id(data), memoryview(out))
        assert "fsck" in (caught.value.hint or "")


def test_what_was_damaged_can_be_added_again(store: Store, lab: Any) -> None:
    data = lab.noise(5000)
    lab.add("x", {"f": data, "g": b"whole"})
    lab.flip(*lab.payload_at(object_id(data)))
    with pytest.raises(Damaged):
        lab.read("x")
    again = lab.add("y", {"f": data})
    assert again.stored > len(data)
    assert lab.read("x") == {"f": data, "g": b"whole"}
    store.index.reset()
    assert lab.read("x") == {"f": data, "g": b"whole"}


def test_one_damaged_object_does_not_hide_the_others_of_its_pack(store: Store, lab: Any) -> None:
    files = {f"f{number}": lab.noise(4000, number) for number in range(8)}
    lab.add("x", files)
    path, _ = lab.payload_at(object_id(files["f0"]))
    lab.flip(path, -3)  # the pack's own index as well
    lab.flip(*lab.payload_at(object_id(files["f3"])))
    with ThreadPoolExecutor(4) as threads:
        read = dict(zip(files, threads.map(lambda data: _try(store, data), files.values()), strict=True))
    assert read == {name: None if name == "f3" else data for name, data in files.items()}


def _try(store: Store, data: bytes) -> bytes | None:
    try:
        return read_object(store, object_id(data))
    except Damaged:
        return None


def test_a_missing_pack_is_an_error_that_names_the_object(store: Store, lab: Any) -> None:
    commit = lab.add("x", {"f": b"bytes"})
    lab.pack_of(commit.id).unlink()
    with pytest.raises(Damaged, match=f"object {commit.id.short} is missing"):
        read_manifest(store, commit.id)


def test_a_pack_whose_bytes_are_another_packs(store: Store, lab: Any) -> None:
    one, two = lab.add("one", {"f": b"1" * 500}), lab.add("two", {"f": b"2" * 500})
    first, second = lab.pack_of(one.id), lab.pack_of(two.id)
    data = second.read_bytes()
    second.chmod(0o600)
    second.write_bytes(first.read_bytes())
    first.chmod(0o600)
    first.write_bytes(data)
    assert lab.read("one") == {"f": b"1" * 500}
    assert lab.read("two") == {"f": b"2" * 500}
    assert len(lab.fsck().problems) == 2


def test_a_second_copy_is_used_when_the_first_is_damaged(store: Store, lab: Any) -> None:
    data = lab.noise(5000)
    lab.add("x", {"f": data})
    path, at = lab.payload_at(object_id(data))
    store.index.drop_pack(store.index.locate(object_id(data))[0].pack)
    lab.add("y", {"f": data, "more": b"makes another pack"})
    store.index.reset()
    lab.flip(path, at)
    assert lab.read("x") == {"f": data}


def test_a_copy_in_the_trash_is_used_when_the_other_is_damaged(store: Store, lab: Any) -> None:
    data = lab.noise(5000)
    lab.add("x", {"f": data})
    copy = store.trash / lab.packs()[0].name
    (store.root / "kept").write_bytes(lab.packs()[0].read_bytes())
    lab.flip(*lab.payload_at(object_id(data)))
    (store.root / "kept").rename(copy)
    assert lab.read("x") == {"f": data}
    assert not copy.exists()


def test_a_manifest_is_proven_by_its_id(store: Store, lab: Any) -> None:
    """A checksum that was forged to fit is no proof."""
    commit = lab.add("x", {"f": b"1"})
    other = lab.add("y", {"f": b"2"})
    location = store.index.locate(commit.id)[0]
    foreign = store.index.locate(other.id)[0]
    data = bytearray(store.pack_path(location.pack).read_bytes())
    source = store.pack_path(foreign.pack).read_bytes()
    start, end = location.entry.offset, location.entry.end
    data[start:end] = source[foreign.entry.offset : foreign.entry.end]
    store.pack_path(location.pack).chmod(0o600)
    store.pack_path(location.pack).write_bytes(data)
    with pytest.raises(Damaged, match=commit.id.short):
        read_manifest(store, commit.id)


def test_a_size_that_the_asker_has_wrong_does_not_blame_the_object(store: Store, lab: Any) -> None:
    lab.add("x", {"f": b"12345"})
    oid = object_id(b"12345")
    for size in (4, 6):
        with pytest.raises(Damaged, match=f"5 bytes, {size} were expected"):
            read_object_into(store, oid, memoryview(bytearray(size)))
        with pytest.raises(Damaged):
            open_file(store, FileEntry("f", (Chunk(oid, size),))).read(0, size - 1)
    assert read_object(store, oid) == b"12345"
    assert store.index.has(oid)

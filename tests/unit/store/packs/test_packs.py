import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NoSpace, NotFound, UnknownVersion
from llmos_cli.formats import codec
from llmos_cli.formats.frame import CHUNK, encode_header, new_frame
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.pack import END_MAGIC
from llmos_cli.store.disk import durable
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_object
from llmos_cli.store.packs.packs import (
    PackWriter,
    list_packs,
    read_pack,
    read_pack_index,
    restore_from_trash,
    secure,
    sync_index,
)


def write_pack(store: Store, *objects: bytes) -> ObjectId:
    writer = PackWriter(store.tmp)
    for data in objects:
        encoded = codec.encode(memoryview(data), codec.OPAQUE)
        frame = new_frame(CHUNK, object_id(data), len(data), encoded)
        writer.append(frame, encode_header(frame), encoded.parts)
    return writer.publish(store)


def test_a_pack_is_read_back_and_may_not_be_written_to(store: Store) -> None:
    name = write_pack(store, b"one", b"two" * 1000)
    assert read_object(store, object_id(b"one")) == b"one"
    assert read_object(store, object_id(b"two" * 1000)) == b"two" * 1000
    assert store.pack_path(name).stat().st_mode & 0o777 == 0o444
    assert not list(store.tmp.iterdir())


def test_the_same_pack_again_heals_one_that_rotted(store: Store, lab: Any) -> None:
    name = write_pack(store, b"one", b"two")
    lab.flip(store.pack_path(name), 200)
    assert write_pack(store, b"one", b"two") == name
    lab.sound()


@pytest.mark.parametrize("step", ["writev", "fsync", "replace"])
def test_a_pack_that_cannot_be_written_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, step, refuse)
    with pytest.raises(NoSpace):
        write_pack(store, b"one")
    monkeypatch.undo()
    assert not list(store.tmp.iterdir())
    assert not list_packs(store.packs)
    assert not store.index.packs()


def test_discarding_leaves_nothing_before_and_after_finishing(store: Store) -> None:
    writer = PackWriter(store.tmp)
    writer.discard()
    writer = PackWriter(store.tmp)
    writer.finish()
    writer.discard()
    assert not list(store.tmp.iterdir())


def test_a_pack_that_came_in_behind_the_index_is_found(store: Store) -> None:
    name = write_pack(store, b"one")
    store.index.drop_pack(name)
    assert read_object(store, object_id(b"one")) == b"one"


def test_a_pack_that_is_gone_leaves_the_index(store: Store) -> None:
    name = write_pack(store, b"one")
    store.pack_path(name).unlink()
    assert sync_index(store).dropped == 1
    assert not store.index.packs()


def test_what_is_no_pack_is_passed_over(store: Store) -> None:
    name = write_pack(store, b"one")
    for odd in ("README", "x.pack", f"{'0' * 63}.pack", ".tmp-1234"):
        (store.packs / odd).write_bytes(b"?")
    assert list(list_packs(store.packs)) == [name]


def test_a_folder_that_cannot_be_listed_is_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch, as_nobody: Callable[[Callable[[], Any]], Any]
) -> None:
    name = write_pack(store, b"one")
    store.pack_path(name).parent.chmod(0)
    store.root.parent.chmod(0o755)

    def listing() -> str:
        try:
            return str(len(list_packs(store.packs)))
        except AccessDenied as exc:
            return exc.message

    if os.geteuid() == 0:
        assert "listing" in as_nobody(listing)
    store.pack_path(name).parent.chmod(0o755)
    store.packs.rename(store.root / "elsewhere")
    with pytest.raises(Damaged, match="is missing"):
        sync_index(store)
    assert store.index.packs()


def test_only_the_damaged_frames_of_a_damaged_pack_are_lost(store: Store, lab: Any) -> None:
    objects = [lab.noise(3000, seed) for seed in range(5)]
    path = store.pack_path(write_pack(store, *objects))
    entries = read_pack_index(path)[1]
    lab.flip(path, -END_MAGIC.__len__())  # the trailer: the pack's own index cannot be trusted any more
    lab.flip(path, entries[2].offset + 8)  # a frame's header
    with pytest.raises(Damaged, match=r"\.pack"):
        read_pack_index(path)
    assert [entry.id for entry in read_pack(path).entries] == [entries[n].id for n in (0, 1, 3, 4)]
    store.index.reset()
    done = sync_index(store)
    assert done.packs == 1
    assert len(done.damaged) == 1
    for number in (0, 1, 3, 4):
        assert read_object(store, object_id(objects[number])) == objects[number]
    with pytest.raises(Damaged):
        read_object(store, object_id(objects[2]))


def test_a_pack_cut_short_keeps_the_frames_before_the_cut(store: Store, lab: Any) -> None:
    objects = [lab.noise(3000, seed) for seed in range(4)]
    path = store.pack_path(write_pack(store, *objects))
    entries = read_pack_index(path)[1]
    os.truncate(path, entries[2].offset + 100)
    assert read_pack(path).entries == entries[:2]


def test_bytes_that_look_like_a_frame_are_not_believed(store: Store, lab: Any) -> None:
    """A payload may hold a frame with a forged id; it is reached only when the frame around it is damaged."""
    forged_id = object_id(b"the real bytes")
    fake = codec.encode(memoryview(b"something else"), codec.OPAQUE)
    frame = new_frame(CHUNK, forged_id, 14, fake)
    hostile = lab.noise(1024) + encode_header(frame) + b"something else" + bytes(50)
    path = store.pack_path(write_pack(store, hostile, b"good"))
    lab.flip(path, read_pack_index(path)[1][0].offset)
    lab.flip(path, -1)
    assert [entry.id for entry in read_pack(path).entries] == [object_id(b"good")]


def test_a_pack_of_a_newer_version_is_left_alone(store: Store, lab: Any) -> None:
    path = store.pack_path(write_pack(store, b"one"))
    lab.flip(path, 8, 2)
    with pytest.raises(UnknownVersion):
        read_pack_index(path)
    assert read_pack(path).entries == ()
    with pytest.raises(NotFound):
        read_pack(path.with_name("gone.pack"))


def test_a_pack_in_the_trash_is_brought_back(store: Store) -> None:
    name = write_pack(store, b"one", b"two")
    store.index.drop_pack(name)
    store.pack_path(name).rename(store.trash / store.pack_path(name).name)
    assert not restore_from_trash(store, object_id(b"three"))
    assert read_object(store, object_id(b"two")) == b"two"
    assert store.pack_path(name).exists()
    assert not list_packs(store.trash)


def test_securing_makes_packs_young_and_fetches_them_from_the_trash(store: Store, lab: Any) -> None:
    young, trashed = write_pack(store, b"one"), write_pack(store, b"two")
    lab.age(store.pack_path(young), 1e6)
    store.pack_path(trashed).rename(store.trash / store.pack_path(trashed).name)
    secure(store, [object_id(b"one"), object_id(b"two")], fresh=set())
    assert store.pack_path(young).stat().st_mtime > store.config.gc.grace_hours
    assert abs(store.pack_path(young).stat().st_mtime - store.pack_path(trashed).stat().st_mtime) < 60


@pytest.mark.parametrize("fresh", [True, False])
def test_securing_notices_what_is_gone_for_good(store: Store, *, fresh: bool) -> None:
    name = write_pack(store, b"one")
    store.pack_path(name).unlink()
    with pytest.raises(Damaged, match="was removed while it was being used"):
        secure(store, [object_id(b"one")], fresh={name} if fresh else set())


@pytest.mark.root
def test_a_full_disk_while_a_pack_is_written(mount: Callable[..., Path], lab: Any) -> None:
    folder = mount("1m")
    writer = PackWriter(folder)
    data = lab.noise(3 << 20)
    encoded = codec.encode(memoryview(data), codec.OPAQUE)
    frame = new_frame(CHUNK, object_id(data), len(data), encoded)
    with pytest.raises(LlmosError) as caught:
        writer.append(frame, encode_header(frame), encoded.parts)
    assert caught.value.exit_code == 15
    assert str(writer.path) in caught.value.message
    writer.discard()
    assert not list(folder.iterdir())

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import AccessDenied, Conflict, Damaged, LlmosError, NotFound, UnknownVersion
from llmos_cli.formats import canonical
from llmos_cli.formats.ids import ObjectId, checksum, object_id
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import decode_entry, encode_entry
from llmos_cli.store.disk import durable
from llmos_cli.store.local import Store
from llmos_cli.store.refs.refs import (
    delete_ref,
    list_refs,
    overwrite_ref,
    publish_move,
    read_ref,
    ref_history,
    ref_names,
    update_ref,
)

REF = RefName("model", "v1")


def oid(number: int) -> ObjectId:
    return object_id(b"%d" % number)


def move(store: Store, *numbers: int, ref: RefName = REF) -> None:
    for number in numbers:
        current = read_ref(store, ref)
        update_ref(store, ref, oid(number), expected=current.id if current else None, message=f"to {number}")


def value(store: Store, ref: RefName = REF) -> ObjectId | None:
    entry = read_ref(store, ref)
    return entry.id if entry else None


def newest(store: Store, ref: RefName = REF) -> Path:
    return max((store.refs / ref.name / ref.tag).iterdir())


def temporaries(store: Store) -> list[Path]:
    return [path for path in store.root.glob("**/.tmp-*") if path.exists()]


def test_a_ref_moves_and_remembers(store: Store) -> None:
    assert read_ref(store, REF) is None
    move(store, 1, 2, 3)
    entry = read_ref(store, REF)
    assert entry is not None
    assert (entry.id, entry.previous, entry.sequence, entry.message) == (oid(3), oid(2), 3, "to 3")
    assert entry.time.endswith("+00:00")
    assert [item.id for item in ref_history(store, REF)] == [oid(3), oid(2), oid(1)]
    assert [item.previous for item in ref_history(store, REF)] == [oid(2), oid(1), None]
    assert not temporaries(store)


def test_moving_to_the_same_value_is_no_move(store: Store) -> None:
    move(store, 1, 1, 1)
    assert len(ref_history(store, REF)) == 1


@pytest.mark.parametrize("expected", [None, oid(1), oid(9)])
def test_a_wrong_expectation_is_a_conflict(store: Store, expected: ObjectId | None) -> None:
    move(store, 1, 2)
    with pytest.raises(Conflict, match="model:v1 moved meanwhile"):
        update_ref(store, REF, oid(3), expected=expected, message="")
    assert value(store) == oid(2)


def test_expecting_a_value_of_a_ref_that_is_not_there(store: Store) -> None:
    with pytest.raises(Conflict, match="is absent"):
        update_ref(store, REF, oid(3), expected=oid(1), message="")


def test_refs_are_listed_by_name_and_what_is_no_ref_is_passed_over(store: Store, lab: Any) -> None:
    for ref in (RefName("b"), RefName("a", "2"), RefName("a", "1")):
        move(store, 1, ref=ref)
    (store.refs / "a" / "not a ref").mkdir()
    (store.refs / "stray file").write_bytes(b"")
    (store.refs / "a" / "1" / "README").write_bytes(b"")
    (store.refs / "empty" / "latest").mkdir(parents=True)
    assert [str(entry.ref) for entry in list_refs(store)] == ["a:1", "a:2", "b:latest"]
    assert any("not a ref" in text for text in lab.warnings())


@pytest.mark.parametrize("damage", ["empty", "half", "NUL-filled", "flipped", "from another ref", "other number"])
def test_a_damaged_newest_move_falls_back_with_a_warning(store: Store, lab: Any, damage: str) -> None:
    move(store, 1, 2)
    move(store, 7, 8, ref=RefName("other"))
    path = newest(store)
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "half": data[: len(data) // 2],
            "NUL-filled": bytes(len(data)),
            "flipped": data[:20] + bytes([data[20] ^ 4]) + data[21:],
            "from another ref": newest(store, RefName("other")).read_bytes(),
            "other number": path.with_name("0000000001").read_bytes(),
        }[damage]
    )
    assert value(store) == oid(1)
    assert any("using move 1 of model:v1" in text for text in lab.warnings())
    assert [entry.id for entry in ref_history(store, REF)] == [oid(1)]
    move(store, 3)
    assert value(store) == oid(3)
    assert [entry.id for entry in ref_history(store, REF)] == [oid(3), oid(1)]


def test_a_ref_with_nothing_but_damage_is_an_error_until_it_is_pointed_anew(store: Store) -> None:
    move(store, 1)
    newest(store).write_bytes(b"")
    for read in (lambda: read_ref(store, REF), lambda: list_refs(store)):
        with pytest.raises(Damaged) as caught:
            read()
        assert "llmos tag" in (caught.value.hint or "")
    with pytest.raises(Damaged):
        update_ref(store, REF, oid(2), expected=None, message="")
    overwrite_ref(store, REF, oid(2), message="repair")
    assert value(store) == oid(2)
    move(store, 3)
    assert value(store) == oid(3)


def test_a_move_of_a_newer_version_is_not_passed_over(store: Store) -> None:
    move(store, 1, 2)
    body = canonical.encode({"version": 2, "anything": "else"})
    newest(store).write_bytes(body + f"\n{checksum(body):016x}\n".encode())
    for attempt in (
        lambda: read_ref(store, REF),
        lambda: ref_history(store, REF),
        lambda: update_ref(store, REF, oid(3), expected=oid(1), message=""),
    ):
        with pytest.raises(UnknownVersion):
            attempt()


def test_a_deleted_ref_is_gone_with_its_log_and_may_be_made_anew(store: Store) -> None:
    move(store, 1, 2)
    move(store, 5, ref=RefName("model", "other"))
    with pytest.raises(Conflict):
        delete_ref(store, REF, expected=oid(1))
    assert delete_ref(store, REF, expected=oid(2)).id == oid(2)
    assert value(store) is None
    assert ref_names(store) == [RefName("model", "other")]
    assert len(list(store.trash.glob("ref-model-v1-*"))) == 1
    with pytest.raises(NotFound):
        delete_ref(store, REF, expected=oid(2))
    move(store, 3)
    assert [entry.id for entry in ref_history(store, REF)] == [oid(3)]


def test_a_writer_overtaken_by_a_delete_and_a_new_beginning_gives_its_move_back(store: Store) -> None:
    """It saw move 2; meanwhile the ref was deleted and made anew, so that its number 3 is free again."""
    move(store, 1, 2)
    seen = read_ref(store, REF)
    assert seen is not None
    delete_ref(store, REF, expected=oid(2))
    move(store, 9)
    stale = type(seen)(REF, 3, oid(3), oid(2), seen.time, seen.who, "late")
    with pytest.raises(Conflict):
        publish_move(store, stale)
    assert value(store) == oid(9)
    move(store, 10)
    with pytest.raises(Conflict):  # the number before it exists, but holds another value
        publish_move(store, stale)
    assert value(store) == oid(10)


def test_a_move_that_others_build_upon_at_once_has_not_failed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    move(store, 1)
    real = durable.publish_new

    def publish_and_be_overtaken(temp: Path, target: Path) -> bool:
        monkeypatch.undo()
        won = real(temp, target)
        move(store, 3)
        return won

    monkeypatch.setattr(durable, "publish_new", publish_and_be_overtaken)
    move(store, 2)
    assert [entry.id for entry in ref_history(store, REF)] == [oid(3), oid(2), oid(1)]


def test_a_move_made_while_the_ref_is_deleted_is_not_lost(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    move(store, 1)
    real = durable.move

    def move_after_another(source: Path, target: Path) -> bool:
        monkeypatch.undo()
        move(store, 2)
        return real(source, target)

    monkeypatch.setattr(durable, "move", move_after_another)
    with pytest.raises(Conflict):
        delete_ref(store, REF, expected=oid(1))
    assert value(store) == oid(2)


def test_a_ref_deleted_at_the_last_moment_is_a_conflict(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    move(store, 1)
    real = durable.publish_new

    def publish_after_delete(temp: Path, target: Path) -> bool:
        monkeypatch.undo()
        delete_ref(store, REF, expected=oid(1))
        return real(temp, target)

    monkeypatch.setattr(durable, "publish_new", publish_after_delete)
    with pytest.raises(Conflict, match="is absent"):
        update_ref(store, REF, oid(2), expected=oid(1), message="")
    assert not temporaries(store)


def test_a_failure_to_list_is_never_no_refs(store: Store, as_nobody: Callable[[Callable[[], Any]], Any]) -> None:
    move(store, 1)
    store.root.parent.chmod(0o755)
    (store.refs / "model").chmod(0)

    def listing() -> str:
        try:
            return str(len(list_refs(store)))
        except AccessDenied as exc:
            return exc.message

    if os.geteuid() == 0:
        assert "listing" in as_nobody(listing)
    (store.refs / "model").chmod(0o755)
    store.refs.rename(store.root / "elsewhere")
    with pytest.raises(Damaged, match="refs folder"):
        list_refs(store)


def test_a_long_message_is_cut_and_an_impossible_one_refused(store: Store) -> None:
    update_ref(store, REF, oid(1), expected=None, message="x" * 100_000)
    entry = read_ref(store, REF)
    assert entry is not None
    assert len(entry.message) == 1000
    with pytest.raises(LlmosError):
        update_ref(store, REF, oid(2), expected=oid(1), message="\ud800")
    assert value(store) == oid(1)
    assert not temporaries(store)


def test_of_many_processes_exactly_one_wins_each_round(
    store: Store, in_processes: Callable[[int, Callable[[int], Any]], list[Any]]
) -> None:
    for round_number in range(8):
        before = value(store)

        def race(number: int, before: ObjectId | None = before, base: int = 100 * round_number) -> bool:
            try:
                update_ref(store, REF, oid(base + number), expected=before, message="")
            except Conflict:
                return False
            return True

        won = in_processes(16, race)
        assert won.count(True) == 1
        assert value(store) == oid(100 * round_number + won.index(True))
    assert len(ref_history(store, REF)) == 8


def test_every_success_of_many_threads_is_in_the_log(store: Store) -> None:
    """Each adds to what it saw and retries on conflict, so the log must be a chain of all of them."""

    def work(number: int) -> list[ObjectId]:
        made: list[ObjectId] = []
        while len(made) < 6:
            current = read_ref(store, REF)
            new = oid(1000 * number + len(made))
            try:
                update_ref(store, REF, new, expected=current.id if current else None, message="")
            except Conflict:
                continue
            made.append(new)
        return made

    with ThreadPoolExecutor(8) as threads:
        made = {item for batch in threads.map(work, range(1, 9)) for item in batch}
    history = ref_history(store, REF)
    assert {entry.id for entry in history} == made
    assert len(history) == 48
    assert [entry.previous for entry in history] == [entry.id for entry in history[1:]] + [None]


def test_deleting_and_making_anew_beside_each_other(store: Store) -> None:
    """A move that was acknowledged is in the log, or went into the trash with it."""
    acknowledged: set[ObjectId] = set()
    stop = time.monotonic() + 0.7

    def write() -> None:
        count = 0
        while time.monotonic() < stop:
            current = read_ref(store, REF)
            new = oid(count := count + 1)
            try:
                update_ref(store, REF, new, expected=current.id if current else None, message="")
            except Conflict:
                continue
            acknowledged.add(new)

    def delete() -> None:
        while time.monotonic() < stop:
            current = read_ref(store, REF)
            if current:
                try:
                    delete_ref(store, REF, expected=current.id)
                except (Conflict, NotFound):
                    continue

    with ThreadPoolExecutor(2) as threads:
        for job in [threads.submit(write), threads.submit(delete)]:
            job.result()
    kept = {entry.id for entry in ref_history(store, REF)}
    for path in store.trash.glob("ref-model-v1-*/*"):
        kept.add(decode_entry(path.read_bytes(), REF, int(path.name)).id)
    assert acknowledged <= kept


def test_a_move_is_the_same_bytes_wherever_it_is_written(store: Store) -> None:
    move(store, 1)
    entry = read_ref(store, REF)
    assert entry is not None
    assert newest(store).read_bytes() == encode_entry(entry)

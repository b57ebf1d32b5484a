"""What was removed comes back whole, or stays where it is."""

from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import Conflict, NotFound
from llmos_cli.formats.ids import object_id
from llmos_cli.formats.names import RefName, parse_ref
from llmos_cli.store.gc.undelete import execute_undelete, plan_undelete, removed_refs
from llmos_cli.store.local import Store
from llmos_cli.store.packs.packs import list_packs
from llmos_cli.store.refs.refs import ref_history, ref_names

DAY = 86400.0


def back(store: Store, *names: str) -> list[str]:
    done = execute_undelete(store, plan_undelete(store, [parse_ref(name) for name in names]))
    return [str(item.ref) for item in done.refs]


def test_a_removed_ref_comes_back_with_its_log(store: Store, lab: Any) -> None:
    lab.add("a-b:c-d", {"f": b"1"})
    lab.add("a-b:c-d", {"f": b"2"})
    before = ref_history(store, RefName("a-b", "c-d"))
    lab.remove("a-b:c-d")
    assert [(item.ref, item.entry) for item in removed_refs(store)] == [(RefName("a-b", "c-d"), before[0])]
    assert back(store, "a-b:c-d") == ["a-b:c-d"]
    assert ref_history(store, RefName("a-b", "c-d")) == before
    assert lab.read("a-b:c-d") == {"f": b"2"}
    assert not list(store.trash.iterdir())
    lab.sound()


def test_what_it_needs_comes_back_from_the_trash_and_stays(store: Store, lab: Any) -> None:
    data = {"f": lab.noise(9000)}
    lab.add("x", data)
    lab.remove("x")
    lab.age_all(2 * DAY)
    lab.gc(grace=None)
    assert not lab.packs()
    assert back(store) == ["x:latest"]
    lab.gc()
    assert lab.read("x") == data
    lab.sound()


def test_packs_come_back_too(store: Store, lab: Any) -> None:
    data = lab.noise(9000)
    lab.add("x", {"f": data})
    lab.remove("x")
    (removed,) = store.trash.glob("ref-*")
    removed.rename(store.root / "away")
    lab.age_all(2 * DAY)
    lab.gc(grace=None)
    assert not store.index.has(object_id(data))
    assert len(plan_undelete(store).packs) == 1
    assert execute_undelete(store, plan_undelete(store)).packs == 1
    assert store.index.has(object_id(data))
    assert not list_packs(store.trash)


def test_a_living_ref_is_never_overwritten(store: Store, lab: Any) -> None:
    lab.add("x", {"f": b"old"})
    lab.remove("x")
    plan = plan_undelete(store)
    lab.add("x", {"f": b"new"})
    done = execute_undelete(store, plan)
    assert [(str(item.ref), type(exc)) for item, exc in done.failed] == [("x:latest", Conflict)]
    assert lab.read("x") == {"f": b"new"}
    assert [why for _, why in plan_undelete(store).kept] == ["there is such a ref"]
    with pytest.raises(Conflict) as caught:
        plan_undelete(store, [RefName("x")])
    assert caught.value.hint
    assert "llmos tag @" in caught.value.hint
    assert list(store.trash.glob("ref-x-*"))


def test_a_ref_made_at_the_same_moment_wins(store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.add("x", {"f": b"old"})
    lab.remove("x")
    plan = plan_undelete(store)
    with monkeypatch.context() as patch:
        patch.setattr("llmos_cli.store.gc.undelete._lives", lambda *_: bool(lab.add("x", {"f": b"new"})) and False)
        done = execute_undelete(store, plan)
    assert not done.refs
    assert lab.read("x") == {"f": b"new"}
    assert len(removed_refs(store)) == 1


def test_of_several_the_last_one_comes_back(store: Store, lab: Any) -> None:
    for number in range(3):
        lab.add("x", {"f": b"%d" % number})
        lab.remove("x")
        for at, path in enumerate(sorted(store.trash.glob("ref-*"), key=lambda path: path.stat().st_mtime)):
            lab.age(path, 100 - at)
    assert back(store, "x") == ["x:latest"]
    assert lab.read("x") == {"f": b"2"}
    assert len(removed_refs(store)) == 2


def test_what_cannot_be_whole_any_more_stays(store: Store, lab: Any) -> None:
    commit = lab.add("x", {"f": lab.noise(9000)})
    lab.add("y", {"f": b"1"})
    lab.remove("x")
    lab.remove("y")
    lab.pack_of(commit.id).unlink()
    done = execute_undelete(store, plan_undelete(store))
    assert [str(item.ref) for item in done.refs] == ["y:latest"]
    assert [str(item.ref) for item, _ in done.failed] == ["x:latest"]
    assert ref_names(store) == [RefName("y")]
    lab.sound()


def test_a_name_that_is_not_there(store: Store, lab: Any) -> None:
    (store.trash / "ref-odd").mkdir()
    (store.trash / "ref-a-b-c").mkdir()
    assert removed_refs(store) == []
    with pytest.raises(NotFound):
        plan_undelete(store, [RefName("x")])


def test_a_plan_carried_out_twice(store: Store, lab: Any, tmp_path: Path) -> None:
    lab.add("x", {"f": b"1"})
    lab.remove("x")
    plan = plan_undelete(store)
    assert len(execute_undelete(store, plan).refs) == 1
    done = execute_undelete(store, plan)
    assert not done.refs
    assert len(done.failed) == 1
    assert lab.read("x") == {"f": b"1"}

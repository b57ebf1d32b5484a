"""gc, fsck, doctor: looking after a store."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Llmos = Callable[..., Any]


def pack_of(llmos: Llmos, store: Path, path: Path, ref: str) -> Path:
    """Add `path` as `ref`; returns the one pack that this made."""
    before = set(store.glob("packs/*/*.pack"))
    assert llmos("add", path, ref).code == 0
    (made,) = set(store.glob("packs/*/*.pack")) - before
    return made


def test_a_sound_store_passes(llmos: Llmos, store: Path) -> None:
    ran = llmos("fsck")
    assert ran.code == 0
    assert ran.out.startswith("every byte is what it was: ")
    assert llmos("fsck", "--quick").out.startswith("structure is sound: ")
    report = llmos("fsck", "--json").json
    assert (report["ok"], report["problems"]) == (True, [])


def test_a_flipped_bit_is_found_and_named_with_the_refs_it_affects(llmos: Llmos, store: Path) -> None:
    (store.parent / "data").write_bytes(bytes(range(256)) * 40)
    pack = pack_of(llmos, store, Path("data"), "data:v1")
    raw = bytearray(pack.read_bytes())
    raw[len(raw) // 8] ^= 4
    pack.chmod(0o644)
    pack.write_bytes(raw)
    ran = llmos("fsck")
    assert ran.code == 13
    assert "affects data:v1" in ran.out
    assert "notes" not in ran.out
    assert "error: " in ran.err
    assert "hint: " in ran.err
    ran = llmos("fsck", "--json")
    report = ran.json
    assert ran.code == 13
    assert report["ok"] is False
    assert any("data:v1" in problem["refs"] for problem in report["problems"])
    assert ran.error["code"] == "damaged"


def test_a_missing_pack_is_found_even_by_a_quick_check(llmos: Llmos, store: Path) -> None:
    (store.parent / "data").write_text("data")
    pack_of(llmos, store, Path("data"), "data").unlink()
    ran = llmos("fsck", "--quick")
    assert ran.code == 13
    assert "data:latest" in ran.out


def test_ls_lists_what_is_damaged_and_fails(llmos: Llmos, store: Path) -> None:
    (store.parent / "data").write_text("data")
    pack_of(llmos, store, Path("data"), "data").unlink()
    ran = llmos("ls", "--json")
    assert ran.code == 13
    assert {row["ref"]: row["kind"] for row in ran.json["refs"]} == {
        "data:latest": None,
        "notes:latest": "files",
        "notes:v1": "files",
    }
    assert "data:latest" in ran.error["message"]
    assert llmos("show", "notes").code == 0


def test_a_lost_index_comes_back(llmos: Llmos, store: Path) -> None:
    for path in store.glob("index.db*"):
        path.unlink()
    assert llmos("show", "notes").code == 0
    assert llmos("fsck", "--reindex", "--json").json["reindexed_packs"] == 2


def test_gc_waits_for_its_grace_period(llmos: Llmos, store: Path) -> None:
    (store.parent / "data").write_bytes(bytes(range(256)) * 40)
    pack = pack_of(llmos, store, Path("data"), "data")
    llmos("rm", "data")
    found = llmos("gc", "--json").json
    assert (found["trashed_bytes"], found["freed_bytes"]) == (0, 0)
    assert found["kept_bytes"] > 0
    dry = llmos("gc", "--grace", "0", "--dry-run", "--json").json
    assert [item["pack"] for item in dry["trash"]] == [pack.stem]
    assert pack.exists()
    ran = llmos("gc", "--grace", "0")
    assert ran.code == 0
    assert "1 pack unlinked: nothing in them is needed" in ran.out
    assert not pack.exists()
    assert llmos("fsck").code == 0
    assert llmos("show", "notes").code == 0


def test_gc_refuses_a_negative_grace(llmos: Llmos, store: Path) -> None:
    assert llmos("gc", "--grace", "-1").code == 2


def test_gc_of_a_tidy_store_has_nothing_to_do(llmos: Llmos, store: Path) -> None:
    assert llmos("gc").out.startswith("0 B freed, 0 B moved to the trash")


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch with one GPU, which this machine may not have."""
    gpu = SimpleNamespace(name="Test GPU", total_memory=80_000_000_000)
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda index: gpu)
    mps = SimpleNamespace(is_available=lambda: False)
    fake = SimpleNamespace(cuda=cuda, backends=SimpleNamespace(mps=mps))
    monkeypatch.setitem(sys.modules, "torch", fake)


@pytest.mark.usefixtures("torch")
def test_doctor_reports_the_machine_and_leaves_nothing_behind(llmos: Llmos, store: Path) -> None:
    before = sorted(store.rglob("*"))
    report = llmos("doctor", "--json").json
    assert report["problems"] == []
    assert report["store"] == str(store)
    assert report["usable_cores"] >= 1
    assert report["memory"] >= report["memory_available"] > 0
    assert [device["type"] for device in report["devices"]] == ["cpu", "cuda:0"]
    assert all(feature["works"] for feature in report["disk"]["features"].values() if feature["needed"])
    assert report["disk"]["total"] >= report["disk"]["free"] > 0
    assert sorted(store.rglob("*")) == before
    page = llmos("doctor").out
    assert "device   cuda:0: Test GPU, 80.0 GB" in page
    assert "ok  fsync" in page


@pytest.mark.usefixtures("torch")
def test_doctor_works_outside_a_store(llmos: Llmos, folder: Path) -> None:
    ran = llmos("doctor")
    assert ran.code == 0
    assert "store    none found; llmos init makes one" in ran.out
    assert list(folder.iterdir()) == []


def test_doctor_reports_a_torch_that_does_not_load(llmos: Llmos, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ran = llmos("doctor", "--json")
    assert ran.code == 1
    assert any("torch does not load" in problem for problem in ran.json["problems"])

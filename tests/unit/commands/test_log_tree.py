"""The lineage in `llmos log` and `llmos show`: what an object was made from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.manifest import Manifest, Recipe, Source
from llmos_cli.formats.names import parse_ref
from llmos_cli.store.local import open_store
from llmos_cli.store.transaction import begin

Llmos = Callable[..., Any]


def make(root: Path, ref: str, kind: str, recipe: Recipe | None) -> ObjectId:
    with open_store(root) as store, begin(store, purpose="making", ref=parse_ref(ref)) as tx:
        entry = tx.add_bytes("content", ref.encode())
        return tx.commit(Manifest(kind, (entry,), recipe=recipe), message=f"make {ref}").id


@pytest.fixture
def family(store: Path) -> dict[str, ObjectId]:
    """sources -> web -> tiny; tiny and web -> tiny-int8."""
    sources = tuple(Source(f"text/{name}.txt", 1000, object_id(name.encode())) for name in "abcd")
    web = make(store, "web", "dataset", Recipe("shard", {"seq_len": 256}, sources=sources))
    tiny = make(store, "tiny", "model", Recipe("train", {"steps": 10}, {"data": web}, seed=7, tools={"torch": "2.13"}))
    int8 = make(store, "tiny-int8", "model", Recipe("quantize", {"scheme": "int8"}, {"model": tiny, "data": web}))
    return {"web": web, "tiny": tiny, "int8": int8}


def test_the_tree_goes_down_to_the_sources(llmos: Llmos, family: dict[str, ObjectId]) -> None:
    web, tiny, int8 = (family[name].short for name in ("web", "tiny", "int8"))
    lines = llmos("log", "tiny-int8").out.partition("Made from\n")[2].splitlines()
    assert lines == [
        f"  tiny-int8:latest @{int8}  model, 9 B",
        "  └─ by quantize scheme=int8",
        f"     ├─ data: web:latest @{web}  dataset, 3 B",
        "     │  └─ by shard seq_len=256",
        "     │     └─ 4 files, 4.00 kB: text/a.txt, text/b.txt, text/c.txt, ...",
        f"     └─ model: tiny:latest @{tiny}  model, 4 B",
        "        └─ by train steps=10 seed=7",
        f"           └─ data: web:latest @{web}  dataset, 3 B  (as above)",
    ]


def test_the_tree_in_ascii(llmos: Llmos, family: dict[str, ObjectId], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmos_cli.ui.output.Output.plain", True)
    out = llmos("log", "tiny").out
    assert out.isascii()
    assert "`- by train" in out


def test_the_lineage_as_json(llmos: Llmos, family: dict[str, ObjectId]) -> None:
    logged = llmos("log", "tiny-int8", "--json").json
    assert set(logged["objects"]) == {str(oid) for oid in family.values()}
    tiny = logged["objects"][str(family["tiny"])]
    assert tiny["refs"] == ["tiny:latest"]
    assert tiny["recipe"]["inputs"] == {"data": str(family["web"])}
    assert tiny["recipe"]["seed"] == 7
    web = logged["objects"][str(family["web"])]
    assert web["recipe"]["sources"][0]["name"] == "text/a.txt"


def test_an_earlier_value_is_named_by_its_place_in_the_history(
    llmos: Llmos, store: Path, family: dict[str, ObjectId]
) -> None:
    make(store, "web", "dataset", Recipe("shard", {"seq_len": 512}))
    assert f"data: web:latest~1 @{family['web'].short}" in llmos("log", "tiny").out


def test_an_input_that_is_not_here_ends_its_branch(llmos: Llmos, store: Path) -> None:
    gone = object_id(b"elsewhere")
    make(store, "orphan", "model", Recipe("train", {}, {"data": gone}))
    out = llmos("log", "orphan").out
    assert f"data: @{gone.short}  (not in this store)" in out
    assert llmos("log", "orphan", "--json").json["objects"][str(gone)]["problem"] == "not in this store"


def test_a_lineage_of_thousands_of_runs_can_be_drawn(llmos: Llmos, store: Path) -> None:
    last = make(store, "run", "model", None)
    with open_store(store) as opened, begin(opened, purpose="making", ref=parse_ref("long")) as tx:
        from llmos_cli.formats.manifest import encode_manifest

        for _ in range(1500):
            manifest = Manifest("model", (), recipe=Recipe("train", {}, {"model": last}))
            last = object_id(encode_manifest(manifest))
            tx._pipeline.put_manifest(last, encode_manifest(manifest))
        tx.commit(Manifest("model", (), recipe=Recipe("train", {}, {"model": last})), message="long")
    assert len(llmos("log", "long").out.splitlines()) > 3000


def test_show_tells_how_it_was_made(llmos: Llmos, family: dict[str, ObjectId]) -> None:
    page = llmos("show", "tiny").out
    assert "train, seed 7" in page
    assert f"web:latest @{family['web'].short}" in page
    assert "torch 2.13" in page
    assert "steps" in page
    recipe = llmos("show", "web", "--json").json["recipe"]
    assert recipe["command"] == "shard"
    assert len(recipe["sources"]) == 4

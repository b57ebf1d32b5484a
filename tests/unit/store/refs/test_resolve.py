from typing import Any

import pytest

from llmos_cli.errors import NotFound, UsageError
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName
from llmos_cli.store.local import Store
from llmos_cli.store.refs.resolve import resolve


def test_names_tags_earlier_values_and_ids(store: Store, lab: Any) -> None:
    one, two, three = (lab.add("model:v1", {"f": b"%d" % number}).id for number in range(3))
    latest = lab.add("model", {"f": b"latest"}).id
    assert resolve(store, "model").id == latest
    assert resolve(store, "model").ref == RefName("model", "latest")
    assert resolve(store, "model:v1").id == three
    assert resolve(store, "model:v1").label == "model:v1"
    assert resolve(store, "model:v1~").id == two
    assert resolve(store, "model:v1~1").id == two
    assert resolve(store, "model:v1~2").id == one
    assert resolve(store, "model:v1~0").id == three
    found = resolve(store, f"@{one.hex()[:12].upper()}")
    assert (found.id, found.ref, found.label) == (one, None, f"@{one.short}")
    assert resolve(store, f"@{one}").id == one


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("modle", "did you mean model:latest?"),
        ("model:v2", "v1"),
        ("model:v1~7", "llmos log model:v1"),
        ("entirely-different", "llmos ls"),
        ("@00000000", "llmos ls"),
    ],
)
def test_what_is_not_there_gets_the_nearest_name(store: Store, lab: Any, text: str, hint: str) -> None:
    lab.add("model:v1", {"f": b"1"})
    lab.add("model", {"f": b"2"})
    with pytest.raises(NotFound) as caught:
        resolve(store, text)
    assert hint in (caught.value.hint or "")
    assert caught.value.exit_code == 10


@pytest.mark.parametrize("text", ["", ":", "a:b:c", "../x", "-rf", "a..b", "@{", "x.lock", "@xyz", "@12", "a~b", "a b"])
def test_malformed_names_are_usage_errors(store: Store, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(store, text)
    assert caught.value.exit_code == 2


def test_an_ambiguous_prefix_lists_what_it_could_be(store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [ObjectId(bytes.fromhex("abcd" + f"{number:02x}" * 30)) for number in range(8)]
    monkeypatch.setattr(store.index, "manifests", lambda prefix: ids)
    with pytest.raises(UsageError, match=r"@abcd is ambiguous: @abcd000000, .* and 3 more"):
        resolve(store, "@abcd")


def test_an_id_is_found_though_the_index_has_not_seen_its_pack(store: Store, lab: Any) -> None:
    commit = lab.add("x", {"f": b"1"})
    store.index.drop_pack(next(iter(store.index.packs())))
    assert resolve(store, f"@{commit.id.short}").id == commit.id


def test_only_manifests_are_found_by_id(store: Store, lab: Any) -> None:
    lab.add("x", {"f": b"a chunk"})
    chunks = {entry.id for entry in store.index.entries(next(iter(store.index.packs()))) if entry.kind == 1}
    for oid in chunks:
        with pytest.raises(NotFound):
            resolve(store, f"@{oid}")


def test_a_value_from_before_the_log_was_trimmed(store: Store, lab: Any) -> None:
    first = lab.add("x", {"f": b"1"}).id
    lab.add("x", {"f": b"2"})
    (store.refs / "x" / "latest" / "0000000001").unlink()
    assert resolve(store, "x~1").id == first
    with pytest.raises(NotFound):
        resolve(store, "x~2")

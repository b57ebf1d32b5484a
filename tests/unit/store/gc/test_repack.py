"""What is stored badly is stored anew, and nothing is lost on the way."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import Busy, Unsafe
from llmos_cli.formats import codec
from llmos_cli.formats.frame import CHUNK, encode_header, new_frame
from llmos_cli.formats.ids import ObjectId, object_id
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.progress import Silent
from llmos_cli.store.gc import repack
from llmos_cli.store.gc.gc import execute_gc, plan_gc
from llmos_cli.store.gc.repack import RepackPlan, RepackResult, execute_repack, plan_repack
from llmos_cli.store.intake.bases import open_base
from llmos_cli.store.leases import hold_alone
from llmos_cli.store.local import Store
from llmos_cli.store.packs import deltas
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.packs import PackWriter, list_packs
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.store.refs.resolve import resolve
from llmos_cli.store.transaction import Tensor, begin

DAY = 86400.0
COUNT = 40_000


def weights(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 0.02, COUNT).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def nudged(values: np.ndarray, seed: int) -> np.ndarray:
    return values + np.random.default_rng(seed).integers(-2, 3, values.shape).astype(np.uint16)


def put(store: Store, ref: str, values: np.ndarray, base: str | None = None, **extra: bytes) -> ObjectId:
    """Commit a model of one bf16 tensor, resting on that of another ref; gives the id of the tensor's chunk."""
    data = values.tobytes()
    with begin(store, purpose="test", ref=RefName(ref)) as tx:
        if base:
            tx.base = open_base(store, resolve(store, base).id)
        entries = [tx.add_tensors("model.safetensors", [Tensor("w", "BF16", values.shape, lambda: data)])]
        entries += [tx.add_bytes(name, content) for name, content in extra.items()]
        tx.commit(Manifest("model", tuple(entries)), message="")
    return object_id(data)


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Until it is called, chunks are stored as before there were planes and deltas: raw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "encode", lambda plain, words, room=None: codec.Encoded(codec.RAW, 0, False, (plain,)))
        patch.setattr("llmos_cli.store.packs.pipeline.encode_delta", lambda *_: None)
        yield patch.undo


def run(store: Store, **options: Any) -> RepackResult:
    return execute_repack(store, plan_repack(store, grace_seconds=0.0), Silent(), **options)


def entry(store: Store, oid: ObjectId) -> Any:
    (location,) = store.index.locate(oid)
    return location.entry


def tensor(store: Store, ref: str) -> bytes:
    value = read_ref(store, RefName(ref))
    assert value
    (file, *_) = [file for file in read_manifest(store, value.id).files if file.path == "model.safetensors"]
    return read_file(store, file)[-2 * COUNT :]


def size(store: Store) -> int:
    return sum(path.stat().st_size for path in list_packs(store.packs).values())


def test_raw_chunks_get_planes_and_deltas(store: Store, lab: Any, old: Callable[[], None]) -> None:
    first, second, other = weights(), nudged(weights(), 1), weights(9)
    ids = [put(store, "run", first), put(store, "run", second), put(store, "other", other)]
    assert {entry(store, oid).codec for oid in ids} == {codec.RAW}
    old()
    before = size(store)
    plan = plan_repack(store, grace_seconds=0.0)
    assert plan.anew.keys() == set(ids)
    assert size(store) == before
    done = execute_repack(store, plan, Silent())
    assert (done.replaced, done.anew) == (3, 3)
    assert size(store) < 0.6 * before
    assert sorted(entry(store, oid).codec for oid in ids) == [codec.PLANES, codec.PLANES, codec.DELTA]
    assert 0.7 < (done.before - done.after) / plan.saved_bytes < 1.4
    assert [tensor(store, "run"), tensor(store, "other")] == [second.tobytes(), other.tobytes()]
    lab.sound()
    assert not plan_repack(store, grace_seconds=0.0).packs
    execute_gc(store, plan_gc(store, grace_seconds=0.0), Silent())
    assert not list_packs(store.trash)
    lab.sound()
    assert tensor(store, "run") == second.tobytes()


def test_a_fine_tune_stored_whole_finds_its_base_under_another_name(
    store: Store, lab: Any, old: Callable[[], None]
) -> None:
    ids = [put(store, "base", weights()), put(store, "chat", nudged(weights(), 1))]
    old()
    run(store)
    assert sorted(entry(store, oid).depth for oid in ids) == [0, 1]
    lab.gc()
    assert tensor(store, "chat") == nudged(weights(), 1).tobytes()
    lab.sound()


def test_a_base_that_nothing_else_needs_is_freed(store: Store, lab: Any) -> None:
    base = put(store, "gone", weights())
    tuned = {f"tuned{seed}": nudged(weights(), seed) for seed in (1, 2, 3)}
    ids = [put(store, ref, values, "gone") for ref, values in tuned.items()]
    assert {entry(store, oid).base for oid in ids} == {base}
    lab.remove("gone")
    lab.gc()
    assert store.index.has(base)
    before = size(store)
    assert plan_repack(store, grace_seconds=0.0).saved_bytes > 0
    run(store)
    lab.gc()
    lab.gc()
    assert not store.index.has(base)
    assert size(store) < before
    assert sorted(entry(store, oid).depth for oid in ids) == [0, 1, 1]
    for ref, values in tuned.items():
        assert tensor(store, ref) == values.tobytes()
    lab.sound()
    assert not plan_repack(store, grace_seconds=0.0).anew


def test_a_base_is_kept_where_freeing_it_would_cost_more(store: Store, lab: Any) -> None:
    """Each rests on another half of it, so they have little in common."""
    base, half = weights(), COUNT // 2
    ids = []
    put(store, "gone", base)
    for ref, part in (("left", slice(0, half)), ("right", slice(half, COUNT))):
        values = weights(len(ref))
        values[part] = base[part]
        ids.append(put(store, ref, values, "gone"))
    assert {entry(store, oid).depth for oid in ids} == {1}
    lab.remove("gone")
    assert not plan_repack(store, grace_seconds=0.0).anew


def test_long_chains_are_shortened(store: Store, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [weights()]
    for seed in range(1, 6):
        values.append(nudged(values[-1], seed))
    with monkeypatch.context() as patch:
        patch.setattr(deltas, "CHAIN", 8)
        ids = [put(store, "run", each) for each in values]
    assert entry(store, ids[-1]).depth == 5
    run(store)
    lab.gc()
    assert max(entry(store, oid).depth for oid in ids) <= deltas.CHAIN
    assert tensor(store, "run") == values[-1].tobytes()
    lab.sound()


def test_small_packs_are_put_together_once(store: Store, lab: Any) -> None:
    files = {f"f{number}": lab.noise(3000, number) for number in range(8)}
    for name, data in files.items():
        lab.add(name, {"f": data})
    plan = plan_repack(store, grace_seconds=0.0)
    assert (len(plan.packs), plan.small, len(plan.anew)) == (8, 8, 0)
    done = execute_repack(store, plan, Silent())
    assert (done.replaced, done.packs, done.anew) == (8, 1, 0)
    assert not plan_repack(store, grace_seconds=0.0).packs
    lab.gc()
    assert len(lab.packs()) == 1
    for name, data in files.items():
        assert lab.read(name) == {"f": data}
    lab.sound()


def test_a_partly_dead_pack_is_rewritten(store: Store, lab: Any) -> None:
    lab.add("both", {"keep": lab.noise(80_000, 1), "drop": lab.noise(20_000, 2)})
    lab.add("kept", {"keep": lab.noise(80_000, 1)})
    lab.remove("both")
    assert not plan_gc(store, grace_seconds=0).rewrite  # too little for an ordinary gc
    run(store)
    lab.gc()
    assert size(store) < 85_000
    assert lab.read("kept") == {"keep": lab.noise(80_000, 1)}
    lab.sound()


def test_what_is_dead_but_young_is_left_alone(store: Store, lab: Any) -> None:
    lab.add("both", {"keep": lab.noise(80_000, 1), "drop": lab.noise(20_000, 2)})
    lab.add("kept", {"keep": lab.noise(80_000, 1)})
    lab.remove("both")
    assert not plan_repack(store).packs
    lab.age_all(2 * DAY)
    assert plan_repack(store).packs


def test_packs_of_an_open_transaction_are_left_alone(store: Store, lab: Any, old: Callable[[], None]) -> None:
    put(store, "run", weights())
    old()
    with begin(store, purpose="test"):
        assert not plan_repack(store, grace_seconds=0.0).packs
    assert plan_repack(store, grace_seconds=0.0).packs


def test_the_old_copies_wait_in_the_trash_and_readers_need_not_notice(
    store: Store, lab: Any, old: Callable[[], None]
) -> None:
    put(store, "run", weights(), extra=b"something else")
    old()
    value = read_ref(store, RefName("run"))
    assert value
    files = read_manifest(store, value.id).files
    run(store)
    assert len(list_packs(store.trash)) == 1
    assert {file.path: len(read_file(store, file)) for file in files}["extra"] == 14
    assert lab.gc(grace=None).restored == 0
    assert len(list_packs(store.trash)) == 1


def test_of_what_cannot_be_proven_the_old_pack_stays(
    store: Store, lab: Any, old: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    oid = put(store, "run", weights())
    old()
    real = repack._proven

    def rotten(store: Store, sizes: Any, progress: Any) -> Any:
        for name in sizes:
            lab.flip(store.pack_path(name), 300)
        return real(store, sizes, progress)

    monkeypatch.setattr(repack, "_proven", rotten)
    done = run(store)
    assert (done.replaced, done.packs) == (0, 0)
    monkeypatch.undo()
    lab.gc()
    assert tensor(store, "run") == weights().tobytes()
    assert store.index.has(oid)


def test_a_damaged_pack_stays_as_it_is(store: Store, lab: Any, old: Callable[[], None]) -> None:
    oid = put(store, "run", weights())
    other = put(store, "other", weights(1))
    old()
    lab.flip(*lab.payload_at(oid))
    damaged = lab.pack_of(oid)
    done = run(store)
    assert done.replaced == 1
    assert damaged.exists()
    assert entry(store, other).codec == codec.PLANES
    assert any("stays as it is" in text for text in lab.warnings())
    assert not lab.leftovers()


def test_what_became_the_base_of_something_after_the_plan_stays_whole(
    store: Store, lab: Any, old: Callable[[], None]
) -> None:
    """A writer rests a new delta on a chunk that is being turned into a delta: the whole copy comes back."""
    first, second = weights(), nudged(weights(), 1)
    ids = [put(store, "base", first), put(store, "chat", second)]
    old()
    plan = plan_repack(store, grace_seconds=0.0)
    (target,) = [oid for oid, choice in plan.anew.items() if choice.base]
    source = first if target == ids[0] else second
    third = nudged(source, 7)
    plain = third.tobytes()
    delta = codec.encode_delta(memoryview(plain), source.tobytes(), codec.Words(2, True))
    frame = new_frame(CHUNK, object_id(plain), len(plain), delta, target, 1)
    writer = PackWriter(store.tmp)
    writer.append(frame, encode_header(frame), delta.parts)
    writer.publish(store)
    put(store, "third", third)
    execute_repack(store, plan, Silent())
    for _ in range(2):
        lab.gc()
        assert tensor(store, "third") == plain
        lab.sound()
    for ref, values in (("base", first), ("chat", second)):
        assert tensor(store, ref) == values.tobytes()


def test_of_two_copies_after_a_crash_one_goes(store: Store, lab: Any, old: Callable[[], None]) -> None:
    put(store, "run", weights())
    put(store, "run", nudged(weights(), 1))
    old()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repack, "trash_pack", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(store)
    lab.sound()
    lab.gc()
    lab.sound()
    run(store)
    lab.gc()
    assert size(store) < 1.2 * COUNT + 20_000
    assert tensor(store, "run") == nudged(weights(), 1).tobytes()


def test_two_at_once_and_a_clock_that_is_off(store: Store, old: Callable[[], None]) -> None:
    put(store, "run", weights())
    old()
    plan = plan_repack(store, grace_seconds=0.0)
    with hold_alone(store, "gc", "gc"), pytest.raises(Busy):
        execute_repack(store, plan, Silent())
    with pytest.raises(Unsafe):
        execute_repack(store, plan, Silent(), now=0.0)
    assert execute_repack(store, plan, Silent()).replaced == 1
    assert execute_repack(store, RepackPlan(), Silent()) == RepackResult()


def test_a_plan_carried_out_twice(store: Store, lab: Any, old: Callable[[], None]) -> None:
    put(store, "run", weights())
    old()
    plan = plan_repack(store, grace_seconds=0.0)
    execute_repack(store, plan, Silent())
    execute_repack(store, plan, Silent())
    lab.gc()
    lab.sound()
    assert tensor(store, "run") == weights().tobytes()

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmos_cli.errors import AccessDenied, Damaged, LlmosError, NotFound, Unsafe
from llmos_cli.formats import limits
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.store.inspect.census import take_census
from llmos_cli.store.intake import ingest
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest
from llmos_cli.store.packs.packs import list_packs
from llmos_cli.store.refs.refs import read_ref
from llmos_cli.store.transaction import Commit, begin


def add(store: Store, path: Path, name: str = "") -> tuple[FileEntry, Commit]:
    with begin(store, purpose="test", ref=RefName("x")) as tx:
        entry = tx.add_path(name or path.name, path)
        return entry, tx.commit(Manifest("files", (entry,)), message="")


def chunks(entry: FileEntry) -> set[Any]:
    return {chunk.id for chunk in entry.chunks}


def model(seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors below, at and above the size of a chunk."""
    generator = np.random.default_rng(seed)
    shapes = {"embed": (1100, 2048), "a.weight": (300, 500), "a.bias": (300,), "norm": (7,), "big": (2 << 20, 1)}
    return {name: generator.integers(0, 1 << 16, shape, dtype=np.uint16) for name, shape in shapes.items()}


def test_a_safetensors_file_comes_back_and_is_cut_at_its_tensors(store: Store, tmp_path: Path, lab: Any) -> None:
    data = lab.safetensors(model(), {"format": "pt"})
    (tmp_path / "m.safetensors").write_bytes(data)
    entry, commit = add(store, tmp_path / "m.safetensors")
    assert read_file(store, entry) == data
    assert entry.size == commit.size == len(data)
    sizes = [chunk.size for chunk in entry.chunks]
    tensor_sizes = [array.nbytes for array in model().values()]
    assert sizes[1:3] == [4 << 20, tensor_sizes[0] - (4 << 20)]
    assert sizes[3:6] == tensor_sizes[1:4]
    assert sizes[6:] == [4 << 20]


def test_a_renamed_resharded_or_reordered_model_shares_all_tensors(store: Store, tmp_path: Path, lab: Any) -> None:
    tensors = model()
    path = tmp_path / "m.safetensors"
    path.write_bytes(lab.safetensors(tensors))
    first, _ = add(store, path)
    own = chunks(first)
    reordered = lab.safetensors(dict(sorted(tensors.items())))
    renamed = lab.safetensors({f"model.{name}": array for name, array in tensors.items()}, {"k": "v"})
    names = list(tensors)
    shards = [lab.safetensors({name: tensors[name] for name in part}) for part in (names[:2], names[2:])]
    for data in (reordered, renamed, *shards):
        path.write_bytes(data)
        entry, commit = add(store, path)
        assert len(chunks(entry) - own) == 1  # the header
        assert commit.stored < 3000
        assert read_file(store, entry) == data


def test_an_edited_text_shares_most(store: Store, tmp_path: Path, lab: Any) -> None:
    text = lab.text(12 << 20)
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    first, _ = add(store, path)
    assert len(first.chunks) >= 4
    edited = text[: 5 << 20] + b"a few new words" + text[(5 << 20) + 3 :]
    path.write_bytes(edited)
    second, commit = add(store, path)
    assert len(chunks(second) - chunks(first)) <= 2
    assert commit.reused > 0.6 * len(text)
    assert read_file(store, second) == edited


@pytest.mark.parametrize("size", [0, 1, 262143, 262144, 262145, 1 << 20, 4 << 20, (4 << 20) + 1, 16 << 20, 40 << 20])
def test_a_path_and_a_stream_of_the_same_bytes_are_cut_alike(store: Store, tmp_path: Path, lab: Any, size: int) -> None:
    data = lab.noise(size) if size < 2 << 20 else lab.noise(1 << 20) * 4 + bytes(size - (4 << 20))
    path = tmp_path / "f.bin"
    path.write_bytes(data)

    class Dripping(io.BytesIO):
        """Gives less than asked for, as a pipe does."""

        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, random.Random(self.tell()).randint(1, 3 << 20)))

    with begin(store, purpose="test") as tx:
        entries = [tx.add_path("f", path), tx.add_bytes("f", data), tx.add_stream("f", Dripping(data))]
    assert entries[0] == entries[1] == entries[2]
    assert entries[0].size == size
    assert all(0 < chunk.size <= limits.CHUNK_BYTES for chunk in entries[0].chunks)


def foreign(tensors: dict[str, np.ndarray]) -> dict[str, bytes]:
    """The same tensors as other tools write them."""
    import torch

    npz, zipped = io.BytesIO(), io.BytesIO()
    np.savez(npz, **tensors)  # type: ignore[arg-type]
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, zipped)
    entries = b"".join(
        struct.pack(f"<Q{len(name)}sI{array.ndim}QIQ", len(name), name.encode(), array.ndim, *array.shape[::-1], 25, at)
        for name, array, at in zip(tensors, tensors.values(), aligned(tensors.values()), strict=False)
    )
    gguf = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + entries
    gguf += bytes(-len(gguf) % 32) + b"".join(array.tobytes() + bytes(-array.nbytes % 32) for array in tensors.values())
    return {"m.npz": npz.getvalue(), "m.bin": zipped.getvalue(), "m.gguf": gguf}


def aligned(arrays: Any) -> list[int]:
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + array.nbytes + -array.nbytes % 32)
    return starts


def test_a_model_in_any_format_shares_its_big_tensors(store: Store, tmp_path: Path, lab: Any) -> None:
    tensors = {name: array for name, array in model().items() if array.nbytes % 32 == 0 or name == "norm"}
    assert len(tensors) == 4
    big = {f"s{number}": lab.noise(size, number) for number, size in enumerate([5 << 20, 40_000])}
    tensors |= {name: np.frombuffer(bytearray(data), np.uint16) for name, data in big.items()}
    path = tmp_path / "m.safetensors"
    path.write_bytes(lab.safetensors(tensors))
    first, _ = add(store, path)
    own = chunks(first)
    for name, data in foreign(tensors).items():
        path = tmp_path / name
        path.write_bytes(data)
        entry, commit = add(store, path)
        assert read_file(store, entry) == data
        assert commit.stored < 6000, name
        shared = sum(chunk.size for chunk in entry.chunks if chunk.id in own)
        assert shared == sum(array.nbytes for array in tensors.values() if array.nbytes >= 4096), name
        assert sum(chunk.size for chunk in entry.chunks) == len(data)


def test_many_tiny_tensors_lie_together(store: Store, tmp_path: Path) -> None:
    arrays = {f"t{number}": np.full(100, number) for number in range(500)}
    np.savez(tmp_path / "m.npz", **arrays)  # type: ignore[arg-type]
    entry, _ = add(store, tmp_path / "m.npz")
    assert len(entry.chunks) <= 4
    assert read_file(store, entry) == (tmp_path / "m.npz").read_bytes()


@pytest.mark.parametrize("name", ["m.bin", "m.npz", "m.npy", "m.pt"])
def test_a_broken_file_of_a_lenient_format_is_stored_like_any_other(store: Store, tmp_path: Path, name: str) -> None:
    data = foreign(model())["m.npz"]
    for broken in (data[:-100], data[: len(data) // 2], b"PK\3\4" + data[4:5000], b"\x93NUMPY" + bytes(100), b""):
        (tmp_path / name).write_bytes(broken)
        entry, _ = add(store, tmp_path / name)
        assert read_file(store, entry) == broken


class Bomb:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self._marker,)


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.ckpt", "m.pkl", ".metadata", "m.npy", "m.safetensors"])
def test_a_pickle_that_would_run_a_program_is_stored_and_never_run(store: Store, tmp_path: Path, name: str) -> None:
    """As torch writes it (a zip archive), as it did once, and by itself."""
    import torch

    marker, zipped, legacy = tmp_path / "payload-was-run", io.BytesIO(), io.BytesIO()
    state = {"weight": torch.zeros(3000), "evil": Bomb(marker)}
    torch.save(state, zipped)
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    path = tmp_path / name
    for data in (zipped.getvalue(), legacy.getvalue(), pickle.dumps(Bomb(marker))):
        path.write_bytes(data)
        if name == "m.safetensors":
            with pytest.raises(Damaged, match=r"m\.safetensors"):
                add(store, path)
        else:
            entry, _ = add(store, path)
            census = take_census(store, Manifest("files", (entry,)))
            assert read_file(store, entry) == data
            assert bool(census.tensors) == (
                data == zipped.getvalue() and name.endswith((".pt", ".pth", ".bin", ".ckpt"))
            )
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb is a dud"


def test_a_bad_gguf_file_is_refused_and_nothing_is_visible(store: Store, tmp_path: Path) -> None:
    good = foreign(model())["m.gguf"]
    path = tmp_path / "m.gguf"
    for bad in (good[:-40], good[:16] + b"\xff" * 8 + good[24:], good[:8] + b"\xff" * 8 + good[16:]):
        path.write_bytes(bad)
        with pytest.raises(Unsafe, match=r"m\.gguf") as caught:
            add(store, path)
        assert caught.value.exit_code == 14
    assert read_ref(store, RefName("x")) is None
    assert not list_packs(store.packs)


def test_a_line_put_into_a_jsonl_file_stores_little_more_than_itself(store: Store, tmp_path: Path) -> None:
    generator = random.Random(0)
    lines = [json.dumps({"id": n, "text": generator.randbytes(400).hex()}) for n in range(25_000)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(lines))
    size = path.stat().st_size
    assert size > 20_000_000
    add(store, path)
    for edit in (
        lambda: lines.insert(12_000, json.dumps({"id": "new", "text": "a line more"})),
        lambda: lines.__delitem__(5_000),
        lambda: lines.append("{}"),
    ):
        edit()
        path.write_text("\n".join(lines))
        entry, commit = add(store, path)
        assert size - commit.reused < 3 << 20
        assert commit.stored < 2 << 20
        assert read_file(store, entry) == path.read_bytes()


def header(table: object) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(start: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [end - start], "data_offsets": [start, end]}


BAD = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "not JSON": header(b"nonsense"),
    "truncated": header({"a": tensor(0, 100)}) + bytes(60),
    "trailing bytes": header({"a": tensor(0, 100)}) + bytes(160),
    "overlap": header({"a": tensor(0, 100), "b": tensor(50, 150)}) + bytes(150),
    "hole": header({"a": tensor(0, 50), "b": tensor(100, 150)}) + bytes(150),
    "duplicate name": header(b'{"a":%s,"a":%s}' % ((json.dumps(tensor(0, 4)).encode(),) * 2)) + bytes(4),
    "shape does not fit": header({"a": tensor(0, 100, "F32", [26])}) + bytes(100),
    "unknown dtype": header({"a": tensor(0, 100, "Q8")}) + bytes(100),
    "name ../../x": header({"../../x": tensor(0, 4)}) + bytes(4),
    "name /etc/passwd": header({"/etc/passwd": tensor(0, 4)}) + bytes(4),
    "deep nesting": header(b"[" * 100_000),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_safetensors_file_is_refused_and_nothing_is_visible(
    store: Store, tmp_path: Path, lab: Any, what: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD[what])
    with pytest.raises((Damaged, Unsafe)) as caught:
        add(store, path)
    assert caught.value.exit_code == (14 if what.startswith("name") else 13)
    assert str(path) in caught.value.message
    assert read_ref(store, RefName("x")) is None
    assert not list_packs(store.packs)
    assert not lab.leftovers()
    assert path.read_bytes() == BAD[what]


@pytest.mark.parametrize("change", ["grows", "shrinks", "is touched"])
def test_a_file_that_changes_while_it_is_read(
    store: Store, tmp_path: Path, lab: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(lab.noise(6 << 20))
    os.utime(path, (1, 1))
    real = ingest._cdc_cuts

    def cuts(window: bytes, *, final: bool) -> list[int]:
        if change == "grows":
            with open(path, "ab") as file:
                file.write(b"more")
        elif change == "shrinks":
            os.truncate(path, 1000)
        else:
            os.utime(path)
        return real(window, final=final)

    monkeypatch.setattr(ingest, "_cdc_cuts", cuts)
    with pytest.raises(LlmosError, match="while it was read"):
        add(store, path)
    assert read_ref(store, RefName("x")) is None


def test_a_pipe_a_folder_a_device_and_nothing(store: Store, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(Unsafe, match="not a regular file"):
            add(store, path, "f")
    with pytest.raises(NotFound):
        add(store, tmp_path / "nothing")


def test_a_file_that_may_not_be_read(store: Store, tmp_path: Path, as_nobody: Any) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    tmp_path.chmod(0o755)

    def attempt() -> str:
        try:
            ingest.put_path(None, "secret", path, None)  # type: ignore[arg-type]
        except AccessDenied as exc:
            return exc.message
        return ""

    if os.geteuid() == 0:
        assert str(path) in as_nobody(attempt)


def test_an_odd_name_in_the_store_is_refused_before_anything_is_read(store: Store, tmp_path: Path) -> None:
    for name in ("../f", "/f", "a//b", "nul", "a\x00b", "trailing."):
        with pytest.raises(Unsafe):
            add(store, tmp_path / "not even there", name)


@pytest.mark.slow
def test_a_large_file_needs_little_memory(store: Store) -> None:
    """1.5 GB, mostly holes, once as tensors and once as opaque bytes."""
    script = f"""
import random, resource
from pathlib import Path
from llmos_cli.formats.manifest import Manifest
from llmos_cli.formats.names import RefName
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.store.local import open_store
from llmos_cli.store.transaction import begin

root = Path({str(store.root)!r})
folder = root.parent
shapes = [("noise", 32 << 20), ("zeros", 700 << 20), ("tail", 3)]
header = encode_header([(name, "U8", (size,)) for name, size in shapes], {{}})
for name in ("model.safetensors", "opaque.bin"):
    with open(folder / name, "wb") as file:
        file.write(header)
        for block in range(32):
            file.write(random.Random(block).randbytes(1 << 20))
        file.truncate(len(header) + sum(size for _, size in shapes))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_store(root) as store, begin(store, purpose="add", ref=RefName("x")) as tx:
    entries = tuple(tx.add_path(name, folder / name) for name in ("model.safetensors", "opaque.bin"))
    commit = tx.commit(Manifest("files", entries), message="")
print(commit.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, growth = (int(number) for number in done.stdout.split())
    assert size > 1_500_000_000
    assert growth < 400_000  # KiB
    entry = read_manifest(store, read_ref(store, RefName("x")).id).files[1]  # type: ignore[union-attr]
    assert entry.size > 750_000_000


def test_threads_are_gone_after_a_transaction(store: Store, lab: Any) -> None:
    before = threading.active_count()
    lab.add("x", {"f": lab.noise(100_000)})
    names = {thread.name.partition("_")[0] for thread in threading.enumerate()}
    assert not names & {"encode", "publish"}
    assert threading.active_count() <= before + 1  # a lease's thread may still be on its way out

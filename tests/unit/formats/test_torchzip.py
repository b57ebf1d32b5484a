"""Torch files: the bytes of every storage are found where torch put them, whatever the pickle says or tries."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmos_cli.formats import limits
from llmos_cli.formats.pickled import read_storages
from llmos_cli.formats.safetensors import TensorInfo
from llmos_cli.formats.torchzip import find_storages


def find(data: bytes) -> tuple[TensorInfo, ...] | None:
    return find_storages(lambda start, end: data[start:end], len(data))


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def content(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.ndim else bytes(tensor.numpy())


def zipped(entries: dict[str, bytes], *, change: Callable[[zipfile.ZipInfo], None] = lambda info: None) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            info = zipfile.ZipInfo(name)
            change(info)
            archive.writestr(info, data)
    return file.getvalue()


STATE = {
    "embed.weight": torch.arange(600, dtype=torch.float32).reshape(30, 20),
    "half": torch.ones(5, 3).bfloat16(),
    "ids": torch.arange(7),
    "flag": torch.tensor([True, False]),
    "small": torch.zeros(4, dtype=torch.float8_e4m3fn),
    "wide": torch.tensor([1, 2, 65535, 4], dtype=torch.uint16),
    "one": torch.tensor(2.5, dtype=torch.float64),
    "row": torch.nn.Parameter(torch.ones(1, 9)),
}
PLAIN = saved(STATE)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_tensors_of_a_state_dict_are_found_by_name_type_and_shape(protocol: int) -> None:
    data = saved(STATE, pickle_protocol=protocol)
    found = find(data)
    assert found is not None
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in found} == {
        "embed.weight": ("F32", (30, 20)),
        "half": ("BF16", (5, 3)),
        "ids": ("I64", (7,)),
        "flag": ("BOOL", (2,)),
        "small": ("F8_E4M3", (4,)),
        "wide": ("U16", (4,)),
        "one": ("F64", ()),
        "row": ("F32", (1, 9)),
    }
    assert {tensor.name: data[tensor.start : tensor.end] for tensor in found} == {
        name: content(tensor.detach()) for name, tensor in STATE.items()
    }
    assert list(found) == sorted(found, key=lambda tensor: tensor.start)
    assert all(tensor.start % 64 == 0 for tensor in found)


def test_a_checkpoint_of_model_and_optimizer_gives_paths() -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    found = find(saved({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}))
    assert found is not None
    assert {tensor.name for tensor in found} == {"model.weight", "model.bias"} | {
        f"optimizer.state.{number}.{kind}" for number in (0, 1) for kind in ("step", "exp_avg", "exp_avg_sq")
    }


def test_what_shares_or_does_not_fill_a_storage_keeps_the_name_of_its_entry() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    found = find(saved({"part": whole[1:], "turned": torch.ones(2, 3).T, "list": [torch.ones(5)], "": torch.ones(3)}))
    assert found is not None
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in found] == [
        ("data/0", "F32", (12,)),
        ("data/1", "F32", (6,)),
        ("data/2", "F32", (5,)),
        ("data/3", "F32", (3,)),
    ]
    tied = find(saved({"embed": whole, "head": whole}))
    assert tied is not None
    assert [tensor.name for tensor in tied] == ["embed"]
    named = find(saved({"data/1": torch.ones(2), "a\n": torch.ones(3), "x": torch.ones(1), "y": {"": torch.ones(1)}}))
    assert named is not None
    assert [tensor.name for tensor in named] == ["data/0", "data/1", "x", "y."]


def test_a_model_as_an_object_and_a_script_have_storages_too(recwarn: pytest.WarningsRecorder) -> None:
    model = torch.nn.Linear(4, 3)
    traced = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, torch.ones(1, 4)), traced)
    for data in (saved(model), traced.getvalue()):
        found = find(data)
        assert found is not None
        assert sorted((tensor.dtype, tensor.end - tensor.start) for tensor in found) == [("F32", 12), ("F32", 48)]


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("payload-was-run"),))


def test_a_hostile_pickle_is_read_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = zipped({"x/data.pkl": pickle.dumps({"a": Bomb()}), "x/byteorder": b"little", "x/data/0": bytes(100)})
    found = find(data)
    assert found is not None
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in found] == [("data/0", "U8", (100,))]
    assert not list(tmp_path.iterdir())


def persistent(*told: Any) -> bytes:
    """A pickle that mentions one storage, as torch does; `int` stands for torch's type of float storages."""
    parts = (b"ctorch\nFloatStorage\n" if value is int else pickle.dumps(value, 2)[2:-1] for value in told)
    return b"\x80\2(" + b"".join(parts) + b"tQ."


def test_a_pickle_that_lies_about_a_storage_is_not_believed() -> None:
    def dtype(*told: Any) -> str:
        found = find(zipped({"x/data.pkl": persistent(*told), "x/data/0": bytes(40)}))
        assert found is not None
        return found[0].dtype

    assert dtype("storage", int, "0", "cpu", 10) == "F32"
    for count in (11, 9, 0, -1, 1 << 61, 1 << 70, "10", None, (1,)):
        assert dtype("storage", int, "0", "cpu", count) == "U8"
    for told in [
        ("storage", int, 0, "cpu", 10),
        ("storage", int, "0", "cpu"),
        ("module", int, "0", "cpu", 10),
        (),
        (7,),
    ]:
        assert dtype(*told) == "U8"


def test_a_broken_or_endless_pickle_leaves_the_storages_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def dtypes() -> set[str]:
        return {tensor.dtype for tensor in find(PLAIN) or ()}

    assert "BF16" in dtypes()
    monkeypatch.setattr(limits, "PICKLE_OPCODES", 25)
    assert dtypes() == {"F32", "U8"}
    monkeypatch.setattr(limits, "PICKLE_BYTES", 20)
    assert dtypes() == {"U8"}


@pytest.mark.parametrize(
    "data",
    [b"", b".", b"0.", b"t.", b"a.", b"h\0.", b"\x93.", b"Q.", b"(((ttt.", b"R", b"I" + b"9" * 9999 + b"\n.", b"I-1\n.",
     b"S'\\z'\n.", b"V\\uzzzz\n.", b"\x8a\xff", b"X\xff\xff\xff\x7f", b"\x95" + b"\xff" * 8, b"(Ns.", b"}Ns.", b"}(Nu.",
     b"N" + b"q\0h\0\x86" * 5000 + b"q\0h\0\x93.", b"}q\0" + b"X\1\0\0\0ah\0s.", b"}" * 5000 + b".", b"}}}sb.",
     b"\x8b\xff\xff\xff\x7f", b"G123", b"cos\nsystem\nX\2\0\0\0ls\x85R."],
)  # fmt: skip
def test_nonsense_says_nothing(data: bytes) -> None:
    assert read_storages(data) == {}


def test_what_is_not_as_torch_writes_it_has_no_tensors() -> None:
    storage, told = {"x/data/0": bytes(40)}, {"x/data.pkl": b"N."}
    assert len(find(zipped({**told, **storage})) or ()) == 1
    for entries in (
        {},
        storage,
        told,
        {**told, "y/data/0": bytes(40)},
        {**told, "x/data/zero": bytes(40), "x/data/0/1": bytes(9), "x/data/" + "1" * 40: bytes(9)},
        {"data.pkl": b"N.", "data/0": bytes(40)},
        {**told, **storage, "x/byteorder": b"big"},
        {**told, **storage, "x/byteorder": bytes(100)},
    ):
        assert find(zipped(entries)) is None, entries
    assert find(saved(STATE, _use_new_zipfile_serialization=False)) is None


def compressed(info: zipfile.ZipInfo) -> None:
    if info.filename.endswith("1"):
        info.compress_type = zipfile.ZIP_DEFLATED


def test_compressed_entries_are_left_out() -> None:
    entries = {"x/data.pkl": b"N.", "x/data/0": bytes(40), "x/data/1": bytes(40), "x/data/2": bytes(40)}
    found = find(zipped(entries, change=compressed))
    assert found is not None
    assert [tensor.name for tensor in found] == ["data/0", "data/2"]


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    packed = struct.pack(form, *values)
    return data[:at] + packed + data[at + len(packed) :]


def test_archives_that_contradict_themselves_have_no_tensors() -> None:
    good = zipped({"x/data.pkl": b"N.", "x/data/0": b"0" * 40, "x/data/1": b"1" * 40})
    directory = [at for at in range(len(good)) if good[at : at + 4] == b"PK\1\2"]
    locals_ = [at for at in range(len(good)) if good[at : at + 4] == b"PK\3\4"]
    end = good.rindex(b"PK\5\6")
    assert len(find(good) or ()) == 2
    for what, data in {
        "encrypted": patched(good, directory[1] + 8, "<H", 1),
        "encrypted, as its own header says": patched(good, locals_[1] + 6, "<H", 1),
        "another method in its own header": patched(good, locals_[1] + 8, "<H", 8),
    }.items():
        assert [tensor.name for tensor in find(data) or ()] == ["data/1"], what
    for what, data in {
        "overlap": patched(good, directory[1] + 20, "<II", 45, 45),
        "two entries in one place": patched(good, directory[2] + 42, "<I", locals_[1]),
        "offset beyond the end": patched(good, directory[2] + 42, "<I", 1 << 30),
        "size beyond the end": patched(good, directory[2] + 20, "<II", 1 << 30, 1 << 30),
        "name longer than the file": patched(good, locals_[2] + 26, "<H", 65535),
        "no local header": patched(good, locals_[2], "<I", 0),
        "directory larger than the file": patched(good, end + 12, "<I", 1 << 30),
        "directory before the start": patched(good, end + 16, "<I", 1 << 30),
        "needs a newer zip": patched(good, directory[0] + 6, "<H", 99),
        "truncated": good[:-30],
        "directory only": good[directory[0] :],
        "no directory": good[: directory[0]],
    }.items():
        assert find(data) is None, what
    assert [tensor.name for tensor in find(b"junk" + good) or ()] == ["data/0", "data/1"]


def test_a_directory_over_the_limit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ZIP_DIRECTORY_BYTES", 400)
    assert find(PLAIN) is None


def test_files_over_4_gib_are_read_without_their_bytes() -> None:
    """zip64, as torch writes it for large models: a sparse archive whose middle is never asked for."""
    small = zipped({"x/data.pkl": b"N.", "x/data/0": b"", "x/data/1": b"1" * 40})
    size = 5 << 30
    second = max(
        at for at in range(len(small)) if small[at : at + 4] == b"PK\3\4" and small[at + 30 :][:7] == b"x/data/"
    )
    directory, end = small.index(b"PK\1\2"), small.rindex(b"PK\5\6")
    tail = small[second:directory]
    entries = small[directory:end]
    starts = [at for at in range(len(entries)) if entries[at : at + 4] == b"PK\1\2"]
    records = [entries[start:stop] for start, stop in zip(starts, [*starts[1:], len(entries)], strict=True)]
    huge = patched(records[1], 20, "<II", 0xFFFFFFFF, 0xFFFFFFFF) + struct.pack("<HHQQ", 1, 16, size, size)
    far = patched(records[2], 42, "<I", 0xFFFFFFFF) + struct.pack("<HHQ", 1, 8, second + size)
    listing = records[0] + patched(huge, 30, "<H", 20) + patched(far, 30, "<H", 12)
    at = second + size + len(tail)
    ending = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(listing), at)
    ending += struct.pack("<4sLQL", b"PK\6\7", 0, at + len(listing), 1)
    ending += patched(small[end:], 8, "<2H2L", 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    back = tail + listing + ending
    total = second + size + len(back)

    def read(start: int, end: int) -> bytes:
        if end <= second:
            return small[start:end]
        assert start >= second + size, "nobody needs the tensors' bytes"
        return back[start - second - size : end - second - size]

    found = find_storages(read, total)
    assert found is not None
    assert [(tensor.name, tensor.end - tensor.start) for tensor in found] == [("data/0", size), ("data/1", 40)]
    assert found[0].start == second

"""numpy's files: arrays are found where numpy put them; headers are matched, never evaluated."""

import io
import struct
import zipfile
from typing import Any

import numpy as np
import pytest

from llmos_cli.formats import limits
from llmos_cli.formats.codec import Words
from llmos_cli.formats.npy import find_array, find_arrays
from llmos_cli.formats.safetensors import TensorInfo


def find(data: bytes) -> TensorInfo | None:
    found = find_array(lambda start, end: data[start:end], len(data))
    return found[0] if found else None


def find_all(data: bytes) -> dict[str, TensorInfo]:
    found = find_arrays(lambda start, end: data[start:end], len(data)) or ()
    assert list(found) == sorted(found, key=lambda array: array.start)
    return {array.name: array for array in found}


def saved(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def file(header: str, data: bytes = b"", *, version: int = 1, length: int | None = None) -> bytes:
    size = len(header) if length is None else length
    return b"\x93NUMPY" + struct.pack("<BBH" if version == 1 else "<BBI", version, 0, size) + header.encode() + data


@pytest.mark.parametrize(
    ("array", "dtype"),
    [(np.arange(6, dtype="<f4").reshape(2, 3), "F32"), (np.ones((2, 3, 4), "<f2"), "F16"), (np.ones(3), "F64"),
     (np.asfortranarray(np.ones((2, 3))), "F64"), (np.arange(3), "I64"), (np.ones(3, np.int8), "I8"),
     (np.ones(3, np.uint16), "U16"), (np.ones(3, bool), "BOOL"), (np.ones(3, "<c8"), "C64"), (np.float32(2), "F32"),
     (np.zeros((0, 7)), "F64"), (np.array(["2026-01-01"], "M8[ns]"), "I64"), (np.zeros(3, "V2"), "BF16")],
)  # fmt: skip
def test_an_array_is_found_as_numpy_wrote_it(array: np.ndarray, dtype: str) -> None:
    data = saved(array)
    found = find(data)
    assert found is not None
    assert (found.name, found.dtype, found.shape) == ("array", dtype, array.shape)
    assert data[found.start : found.end] == array.tobytes("A")
    assert found.end == len(data)


def test_versions_2_and_3_and_the_headers_of_others_are_read() -> None:
    for version in (1, 2, 3):
        for header in (
            "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }          \n",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (3L,), }\n",
            "{'descr': '<f4', 'fortran_order': True, 'shape': (1, 3)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1,3), }\n",
        ):
            found = find(file(header, bytes(12), version=version))
            assert found is not None, header
            assert found.words == Words(4, True)
            assert found.end - found.start == 12


def test_objects_records_texts_and_other_byte_orders_are_no_tensors() -> None:
    for array in (
        np.array([{}, []], dtype=object),
        np.zeros(3, [("a", "<f4"), ("b", "<i2")]),
        np.array(["text"]),
        np.array([b"text"]),
        np.ones(3, ">f4"),
        np.ones(3, "V3"),
        np.ones(3, np.complex128),
        np.ones(3, np.longdouble),
    ):
        assert find(saved(array, allow_pickle=True)) is None, array.dtype


SOUND = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }\n"


@pytest.mark.parametrize(
    "data",
    [b"", b"\x93NUMPY", file(SOUND), file(SOUND, bytes(11)), file(SOUND, bytes(13)), file(SOUND, bytes(12), version=4),
     file(SOUND, bytes(12), version=0), file(SOUND, length=65535), file(SOUND, version=2, length=2**32 - 1),
     file("{'descr': '<f4', 'fortran_order': False, 'shape': (1" + ",1" * 40 + "), }\n", bytes(4)),
     file("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 18 + "," + "9" * 18 + "), }", bytes(4)),
     file("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",), }", bytes(4)),
     file("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -3), }", bytes(12)),
     file("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'x': __import__('os')}", bytes(12)),
     file("-" * 9000 + "1"), file("[" * 9000), file("(" * 9000), file(" " * 9999),
     file("{'descr': '<f4'" + " " * 9000)],
)  # fmt: skip
def test_what_is_not_as_numpy_writes_it_has_no_array(data: bytes) -> None:
    assert find(data) is None


def test_a_long_header_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(np.ones(3))
    assert find(data) is not None
    monkeypatch.setattr(limits, "NPY_HEADER_BYTES", 20)
    assert find(data) is None


def test_the_stored_arrays_of_an_npz_are_found() -> None:
    arrays = {"w": np.ones((3, 5), np.float32), "layers.0/b": np.arange(4, dtype=np.int32), "empty": np.zeros(0)}
    target = io.BytesIO()
    np.savez(target, allow_pickle=True, objects=np.array([{}], dtype=object), **arrays)  # type: ignore[arg-type]
    data = target.getvalue()
    found = find_all(data)
    assert {name: (array.shape, data[array.start : array.end]) for name, array in found.items()} == {
        name: (array.shape, array.tobytes()) for name, array in arrays.items()
    }


def test_compressed_twofold_and_oddly_named_arrays_are_left_out() -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("packed.npy", saved(np.ones(99)), zipfile.ZIP_DEFLATED)
        archive.writestr("a.npy", saved(np.ones(3)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", saved(np.ones(4)))
        for name in ("../x.npy", "\x1b[2J.npy", ".npy", "note.txt", "cut.npy"):
            archive.writestr(name, saved(np.ones(3))[: 99 if name == "cut.npy" else None])
    assert {name: array.shape for name, array in find_all(target.getvalue()).items()} == {"a": (3,), "note.txt": (3,)}
    target = io.BytesIO()
    np.savez_compressed(target, a=np.ones(3))
    assert find_all(target.getvalue()) == find_all(b"") == find_all(b"PK\3\4") == {}

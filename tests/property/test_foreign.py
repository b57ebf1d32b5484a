"""Files of other tools, spoiled in every way: the answer is tensors inside the file, nothing, or a clear refusal."""

import io
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.errors import Damaged, Unsafe
from llmos_cli.formats.pickled import read_storages
from llmos_cli.formats.safetensors import encode_header
from llmos_cli.formats.tensors import TensorInfo, find_tensors

# as torch.save writes {"a": torch.ones(10)}
PICKLE = (
    b"\x80\x02}q\0X\1\0\0\0aq\1ctorch._utils\n_rebuild_tensor_v2\nq\2((X\7\0\0\0storageq\3ctorch\nFloatStorage\nq\4"
    b"X\1\0\0\x000q\5X\3\0\0\0cpuq\6K\ntq\7QK\0K\n\x85q\x08K\1\x85q\t\x89ccollections\nOrderedDict\nq\n)Rq\x0b"
    b"tq\x0cRq\rs."
)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive(entries: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name, data in entries.items():
            target.writestr(zipfile.ZipInfo(name), data)
    return file.getvalue()


def gguf() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = text("general.alignment") + struct.pack("<II", 4, 64)
    keys += text("tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("") + text("bc")
    keys += text("nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ3B", 0, 3, 1, 2, 3)
    tensors = text("w") + struct.pack("<I2QIQ", 2, 32, 3, 2, 0) + text("b") + struct.pack("<IQIQ", 1, 7, 0, 64)
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 3) + keys + tensors
    return header + bytes(-len(header) % 64) + bytes(64 + 28)


SOUND = {
    "m.safetensors": encode_header([("a", "BF16", (2, 3)), ("b", "U8", (5,))], {"k": "v"}) + bytes(17),
    "m.gguf": gguf(),
    "m.pt": archive({"x/data.pkl": PICKLE, "x/byteorder": b"little", "x/data/0": bytes(40), "x/data/1": bytes(3)}),
    "m.npy": npy(np.ones((2, 3), np.float32)),
    "m.npz": archive({"a.npy": npy(np.ones(3)), "b.npy": npy(np.zeros((2, 2), np.int16)), "c.txt": b"x"}),
}
MAGIC = [b"", b"GGUF\3\0\0\0", b"\x93NUMPY\1\0", b"PK\3\4", b"\x20\0\0\0\0\0\0\0{"]


def find(name: str, data: bytes) -> tuple[TensorInfo, ...] | None:
    """What is found in a file, after checking that it can be so and that no more was read than there is to read."""
    taken = 0

    def read(start: int, end: int) -> bytes:
        nonlocal taken
        assert 0 <= start <= end <= len(data)
        taken += end - start
        return data[start:end]

    try:
        found = find_tensors(name, read, len(data), name)
    finally:
        assert taken <= 8 * len(data) + 4096
    at = 0
    for tensor in found or ():
        assert at <= tensor.start <= tensor.end <= len(data)
        at = tensor.end
        assert tensor.name.isprintable()
        assert tensor.words.width in (0, 1, 2, 4, 8)
    names = [tensor.name for tensor in found or ()]
    assert len(set(names)) == len(names)
    return found


def survives(name: str, data: bytes) -> None:
    try:
        find(name, data)
    except (Damaged, Unsafe) as exc:
        refusal = exc.message
    else:
        return
    assert name in refusal or "tensor" in refusal
    assert name.endswith((".safetensors", ".gguf"))


@pytest.mark.parametrize(
    ("name", "count"), [("m.safetensors", 2), ("m.gguf", 2), ("m.pt", 2), ("m.npy", 1), ("m.npz", 2)]
)
def test_the_sound_files_have_tensors(name: str, count: int) -> None:
    assert len(find(name, SOUND[name]) or ()) == count


@pytest.mark.parametrize("name", SOUND)
def test_every_truncation_and_every_flipped_bit(name: str) -> None:
    good = SOUND[name]
    for size in range(len(good)):
        survives(name, good[:size])
    for bit in range(8 * len(good)):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        survives(name, bytes(flipped))


@given(st.sampled_from(list(SOUND)), st.sampled_from(MAGIC), st.binary(max_size=400))
def test_arbitrary_bytes(name: str, magic: bytes, data: bytes) -> None:
    survives(name, magic + data)


NUMBERS = st.sampled_from([0, 1, 3, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
PIECES = NUMBERS.map(lambda number: number.to_bytes(8, "little")) | st.binary(min_size=1, max_size=4)


@given(st.sampled_from(list(SOUND)), st.lists(st.tuples(st.integers(0, 1000), PIECES), min_size=1, max_size=4))
def test_sound_files_with_odd_numbers_written_over_them(name: str, changes: list[tuple[int, bytes]]) -> None:
    data = SOUND[name]
    for place, piece in changes:
        at = place % len(data)
        data = data[:at] + piece + data[at + len(piece) :]
    survives(name, data)


@given(st.sampled_from(list(SOUND)), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_sound_files_with_parts_moved(name: str, first: int, second: int, third: int) -> None:
    data = SOUND[name]
    a, b, c = sorted(place % len(data) for place in (first, second, third))
    survives(name, data[:a] + data[b:c] + data[a:b] + data[c:])
    survives(name, data[:b] + data[a:])
    survives(name, data[:a] + data[b:])


@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from([PICKLE[at : at + 8] for at in range(len(PICKLE))])).map(b"".join)
)
def test_pickles_are_read_whatever_they_are(data: bytes) -> None:
    for storage in read_storages(data).values():
        assert storage.size >= 0

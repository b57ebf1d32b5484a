"""What the codecs promise in size, and that no payload can make them use more memory than was promised."""

import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import zstandard

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats import codec, limits
from llmos_cli.formats.codec import DELTA, OPAQUE, PLANES, RAW, ZSTD, Words
from llmos_cli.formats.limits import GiB, KiB, MiB

RANDOM = np.random.default_rng(2)
NORMAL = np.random.default_rng(0).standard_normal(MiB // 4).astype(np.float32) * 0.02


@pytest.mark.parametrize(
    ("plain", "words", "chosen", "ratio"),
    [
        ((NORMAL.view(np.uint32) >> 16).astype(np.uint16), Words(2, True), PLANES, 0.67),
        (NORMAL, Words(4, True), PLANES, 0.84),
        (NORMAL.astype(np.float16), Words(2, True), PLANES, 0.93),
        (NORMAL.astype(np.float64), Words(8, True), PLANES, 0.90),
        (np.arange(MiB // 8, dtype=np.int64) % 50_000, Words(8), PLANES, 0.30),
        (np.zeros(MiB, np.uint8), Words(1), PLANES, 0.001),
        (np.frombuffer(b"the cat sat on the mat. " * 9999, np.uint8), OPAQUE, ZSTD, 0.01),
        (np.frombuffer(np.random.default_rng(1).bytes(MiB), np.uint8), OPAQUE, RAW, 1.0),
        (np.frombuffer(np.random.default_rng(1).bytes(MiB), np.uint8), Words(1), RAW, 1.0),
        (np.zeros(63, np.uint8), OPAQUE, RAW, 1.0),
        (np.full(MiB, 0.1, np.float32), Words(4, True), PLANES, 0.0001),
        ((NORMAL.view(np.uint32) & 0xFFFF0000).astype(np.uint32), Words(4, True), PLANES, 0.36),
        (RANDOM.standard_normal(MiB // 4, np.float32).round() * np.float32(0.01), Words(4, True), ZSTD, 0.25),
        (np.where(RANDOM.random(MiB // 4) < 0.1, NORMAL, 0), Words(4, True), ZSTD, 0.16),
        (np.append(np.zeros(MiB // 8), NORMAL[: MiB // 8]).astype(np.float32), Words(4, True), PLANES, 0.42),
        (np.append(NORMAL[: MiB // 8], np.zeros(MiB // 8)).astype(np.float32), Words(4, True), PLANES, 0.42),
        (np.append(RANDOM.integers(0, 256, MiB // 2), np.zeros(MiB // 2)).astype(np.uint8), OPAQUE, ZSTD, 0.51),
        (np.full(4 * MiB // 2, 0x3F80, np.uint16), Words(2, True), PLANES, 200 / (4 * MiB)),
        (np.zeros(4 * MiB // 4, np.float32), Words(4, True), ZSTD, 200 / (4 * MiB)),
        (RANDOM.integers(-128, 128, MiB // 4).astype(np.int32), Words(4), PLANES, 0.28),
        (RANDOM.integers(-8, 8, MiB // 4).astype(np.int32), Words(4), PLANES, 0.15),
        (RANDOM.integers(-8, 8, MiB // 8), Words(8), PLANES, 0.08),
        (RANDOM.integers(0, 256, MiB // 8), Words(8), PLANES, 0.13),
        (np.full(4 * MiB // 8, 7), Words(8), ZSTD, 410 / (4 * MiB)),
    ],
    ids=[
        "bf16",
        "fp32",
        "fp16",
        "fp64",
        "int64",
        "zeros",
        "text",
        "noise",
        "quantized",
        "tiny",
        "constant",
        "bf16 in fp32",
        "int4 in fp32",
        "sparse",
        "padded in front",
        "padded behind",
        "half noise",
        "ones",
        "zeros in fp32",
        "int8 in int32",
        "int4 in int32",
        "int4 in int64",
        "uint8 in int64",
        "sevens in int64",
    ],
)
def test_each_kind_of_data_finds_its_codec(plain: np.ndarray, words: Words, chosen: int, ratio: float) -> None:
    encoded = codec.encode(memoryview(plain.tobytes()), words)
    assert encoded.codec == chosen
    assert encoded.size <= ratio * plain.nbytes


def test_the_first_plane_is_no_step() -> None:
    """It has none before it; of a payload that is right but for this nothing is read."""
    plane = zstandard.compress(bytes(100))
    entries = [struct.pack("<B3xI", method, len(plane)) for method in (1, 2)]
    out = bytearray(200)
    codec.decode(PLANES, 2, False, memoryview(b"".join([*entries, plane, plane])), memoryview(out))
    with pytest.raises(Damaged, match="method 2"):
        codec.decode(PLANES, 2, False, memoryview(b"".join([*entries[::-1], plane, plane])), memoryview(out))


def _zstd(size: int, blocks: bytes, *, window_log: int = 20) -> bytes:
    """A zstd frame by hand: its window, the content size it declares, and whatever blocks."""
    return struct.pack("<IBBQ", 0xFD2FB528, 0b11 << 6, (window_log - 10) << 3, size) + blocks


def _zeros(size: int, *, last: bool) -> bytes:
    """A block of `size` zero bytes that takes four."""
    return (size << 3 | 0b10 | last).to_bytes(3, "little") + b"\0"


BLOCK = 128 * KiB
BOMB = _zeros(BLOCK, last=False) * (GiB // BLOCK - 1) + _zeros(BLOCK, last=True)  # 32 KiB -> 1 GiB
BAD_FRAMES = {
    "declares 8 GiB": (_zstd(8 * GiB, BOMB), BLOCK),
    "declares 2^63-1": (_zstd(2**63 - 1, BOMB), BLOCK),
    "declares nothing": (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(BLOCK)), BLOCK),
    "1 GiB in 32 KiB": (_zstd(GiB, BOMB), 4 * MiB),
    "1 GiB, said to be 4 MiB": (_zstd(4 * MiB, BOMB), 4 * MiB),
    "says more than it holds": (_zstd(2 * BLOCK, _zeros(BLOCK, last=True)), 2 * BLOCK),
    "no last block": (_zstd(BLOCK, _zeros(BLOCK, last=False)), BLOCK),
    "no block": (_zstd(BLOCK, b""), BLOCK),
    "window 2^28": (_zstd(BLOCK, _zeros(BLOCK, last=True), window_log=28), BLOCK),
    "window 2^41": (_zstd(BLOCK, _zeros(BLOCK, last=True), window_log=41), BLOCK),
    "two frames": (zstandard.compress(b"x" * 9) * 2, 9),
    "skippable": (struct.pack("<II", 0x184D2A50, 4) + b"abcd", 4),
    "empty": (zstandard.compress(b"") + b"x", 0),
    "needs a dictionary": (struct.pack("<IBBBI", 0xFD2FB528, 0b10_1_00001, 7, 9, 9), 9),
    "noise": (b"\xde\xad\xbe\xef" * 9, 9),
    "nothing": (b"", 9),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_bad_zstd_frame_is_damaged(name: str) -> None:
    payload, size = BAD_FRAMES[name]
    with pytest.raises(Damaged):
        codec.decode(ZSTD, 0, False, memoryview(payload), memoryview(bytearray(size)))
    table = struct.pack("<B3xI", 1, len(payload))
    for codec_id in (PLANES, DELTA):
        with pytest.raises(Damaged):
            codec.decode(codec_id, 1, False, memoryview(table + payload), memoryview(bytearray(size)), memoryview(b"b"))


def test_the_handmade_frames_are_right_but_for_their_fault() -> None:
    out = bytearray(b"x" * BLOCK)
    frame = _zstd(BLOCK, _zeros(BLOCK, last=True), window_log=limits.ZSTD_WINDOW_LOG)
    codec.decode(ZSTD, 0, False, memoryview(frame), memoryview(out))
    assert out == bytes(BLOCK)


def test_no_bad_frame_uses_more_memory_than_its_header_promises() -> None:
    """In a process that may not grow by more than 64 MiB, no frame fails for want of memory."""
    script = textwrap.dedent(
        """
        import pathlib, resource
        from llmos_cli.errors import Damaged
        from llmos_cli.formats import codec
        codec.encode(memoryview(bytes(1 << 16)), codec.Words(2, True))
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)
        for name, (payload, size) in FRAMES.items():
            try:
                codec.decode(codec.ZSTD, 0, False, memoryview(payload), memoryview(bytearray(size)))
            except Damaged as exc:
                assert "memory" not in exc.message or "window 2^41" in name, (name, exc.message)
            else:
                raise SystemExit(f"{name} was accepted")
        """
    )
    script = f"FRAMES = {BAD_FRAMES!r}\n{script}"
    result = subprocess.run([sys.executable, "-"], input=script, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_unknown_codec_or_width_is_refused() -> None:
    with pytest.raises(UnknownVersion):
        codec.decode(5, 2, True, memoryview(b"xx"), memoryview(bytearray(2)))
    for width, rotated in ((0, False), (3, False), (16, True), (1, True)):
        for codec_id in (PLANES, DELTA):
            with pytest.raises(Damaged):
                codec.decode(
                    codec_id, width, rotated, memoryview(bytes(99)), memoryview(bytearray(2)), memoryview(b"b")
                )


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_planes_of_no_word_at_all_hold_only_the_tail(width: int) -> None:
    out = bytearray(b"x" * (width - 1))
    codec.decode(PLANES, width, width > 1, memoryview(bytes(8 * width) + b"1234567"[: width - 1]), memoryview(out))
    assert out == b"1234567"[: width - 1]


def test_every_flipped_bit_of_a_planes_table_is_damaged() -> None:
    plain = (b"\x11\x22\x33\x3c" * 40) + b"!"
    payload = bytearray(b"".join(map(bytes, codec.encode(memoryview(plain), Words(4, True)).parts)))
    for bit in range(8 * 8 * 4):
        payload[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            codec.decode(PLANES, 4, True, memoryview(payload), memoryview(bytearray(len(plain))))
        payload[bit // 8] ^= 1 << bit % 8

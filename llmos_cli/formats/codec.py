"""Lossless codecs of a chunk: raw, zstd, planes, delta. The one place that compresses.

`planes` is for tensors: the words of a chunk are split into byte planes, so that the bytes that repeat (the exponents
of floats) stand together; a float's word is first rotated left by one, which moves the sign out of the exponent's
byte (the same trick as ZipNN, arXiv:2411.05239, and DFloat11, arXiv:2504.11651). Each plane is stored raw or as a
zstd frame that is little more than a Huffman coder: no preset level is as small or as fast on exponents. Small integers
in wide words have their sign in several planes; such a plane is stored as what it is beyond the one before.

`delta` is planes of the differences to a base chunk (delta.py). Where its words are grouped, a zstd block
ends with every group, so that each has a Huffman table of its own.

`adopted` is no coding: such a frame says where in a file that the store has adopted the bytes lie (adopted.py).

Decoding never trusts a size: what a zstd frame declares is compared with what the frame header promises before
anything is allocated (python-zstandard ignores `max_output_size` when the frame declares its own).
"""

import itertools
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import zstandard

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats import limits
from llmos_cli.formats.ids import Buffer

RAW: Final = 0
ZSTD: Final = 1
PLANES: Final = 2
DELTA: Final = 3
ADOPTED: Final = 4
CODEC_NAMES: Final = {RAW: "raw", ZSTD: "zstd", PLANES: "planes", DELTA: "delta", ADOPTED: "adopted"}

_PLANE = struct.Struct("<B3xI")  # method, stored bytes
_RAW_PLANE: Final = 0
_ZSTD_PLANE: Final = 1
_STEP_PLANE: Final = 2  # as 1, of the plane's bytes XOR those of the plane before it
_WORTH: Final = 0.97  # a codec must save 3 % to be used
_MIN_BYTES: Final = 64  # below this nothing is tried
_SAMPLE_BYTES: Final = 16 * limits.KiB
_STRUCTURED: Final = 0.6  # floats that planes make smaller than this hold few values, or many zeros: zstd may see more
_GROUP_BYTES: Final = 4 * limits.KiB  # of a plane: smaller groups are not worth a Huffman table
_HUFFMAN = {"window_log": 19, "hash_log": 6, "min_match": 7, "target_length": 0}
_FEED_BYTES: Final = 1024


@dataclass(frozen=True)
class Words:
    """How a chunk's bytes are to be read: element width in bytes, and whether the elements are floats."""

    width: int = 1
    is_float: bool = False


OPAQUE: Final = Words(0)  # no tensor: text, JSON, anything


@dataclass(frozen=True)
class Encoded:
    """A payload in parts, to be written one after the other, and the codec fields of its frame header."""

    codec: int
    width: int
    rotated: bool
    parts: Sequence[Buffer]

    @property
    def size(self) -> int:
        return sum(len(part) for part in self.parts)


class _Contexts(threading.local):
    """zstd contexts are not thread-safe and cost memory to make: one set a thread."""

    def __init__(self) -> None:
        huffman = zstandard.ZstdCompressionParameters(strategy=zstandard.STRATEGY_FAST, **_HUFFMAN)
        self.huffman = zstandard.ZstdCompressor(compression_params=huffman)
        self.text = zstandard.ZstdCompressor(level=3)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << limits.ZSTD_WINDOW_LOG)


_contexts = _Contexts()


def encode(plain: memoryview, words: Words, room: memoryview | None = None) -> Encoded:
    """Pick the smallest codec by probing, never larger than raw; `plain` is bytes ("B" format).

    The parts may be views of `plain` and of `room`, memory as long as `plain` that a caller can use again and again.
    """
    raw = Encoded(RAW, 0, False, (plain,))
    if len(plain) < _MIN_BYTES:
        return raw
    if words.width == 0:
        return _zstd_or(raw, plain)
    if words.width > 1 and not words.is_float and not _planes_beat_zstd(plain, words):
        return _zstd_or(raw, plain)
    candidate = _planes(plain, words, room)
    if words.is_float and candidate.size < _STRUCTURED * len(plain) and not _planes_beat_zstd(plain, words):
        candidate = min(candidate, _zstd_or(raw, plain), key=lambda encoded: encoded.size)
    return candidate if candidate.size < _WORTH * len(plain) else raw


def encode_delta(plain: memoryview, base: Buffer, words: Words, room: memoryview | None = None) -> Encoded:
    """`plain` as its difference to `base`, whatever that comes to: whether it pays is for the caller to compare.

    The base may be shorter or longer. Parts and `room` are as for `encode`.
    """
    from llmos_cli.formats.native import subtract

    width = words.width or 1
    whole = len(plain) // width * width
    grouped = words.is_float and width > 1
    planes, ends = subtract(plain[:whole], base, width, grouped, room or memoryview(bytearray(whole)))
    return _packed(DELTA, width, grouped, planes, plain[whole:], _cuts(ends))


def decode(
    codec: int, width: int, rotated: bool, payload: memoryview, out: memoryview, base: memoryview | None = None
) -> None:
    """Fill `out`, whose length is the promised plain size, from a payload; raises Damaged unless they fit exactly.

    A delta needs `base`, the plain bytes of its base, which `out` does not overlap.
    """
    if codec == RAW:
        if len(payload) != len(out):
            raise Damaged(f"a raw payload has {len(payload)} bytes, its frame promises {len(out)}")
        out[:] = payload
    elif codec == ZSTD:
        out[:] = _decompress(payload, len(out))
    elif codec == PLANES:
        from llmos_cli.formats.native import merge

        planes, whole = _unpacked(width, rotated, payload, out)
        merge(planes, rotated, whole)
    elif codec == DELTA:
        from llmos_cli.formats.native import add

        if base is None:
            raise ValueError("a delta cannot be read without its base")
        planes, whole = _unpacked(width, rotated, payload, out)
        add(planes, base, rotated, whole)
    elif codec == ADOPTED:
        raise Damaged(
            "its bytes lie in a file that a store has adopted, not here",
            hint="push from that store to a remote: the bytes themselves are sent",
        )
    else:
        raise UnknownVersion(f"codec {codec} is unknown", hint="use a newer llmos")


def read_zstd(source: Iterable[bytes]) -> Iterator[bytes]:
    """What a foreign zstd stream of any number of frames holds, in blocks of bounded size; raises Damaged.

    It is fed in small steps, because four bytes may stand for 128 KiB.
    """
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << limits.ZSTD_WINDOW_LOG)
    frame = unpacker.decompressobj()
    whole = True
    try:
        for data in source:
            for at in range(0, len(data), _FEED_BYTES):
                left = data[at : at + _FEED_BYTES]
                while left:
                    if whole and frame.eof:
                        frame = unpacker.decompressobj()
                    if out := frame.decompress(left):
                        yield out
                    whole = frame.eof
                    left = frame.unused_data if whole else b""
    except zstandard.ZstdError as exc:
        raise Damaged(str(exc)) from exc
    if not whole:
        raise Damaged("it ends in the middle of a zstd frame")


def _zstd_or(raw: Encoded, plain: memoryview) -> Encoded:
    if not _pays(_contexts.text, plain):
        return raw
    packed = _contexts.text.compress(plain)
    return Encoded(ZSTD, 0, False, (packed,)) if len(packed) < _WORTH * len(plain) else raw


def _planes_beat_zstd(plain: memoryview, words: Words) -> bool:
    size = min(len(plain), 64 * limits.KiB) // words.width * words.width
    return _planes(plain[:size], words).size < len(_contexts.text.compress(plain[:size]))


def _planes(plain: memoryview, words: Words, room: memoryview | None = None) -> Encoded:
    from llmos_cli.formats.native import split

    whole = len(plain) // words.width * words.width
    rotated = words.is_float and words.width > 1
    planes = split(plain[:whole], words.width, rotated, room or memoryview(bytearray(whole)))
    return _packed(PLANES, words.width, rotated, planes, plain[whole:])


def _packed(
    codec: int, width: int, rotated: bool, planes: Sequence[memoryview], tail: memoryview, cuts: Sequence[int] = ()
) -> Encoded:
    table: list[Buffer] = []
    parts: list[Buffer] = []
    for number, plane in enumerate(planes):
        method, packed = _ZSTD_PLANE, _pack_plane(plane, cuts)
        if codec == PLANES and not rotated and number:  # integers: a sign that is spread over planes is told once
            packed_step = _pack_step(planes[number - 1], plane, packed)
            method, packed = (_STEP_PLANE, packed_step) if packed_step else (method, packed)
        table.append(_PLANE.pack(method if packed else _RAW_PLANE, len(packed or plane)))
        parts.append(packed or plane)
    return Encoded(codec, width, rotated, (b"".join(table), *parts, tail))


def _pack_step(before: memoryview, plane: memoryview, packed: bytes | None) -> bytes | None:
    """What a plane is beyond the one before it, or None unless that is smaller than the plane itself."""
    from llmos_cli.formats.native import step

    size = min(len(plane), 4 * _SAMPLE_BYTES)
    least = _contexts.huffman.compress(plane[:size]) if packed else plane[:size]
    if len(_contexts.huffman.compress(step(before[:size], plane[:size]))) > _WORTH * len(least):
        return None
    smaller = _pack_plane(step(before, plane), ())
    return smaller if smaller and len(smaller) < len(packed or plane) else None


def _cuts(ends: Sequence[int]) -> list[int]:
    """Where zstd blocks end, so that none holds parts of two large groups; not the last one's end."""
    cuts, start, last = [], 0, ends[-1] if ends else 0
    for end in ends:
        if end - start >= _GROUP_BYTES <= last - end:
            cuts.append(end)
            start = end
    return cuts


def _pack_plane(plane: memoryview, cuts: Sequence[int]) -> bytes | None:
    """One zstd frame, or None if that is not worth it."""
    huffman = _contexts.huffman
    if not _pays(huffman, plane):
        return None
    if cuts:
        packer = huffman.compressobj(size=len(plane))
        pieces = []
        for start, end in itertools.pairwise((0, *cuts)):
            pieces += [packer.compress(plane[start:end]), packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
        packed = b"".join((*pieces, packer.compress(plane[cuts[-1] :]), packer.flush()))
    else:
        packed = huffman.compress(plane)
    return packed if len(packed) < _WORTH * len(plane) else None


def _pays(packer: zstandard.ZstdCompressor, data: memoryview) -> bool:
    """Whether compressing may save something, by samples from four places: a part may be zeros, the rest noise."""
    return len(data) <= 4 * _SAMPLE_BYTES or any(
        len(packer.compress(sample)) <= _WORTH * len(sample)
        for sample in (data[len(data) * eighth // 8 :][:_SAMPLE_BYTES] for eighth in (1, 3, 5, 7))
    )


def _unpacked(width: int, rotated: bool, payload: memoryview, out: memoryview) -> tuple[Sequence[Buffer], memoryview]:
    """The planes of a payload, one byte of every whole word of `out`, and these words; the tail is put in its place."""
    from llmos_cli.formats.native import WIDTHS, step

    if width not in WIDTHS or (rotated and width == 1):
        raise Damaged(f"planes of width {width} are unknown")
    count = len(out) // width
    tail = len(out) - count * width
    at = _PLANE.size * width
    if len(payload) < at + tail:
        raise Damaged("a planes payload is shorter than its table")
    planes: list[Buffer] = []
    for plane in range(width):
        method, size = _PLANE.unpack_from(payload, _PLANE.size * plane)
        data = payload[at : at + size]
        at += size
        if method not in (_RAW_PLANE, _ZSTD_PLANE, _STEP_PLANE)[: 3 if plane else 2] or any(
            payload[_PLANE.size * plane + 1 : _PLANE.size * plane + 4]
        ):
            raise Damaged(f"plane method {method} is unknown")
        if len(data) != size or (method == _RAW_PLANE and size != count):
            raise Damaged("a plane does not have the size its frame promises")
        unpacked = _decompress(data, count) if method else data
        planes.append(step(planes[-1], unpacked) if method == _STEP_PLANE else unpacked)
    if len(payload) != at + tail:
        raise Damaged("a planes payload has bytes after its last plane")
    out[count * width :] = payload[at:]
    return planes, out[: count * width]


def _decompress(data: memoryview, size: int) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != size or not size:
            raise Damaged(f"a zstd frame declares {frame.content_size} bytes, its header promises {size}")
        if frame.window_size > max(size, 1 << limits.ZSTD_WINDOW_LOG):
            raise Damaged(f"a zstd frame asks for a window of {frame.window_size} bytes")
        plain = _contexts.decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise Damaged(f"a zstd frame cannot be read: {exc}") from exc
    except MemoryError as exc:
        raise Damaged("a zstd frame asks for more memory than there is") from exc
    if len(plain) != size:
        raise Damaged(f"a zstd frame gave {len(plain)} bytes instead of {size}")
    return plain

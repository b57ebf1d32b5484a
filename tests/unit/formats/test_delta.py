"""What the delta codec promises in size, and that kernels are there when they pay and never missed."""

import functools
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import llmos_cli
from llmos_cli.formats import codec, kernels, loops, native
from llmos_cli.formats.codec import DELTA, Words
from llmos_cli.formats.limits import KiB, MiB

RANDOM = np.random.default_rng(0)
VALUES = RANDOM.standard_normal(MiB, dtype=np.float32) * np.float32(0.02)
STEP = RANDOM.standard_normal(MiB, dtype=np.float32) * np.float32(5e-5)


def bf16(values: np.ndarray) -> bytes:
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def encoded(plain: bytes, base: bytes, words: Words) -> tuple[codec.Encoded, bytes]:
    one = codec.encode_delta(memoryview(plain), base, words)
    return one, b"".join(map(bytes, one.parts))


@pytest.fixture(params=[False, True], ids=["numpy", "compiled"])
def grouping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {width: native.find_kernels(width) if request.param else None for width in (2, 4)}
    assert not request.param or all(made.values())
    ready = native._Ready()
    ready._kernels, ready._final = made, set(made)
    monkeypatch.setattr(native, "_ready", ready)


@pytest.mark.parametrize(
    ("width", "plain", "base", "grouped", "ungrouped"),
    [(2, bf16(VALUES + STEP), bf16(VALUES), 0.16, 0.19), (4, (VALUES + STEP).tobytes(), VALUES.tobytes(), 0.575, 0.60)],
    ids=["bf16", "fp32"],
)
def test_a_small_step_of_every_weight_is_a_small_delta(
    width: int, plain: bytes, base: bytes, grouped: float, ungrouped: float, grouping: None
) -> None:
    sizes = [encoded(plain, base, Words(width, is_float))[0].size / len(plain) for is_float in (True, False)]
    assert sizes[0] < grouped < sizes[1] < ungrouped


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_chunk_that_hardly_changed_is_tiny(width: int) -> None:
    base = VALUES.tobytes()
    plain = bytearray(base)
    for at in range(0, len(plain), 64 * KiB):
        plain[at] ^= 1
    for words in (Words(width), Words(width, True)):
        assert encoded(bytes(plain), base, words)[0].size < 3 * KiB
        assert encoded(base, base, words)[0].size < 2 * KiB


def test_integers_that_moved_a_little_are_small() -> None:
    base = RANDOM.integers(-100, 100, MiB).astype(np.int8)
    plain = base + RANDOM.integers(-1, 2, MiB).astype(np.int8)
    assert encoded(plain.tobytes(), base.tobytes(), Words(1))[0].size < 0.23 * MiB
    assert codec.encode(memoryview(plain.tobytes()), Words(1)).size > 0.9 * MiB


def test_any_place_in_memory_will_do(grouping: None) -> None:
    """Buffers that start at odd addresses, read-only ones, a room that is longer than the chunk."""
    plain, base = bf16(VALUES + STEP)[: 100 * KiB + 1], bf16(VALUES)[: 90 * KiB + 1]
    whole, shifted = encoded(plain, base, Words(2, True))[1], bytearray(b"x" + base)
    for offset in (0, 1, 3):
        source = memoryview(bytearray(offset) + plain)[offset:]
        room, out = memoryview(bytearray(len(plain) + 9))[offset:], memoryview(bytearray(len(plain) + offset))[offset:]
        one = codec.encode_delta(source, memoryview(shifted)[1:], Words(2, True), room)
        assert b"".join(map(bytes, one.parts)) == whole
        codec.decode(DELTA, 2, True, memoryview(b"x" + whole)[1:], out, memoryview(shifted)[1:])
        assert out == plain
    assert shifted == b"x" + base


def test_threads_do_not_disturb_each_other(grouping: None) -> None:
    def trip(number: int) -> bool:
        width = 2 if number % 2 else 4
        base, plain = (RANDOM_BYTES[at : at + 150_000 + number] for at in (0, 7 * number))
        one, payload = encoded(plain, base, Words(width, True))
        out = bytearray(len(plain))
        codec.decode(DELTA, width, one.rotated, memoryview(payload), memoryview(out), base)
        return out == plain

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(trip, range(40)))


RANDOM_BYTES = RANDOM.bytes(200_000)


def test_a_delta_without_its_base_and_planes_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="without its base"):
        codec.decode(DELTA, 2, True, memoryview(bytes(16)), memoryview(bytearray(0)))
    for sizes in ((4, 3), (4, 5), (3, 3)):
        with pytest.raises(ValueError, match="every word"):
            native.add([bytes(size) for size in sizes], bytes(8), True, memoryview(bytearray(8)))


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.find_kernels(2), "they are kept from here on"
    monkeypatch.setattr(loops, "compile_loops", functools.cache(loops.compile_loops))  # it says the same every time
    linked = kernels._linked
    for name, idle in [("subtract", lambda *_: [0] * 256), ("add", lambda *_: None), ("merge", lambda *_: None)]:
        monkeypatch.setattr(kernels, "_linked", lambda *what, wrong={name: idle}: replace(linked(*what), **wrong))
        assert native.find_kernels(2) is None


def test_without_numba_numpy_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("numba", "llvmlite", "llvmlite.binding"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(native, "_COMPILE_FROM", 0)
    ready = native._Ready()
    monkeypatch.setattr(native, "_ready", ready)
    plain, base = RANDOM_BYTES[:9999], RANDOM_BYTES[5:9999]
    _, payload = encoded(plain, base, Words(2, True))
    out = bytearray(len(plain))
    codec.decode(DELTA, 2, True, memoryview(payload), memoryview(out), base)
    assert out == plain
    assert ready._kernels == {2: None}


def run(script: str, folder: Path | None = None, **environment: str) -> list[str]:
    """What a fresh interpreter prints that takes every warning for an error, and modules from `folder` first."""
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        cwd=folder,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_code_that_is_kept_is_used_at_once_without_numpy_or_numba(tmp_path: Path) -> None:
    assert native.find_kernels(2), "they are kept from here on"
    script = """
        import sys
        from llmos_cli.formats import codec, native
        plain, out = memoryview(bytes(range(256)) * 512), memoryview(bytearray(1 << 17))
        def known():
            print(native._ready._kernels.get(2) is not None, *(name in sys.modules for name in ("numpy", "numba")))
        def trip(words, base=None):
            one = codec.encode(plain, words) if base is None else codec.encode_delta(plain, base, words)
            codec.decode(one.codec, one.width, one.rotated, memoryview(b"".join(one.parts)), out, base)
            assert out == plain
        trip(codec.OPAQUE), trip(codec.Words(1)), known()
        trip(codec.Words(2, True)), trip(codec.Words(2, True), memoryview(b"base")), known()
        native.find_kernels = None
        trip(codec.Words(2, True)), trip(codec.Words(8)), known()
    """
    assert run(script, tmp_path) == ["False", "False", "False", "True", "False", "False", "True", "True", "False"]


def test_nothing_is_compiled_before_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(native, "find_kernels", lambda _, *, compiling: asked.append(compiling))
    ready = native._Ready()
    for cost in (1, native._COMPILE_FROM / 2, native._COMPILE_FROM / 2, native._COMPILE_FROM):
        assert ready.get(2, cost) is None
    assert asked == [False, True]


COMPILE = """
    import functools, pathlib
    from llmos_cli.formats import loops, native
    loops.compile_loops = functools.cache(loops.compile_loops)  # numba's part, which says the same every time
    print(native.__file__, native.find_kernels(4) is not None)
    kept = list(pathlib.Path(native.__file__).parent.glob("__pycache__/*.kernels"))
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    print(len(kept), native.find_kernels(4, compiling=False) is not None, native.find_kernels(4) is not None)
    print(native.find_kernels(4, compiling=False) is not None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("writable", [False, True], ids=["nowhere to write", "damaged"])
def test_code_that_cannot_be_kept_or_read_back_costs_only_time(tmp_path: Path, writable: bool) -> None:
    copy = tmp_path / "llmos_cli"
    shutil.copytree(Path(llmos_cli.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if not writable:
        (copy / "formats" / "__pycache__").write_bytes(b"in the way of a folder")
    nowhere = str(tmp_path / "llmos_cli" / "py.typed" / "nowhere")
    found = run(COMPILE, tmp_path, HOME=nowhere, XDG_CACHE_HOME=nowhere)
    file = str(copy / "formats" / "native.py")
    assert found == [file, "True", *(("1", "False", "True", "True") if writable else ("0", "False", "True", "False"))]

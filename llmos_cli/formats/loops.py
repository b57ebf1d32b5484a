"""The loops over the words of a chunk, written for numba, which compiles them once for a machine (see kernels.py).

They index by what they count in the base themselves, never by a payload: as long as nobody changes the base
meanwhile, every access is within its array. Words come as arrays of the machine's own integers, planes one after the
other (when written) or as a table of their addresses (when read). None is bound to the GIL.

`count(base, number, table, keys, seen)`: where the words of each key begin in each lane, as 256 numbers a lane.
`scatter(words, base, number, table, room, keys, changes, planes)`: the differences, grouped; afterwards `table` says
where each key ends. `gather(planes, base, number, table, room, keys, changes, words)`: the inverse.
`split(words, number, planes)`: words turned left by one. `merge(planes, number, words)`: the inverse.
"""

from typing import Any, Final

import numpy as np

NAMES: Final = ("count", "scatter", "gather", "split", "merge")


def compile_loops(width: int, lanes: int, block: int) -> list[tuple[str, str]]:
    """The name and the LLVM code of each of NAMES, for words of `width` bytes. Takes seconds.

    `lanes` are the parts of a chunk that a loop works on by turns, so that it need not wait for its own counters;
    `block` is how many words of a lane fit in the nearest cache.
    """
    return [(function.native_name, function.inspect_llvm()) for function in _compiled(width, lanes, block)]


def _compiled(width: int, lanes: int, block: int) -> list[Any]:
    """The kernels as numba's C functions."""
    from numba import carray, cfunc, config, types

    if config.DISABLE_JIT:
        raise RuntimeError("numba is told not to compile")
    kind: Any = np.dtype(f"u{width}").type
    u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
    zero, one, eight, top, exponent = (kind(bits) for bits in (0, 1, 8, 8 * width - 1, 8 * width - 9))

    # What a loop names is compiled into it. Unsigned indices need no check for negative ones, and constants of the
    # word's type keep the loops in vectors.
    def count(base_at: Any, words: Any, table_at: Any, keys_at: Any, seen_at: Any) -> None:
        base, table = carray(base_at, (words,)), carray(table_at, (256 * lanes,))
        keys, seen = carray(keys_at, (lanes * block,)), carray(seen_at, (1 << 16,))
        quarter = words // lanes
        table[:] = u32(0)
        for lane in range(lanes):
            part = base[lane * quarter :] if lane == lanes - 1 else base[lane * quarter : (lane + 1) * quarter]
            counts = table[256 * lane : 256 * lane + 256]
            seen[:] = u32(0)  # two keys at once: half as many counters to wait for
            for at in range(0, len(part), block):
                size = min(block, len(part) - at)
                for i in range(u64(size)):
                    keys[i] = u8(part[u64(at) + i] >> exponent)
                for i in range(u64(size // 2)):
                    seen[u16(keys[u64(2) * i]) | (u16(keys[u64(2) * i + u64(1)]) << u16(8))] += u32(1)
                if size % 2:
                    counts[keys[size - 1]] += u32(1)
            for first in range(256):
                row = seen[256 * first : 256 * first + 256]
                total = u32(0)
                for second in range(u64(256)):
                    counts[second] += row[second]
                    total += row[second]
                counts[first] += total
        place = u32(0)
        for key in range(256):
            for lane in range(lanes):
                found = table[256 * lane + key]
                table[256 * lane + key] = place
                place += found

    def scatter(
        words_at: Any, base_at: Any, number: Any, table_at: Any, room_at: Any, keys_at: Any, changes_at: Any, to: Any
    ) -> None:
        words, base, room = carray(words_at, (number,)), carray(base_at, (number,)), carray(room_at, (number,))
        table, planes = carray(table_at, (256 * lanes,)), carray(to, (width * number,))
        keys, changes = carray(keys_at, (lanes * block,)), carray(changes_at, (lanes * block,))
        quarter = number // lanes
        for at in range(0, quarter, block):
            size = min(block, quarter - at)
            for lane in range(lanes):
                start = lane * quarter + at
                new, old = words[start : start + size], base[start : start + size]
                lane_keys, lane_changes = keys[lane * block :], changes[lane * block :]
                for i in range(u64(size)):
                    change = kind(new[i] - old[i])
                    lane_changes[i] = kind(change << one) ^ kind(zero - kind(change >> top))
                    lane_keys[i] = u8(old[i] >> exponent)
            for i in range(u64(size)):
                for lane in range(lanes):
                    j = u64(lane * block) + i
                    key = u64(lane * 256) + u64(keys[j])
                    place = table[key]
                    table[key] = place + u32(1)
                    room[place] = changes[j]
        for i in range(u64(lanes * quarter), u64(number)):
            key = u64((lanes - 1) * 256) + u64(u8(base[i] >> exponent))
            place = table[key]
            table[key] = place + u32(1)
            change = kind(words[i] - base[i])
            room[place] = kind(change << one) ^ kind(zero - kind(change >> top))
        for which in range(width):
            shift = kind(8 * (width - 1 - which))
            plane = planes[which * number : (which + 1) * number]
            for i in range(u64(number)):
                plane[i] = u8(room[i] >> shift)

    def gather(
        planes: Any, base_at: Any, number: Any, table_at: Any, room_at: Any, keys_at: Any, changes_at: Any, to: Any
    ) -> None:
        base, room, out = carray(base_at, (number,)), carray(room_at, (number,)), carray(to, (number,))
        table = carray(table_at, (256 * lanes,))
        keys, changes = carray(keys_at, (lanes * block,)), carray(changes_at, (lanes * block,))
        for which in range(width):
            plane = carray(planes[which], (number,))
            for i in range(u64(number)):
                room[i] = kind(room[i] << eight) | kind(plane[i]) if which else kind(plane[i])
        quarter = number // lanes
        for at in range(0, quarter, block):
            size = min(block, quarter - at)
            for lane in range(lanes):
                old, lane_keys = base[lane * quarter + at : lane * quarter + at + size], keys[lane * block :]
                for i in range(u64(size)):
                    lane_keys[i] = u8(old[i] >> exponent)
            for i in range(u64(size)):
                for lane in range(lanes):
                    j = u64(lane * block) + i
                    key = u64(lane * 256) + u64(keys[j])
                    place = table[key]
                    table[key] = place + u32(1)
                    changes[j] = room[place]
            for lane in range(lanes):
                start = lane * quarter + at
                new, old = out[start : start + size], base[start : start + size]
                lane_changes = changes[lane * block :]
                for i in range(u64(size)):
                    change = lane_changes[i]
                    new[i] = kind(old[i] + kind(kind(change >> one) ^ kind(zero - kind(change & one))))
        for i in range(u64(lanes * quarter), u64(number)):
            key = u64((lanes - 1) * 256) + u64(u8(base[i] >> exponent))
            place = table[key]
            table[key] = place + u32(1)
            change = room[place]
            out[i] = kind(base[i] + kind(kind(change >> one) ^ kind(zero - kind(change & one))))

    def split(words_at: Any, number: Any, to: Any) -> None:
        words, planes = carray(words_at, (number,)), carray(to, (width * number,))
        for at in range(0, number, block):
            size = min(block, number - at)
            part = words[at : at + size]
            for which in range(width):
                shift = kind(8 * (width - 1 - which))
                plane = planes[which * number + at : which * number + at + size]
                for i in range(u64(size)):
                    plane[i] = u8(kind(kind(part[i] << one) | kind(part[i] >> top)) >> shift)

    def merge(planes: Any, number: Any, to: Any) -> None:
        out = carray(to, (number,))
        for at in range(0, number, block):
            size = min(block, number - at)
            part = out[at : at + size]
            for which in range(width):
                plane = carray(planes[which], (number,))[at : at + size]
                for i in range(u64(size)):
                    part[i] = kind(part[i] << eight) | kind(plane[i]) if which else kind(plane[i])
            for i in range(u64(size)):
                part[i] = kind(part[i] >> one) | kind(part[i] << top)

    word = types.CPointer(types.Integer.from_bitwidth(8 * width, signed=False))
    byte, long, number = types.CPointer(types.uint8), types.CPointer(types.uint32), types.int64
    arguments = {
        "count": (word, number, long, byte, long),
        "scatter": (word, word, number, long, word, byte, word, byte),
        "gather": (types.CPointer(byte), word, number, long, word, byte, word, word),
        "split": (word, number, byte),
        "merge": (types.CPointer(byte), number, word),
    }
    functions = {"count": count, "scatter": scatter, "gather": gather, "split": split, "merge": merge}
    return [cfunc(types.void(*arguments[name]), error_model="numpy")(functions[name]) for name in NAMES]

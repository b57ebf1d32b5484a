"""Blocks of rows held in memory, as stored: what was asked for last, and what is expected next. No torch.

A block is about one chunk. It is read by a few threads straight into its place, at once where it is needed and ahead of
time where a caller says what comes next, so that decoding, or a remote, is waited for as little as possible. The memory
is bounded whatever the dataset's size. An error is raised by whoever needs the block, not by who expected it.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Final

import numpy as np

from llmos_cli.store.disk.forks import ForkLock

Read = Callable[[int, int, np.ndarray], None]  # of a shard, from a row on, as many rows as the array has
_NOWHERE: Final = 1 << 60
_THREADS: Final = max(4, min(os.cpu_count() or 1, 16))


class Readers:
    """The threads that read blocks, begun when first needed; a forked child begins its own."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def submit(self, function: Callable[..., None], *numbers: int) -> Future[None]:
        if self._pool is None or not self.are_ours:
            self._pool, self._process = ThreadPoolExecutor(_THREADS, "rows"), os.getpid()
        return self._pool.submit(function, *numbers)

    @property
    def are_ours(self) -> bool:
        """Whether they were begun by this process, not by the one that it was forked from."""
        return self._process == os.getpid()

    def close(self) -> None:
        """Drop what has not begun."""
        if self._pool is not None and self.are_ours:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None


class Blocks:
    """One tensor of rows, `counts` of them in each shard, numbered through all shards. Safe from several threads."""

    def __init__(
        self, counts: np.ndarray, row: tuple[int, np.dtype], block_bytes: int, cache_bytes: int, read: Read, by: Readers
    ) -> None:
        length, dtype = row
        height = max(1, block_bytes // (length * dtype.itemsize))
        numbers = -(-counts // height)
        total = int(numbers.sum())
        within = np.arange(total) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        self._shard = np.repeat(np.arange(len(counts)), numbers)
        self._first = within * height  # the row of its shard that a block begins with
        self._rows = np.minimum(height, counts[self._shard] - self._first)
        starts = np.repeat(np.cumsum(counts) - counts, numbers) + self._first
        self._starts = np.append(starts, counts.sum())  # of all rows; none lie before the first or behind the last
        room = max(1, min(total, cache_bytes // (height * length * dtype.itemsize)))
        self.held = np.empty((room * height, length), dtype)  # memory comes as it is written to
        self._height = height
        self._move = np.full(total + 2, _NOWHERE)  # from a row's number to its place in `held`; of block n at n + 1
        self._used = np.zeros(total + 2, np.int64)
        self._block = np.full(room, -1)  # in each place
        self._busy = np.zeros(room, bool)  # places that are being read into
        self._clock = self._told = 0
        self._loading: dict[int, Future[None]] = {}
        self._read, self._readers = read, by
        self._lock = ForkLock()

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number, as stored; raises IndexError for one that is not there."""
        blocks = self._starts.searchsorted(rows, "right")
        while True:
            with self._lock:
                self._clock += 1
                self._used[blocks] = self._clock
                try:
                    taken: np.ndarray = self.held.take(rows + self._move[blocks], axis=0)
                    return taken
                except IndexError:  # some of it is not held
                    needed = self._needed(blocks)
                    if len(needed) > len(self._block):
                        break
                    waiting = self._begin(needed, self._clock)
                    others = [] if waiting else list(self._loading.values())  # which take all the room
            for future in waiting:
                future.result()
            wait(others, return_when=FIRST_COMPLETED)
        half = len(rows) // 2
        return np.concatenate([self.take(rows[:half]), self.take(rows[half:])])

    def expect(self, rows: np.ndarray) -> None:
        """Begin to read what these rows lie in, the first first, as far as there is room beside what has been used
        since the last call."""
        needed = self._needed(self._starts.searchsorted(rows, "right"))
        with self._lock:
            told, self._told = self._told, self._clock + 1
            self._clock += 1
            self._used[np.array(needed, np.int64) + 1] = self._clock
            self._begin(needed, told)

    def _needed(self, blocks: np.ndarray) -> list[int]:
        """The numbers of blocks, each once."""
        found = list(dict.fromkeys((blocks - 1).tolist()))
        if found and not 0 <= min(found) <= max(found) < len(self._shard):
            raise IndexError("a row is outside the rows of this dataset")
        return found

    def _begin(self, blocks: Sequence[int], since: int) -> list[Future[None]]:
        """Read blocks in places of what has not been used since `since`; what is already on its way is waited for."""
        if self._loading and not self._readers.are_ours:
            self._forget_loading()
        waiting = []
        for block in blocks:
            if self._move[block + 1] < _NOWHERE:
                continue
            if block not in self._loading:
                place = self._make_room(since)
                if place is None:
                    break
                self._block[place], self._busy[place] = block, True
                self._loading[block] = self._readers.submit(self._load, block, place)
            waiting.append(self._loading[block])
        return waiting

    def _make_room(self, since: int) -> int | None:
        free = self._block < 0
        if free.any():
            return int(free.argmax())
        used = np.where(self._busy, since, self._used[self._block + 1])
        place = int(used.argmin())
        if used[place] >= since:
            return None
        self._move[self._block[place] + 1] = _NOWHERE
        self._block[place] = -1
        return place

    def _load(self, block: int, place: int) -> None:
        at = place * self._height
        try:
            self._read(int(self._shard[block]), int(self._first[block]), self.held[at : at + int(self._rows[block])])
        except BaseException:
            with self._lock:
                self._block[place], self._busy[place] = -1, False
                self._loading.pop(block, None)
            raise
        with self._lock:
            self._move[block + 1], self._busy[place] = at - self._starts[block], False
            self._used[block + 1] = max(self._used[block + 1], self._clock)
            self._loading.pop(block, None)

    def _forget_loading(self) -> None:
        """In a forked child: the threads that were reading are in the parent."""
        self._block[self._busy] = -1
        self._busy[:] = False
        self._loading.clear()

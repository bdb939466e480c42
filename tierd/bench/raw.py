"""The ceiling of the nvme tier: preadv and pwritev with O_DIRECT on a preallocated file, a list of blocks a thread."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from tierd.clock import monotonic_seconds
from tierd.tiers.io.posix import open_direct

Blocks = NDArray[np.int64]


class RawFile:
    """A file of `blocks` blocks, each written once already, and memory for `batch` of them; a context manager.

    `direct` is False where the file system refuses O_DIRECT and the page cache is measured instead.
    """

    def __init__(self, path: Path, blocks: int, block_bytes: int, batch: int, threads: int) -> None:
        self._blocks, self._block_bytes, self._batch, self._threads = blocks, block_bytes, batch, threads
        path.touch(0o600)
        self._descriptor, self.direct = open_direct(path)
        os.posix_fallocate(self._descriptor, 0, blocks * block_bytes)
        memory = mmap.mmap(-1, batch * block_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # huge pages make one long transfer out of a block; tierd's slots have them too
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(memory)
        rows = np.frombuffer(self._memory, np.uint64)
        rows[:] = np.arange(len(rows), dtype=np.uint64)
        self._pool = ThreadPoolExecutor(threads)
        self._next = 0
        for _ in range(-(-blocks // batch)):
            self.write()

    def __enter__(self) -> RawFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        os.close(self._descriptor)

    def write(self) -> float:
        """Seconds to write one batch."""
        return self._move(os.pwritev)

    def read(self) -> float:
        """Seconds to read one batch, of other blocks than the last call's."""
        return self._move(os.preadv)

    def _move(self, call: Callable[[int, list[memoryview], int], int]) -> float:
        """The next `batch` blocks of the file, around its end to its start: consecutive ones to each thread."""
        places = (self._next + np.arange(self._batch)) % self._blocks
        self._next = (self._next + self._batch) % self._blocks
        shares = np.array_split(np.arange(self._batch), self._threads)

        def move(rows: Blocks) -> None:
            for row, place in zip(rows.tolist(), places[rows].tolist(), strict=True):
                part = self._memory[row * self._block_bytes : (row + 1) * self._block_bytes]
                offset = place * self._block_bytes
                while len(part):
                    moved = call(self._descriptor, [part], offset)
                    part, offset = part[moved:], offset + moved

        started = monotonic_seconds()
        list(self._pool.map(move, shares))
        return monotonic_seconds() - started

"""The ceiling of the nvme tier: preadv and pwritev with O_DIRECT on a preallocated file, a list of blocks a thread."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.clock import monotonic_seconds
from tierd.tiers.io.posix import open_direct

Blocks = NDArray[Any]
"""uint8 `[blocks, block_bytes]`, page aligned."""


class RawFile:
    """A preallocated file of `blocks` blocks, each of them written once; a context manager.

    `direct` is False where the file system refuses O_DIRECT and the page cache is measured instead.
    """

    def __init__(self, path: Path, blocks: int, filling: Blocks, threads: int) -> None:
        self._blocks, self._threads = blocks, threads
        path.touch(0o600)
        self._descriptor, self.direct = open_direct(path)
        os.posix_fallocate(self._descriptor, 0, blocks * filling.shape[1])
        self._pool = ThreadPoolExecutor(threads)
        self._next = 0
        for _ in range(-(-blocks // len(filling))):
            self.write(filling)

    def __enter__(self) -> RawFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()
        os.close(self._descriptor)

    def write(self, memory: Blocks) -> float:
        """Seconds to write these blocks to the next places of the file, around its end to its start."""
        return self._move(os.pwritev, memory)

    def read(self, memory: Blocks) -> float:
        """Seconds to fill this memory from the next places of the file."""
        return self._move(os.preadv, memory)

    def _move(self, call: Callable[[int, list[memoryview], int], int], memory: Blocks) -> float:
        """Consecutive blocks to each thread, one call after the other."""
        places = (self._next + np.arange(len(memory))) % self._blocks
        self._next = (self._next + len(memory)) % self._blocks

        def move(rows: NDArray[np.intp]) -> None:
            for row, place in zip(rows.tolist(), places[rows].tolist(), strict=True):
                part, offset = memoryview(memory[row]), place * memory.shape[1]
                while len(part):
                    moved = call(self._descriptor, [part], offset)
                    part, offset = part[moved:], offset + moved

        shares = np.array_split(np.arange(len(memory)), self._threads)
        started = monotonic_seconds()
        list(self._pool.map(move, shares))
        return monotonic_seconds() - started


def in_huge_pages(blocks: int, block_bytes: int) -> Blocks:
    """Memory with all its pages present, huge ones if the kernel has them: they make one long transfer of a block."""
    memory = mmap.mmap(-1, blocks * block_bytes, mmap.MAP_ANONYMOUS | mmap.MAP_PRIVATE)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    rows = np.frombuffer(memory, np.uint8).reshape(blocks, block_bytes)
    rows[:] = 1
    return rows

"""Copies between slots of mapped segments and pages of an engine's pool.

A pool copies its own pages, since only it knows where their bytes are; here is what makes a copy safe. A block that was
read counts only if its state word said READY before the copy and is the same word, generation included, after it.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Mapping as Map
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tierd.client.mapping import Mapping
from tierd.errors import Closed, Invalid

READY = np.uint64(0xC3)
CODE_MASK = np.uint64(0xFF)
MEMCPY = ctypes.CDLL(None).memcpy
MEMCPY.argtypes, MEMCPY.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], None

SPLIT_BYTES_MIN = 1 << 20
"""Less than this per thread is not worth a second thread."""

Pages = NDArray[np.int64]


class Pool(Protocol):
    """An engine's pages, `len` of them, each with room for one block of `block_bytes`, and the way to copy them.

    Slots are uint8 `[slots, slot_bytes]` and contiguous; a block is at the start of its slot. Both copies are called from
    several threads for different pages at once, and should release the GIL.
    """

    block_bytes: int

    def __len__(self) -> int: ...

    def fill(self, pages: Pages, slots: NDArray[np.uint8], indexes: Pages) -> None:
        """Copy slot `indexes[i]` to page `pages[i]`, for every i."""

    def drain(self, pages: Pages, slots: NDArray[np.uint8], indexes: Pages) -> None:
        """Copy page `pages[i]` to slot `indexes[i]`, for every i."""


class Rows:
    """Pages that are the rows of an array, uint8 `[pages, block_bytes]`.

    All addresses are computed at once and given to `memcpy` without a Python statement per block; each call releases the GIL.
    """

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array
        self.block_bytes: int = array.shape[1]

    def __len__(self) -> int:
        return len(self.array)

    def fill(self, pages: Pages, slots: NDArray[np.uint8], indexes: Pages) -> None:
        """Copy slots to rows."""
        self._copy(addresses(self.array, pages), addresses(slots, indexes))

    def drain(self, pages: Pages, slots: NDArray[np.uint8], indexes: Pages) -> None:
        """Copy rows to slots."""
        self._copy(addresses(slots, indexes), addresses(self.array, pages))

    def _copy(self, to: list[int], of: list[int]) -> None:
        deque(map(MEMCPY, to, of, repeat(self.block_bytes)), maxlen=0)


def addresses(rows: NDArray[np.uint8], indexes: Pages) -> list[int]:
    """Where some rows begin."""
    found: list[int] = (rows.ctypes.data + indexes * rows.strides[0]).tolist()
    return found


@dataclass(frozen=True, eq=False)
class Part:
    """The blocks `first` to `last` of a list that lie in one segment, at the slots `indexes`."""

    mapping: Mapping
    indexes: NDArray[np.int64]
    first: int
    last: int

    def states(self) -> NDArray[np.uint64]:
        """The state words as they are now."""
        return self.mapping.state[self.indexes]


def locate(slots: NDArray[np.int32], slots_per_segment: int, mappings: Map[int, Mapping]) -> list[Part]:
    """Where slot numbers are, in their order; raises Closed for one in no segment that the daemon attached."""
    ordinals, indexes = np.divmod(slots.astype(np.int64), slots_per_segment)
    bounds = [0, *((ordinals[1:] != ordinals[:-1]).nonzero()[0] + 1).tolist(), len(slots)]
    parts = []
    for first, last in pairwise(bounds):
        mapping = mappings.get(int(ordinals[first]))
        if mapping is None or len(mapping.slots) < slots_per_segment:
            raise Closed(f"the daemon named slot {slots[first]}, which is in no segment that it attached")
        parts.append(Part(mapping, indexes[first:last], first, last))
    return parts


class Copier:
    """Copies blocks of `block_bytes` with up to `threads` threads, the caller's included."""

    def __init__(self, block_bytes: int, threads: int) -> None:
        self.block_bytes = block_bytes
        self.threads = threads
        self._helpers = ThreadPoolExecutor(threads - 1, "tierd-copy") if threads > 1 else None

    def load(self, parts: list[Part], pool: Pool, pages: Pages) -> int:
        """Copy slots to pages of a pool; returns how many leading blocks are what the daemon said they are.

        Pages behind them may have been written to.
        """
        before = states(parts)
        ready = leading((before & CODE_MASK) == READY)
        self._copy(parts, pool, pages[:ready], loading=True)
        return leading(states(parts)[:ready] == before[:ready])

    def store(self, parts: list[Part], pool: Pool, pages: Pages) -> None:
        """Copy pages of a pool to slots."""
        self._copy(parts, pool, pages, loading=False)

    def close(self) -> None:
        """End the helper threads."""
        if self._helpers:
            self._helpers.shutdown()

    def _copy(self, parts: list[Part], pool: Pool, pages: Pages, loading: bool) -> None:
        blocks = len(pages)
        shares = min(self.threads, blocks, max(1, blocks * self.block_bytes // SPLIT_BYTES_MIN))
        bounds = [blocks * share // shares for share in range(shares + 1)] if blocks else [0, 0]
        futures: list[Future[None]] = []
        try:
            for first, last in pairwise(bounds[1:]):
                assert self._helpers is not None
                futures.append(self._helpers.submit(self._copy_share, parts, pool, pages, first, last, loading))
            self._copy_share(parts, pool, pages, 0, bounds[1], loading)
        finally:
            wait(futures)  # whatever happens, no copy is left behind
        for future in futures:
            future.result()

    def _copy_share(self, parts: list[Part], pool: Pool, pages: Pages, first: int, last: int, loading: bool) -> None:
        for part in parts:
            start, end = max(first, part.first), min(last, part.last)
            if start < end:
                copy = pool.fill if loading else pool.drain
                copy(pages[start:end], part.mapping.slots, part.indexes[start - part.first : end - part.first])


def states(parts: list[Part]) -> NDArray[np.uint64]:
    """The state words of all blocks of a list."""
    return np.concatenate([part.states() for part in parts])


def leading(good: NDArray[np.bool_]) -> int:
    """How many values are true before the first that is not."""
    return len(good) if good.all() else int(good.argmin())


def as_pool(pool: Pool | NDArray[np.generic], block_bytes: int, writable: bool) -> Pool:
    """A pool as it is, or the rows of an array without a copy; raises Invalid when it is neither."""
    if not isinstance(pool, np.ndarray):
        if getattr(pool, "block_bytes", None) != block_bytes:
            raise Invalid(f"pool must be a numpy array or a Pool of blocks of {block_bytes} bytes, not {pool!r:.80}")
        return pool
    if pool.ndim < 1 or not pool.flags.c_contiguous:
        raise Invalid(f"pool must be a C-contiguous array [pages, ...], not one of shape {pool.shape}, strides {pool.strides}")
    if pool.nbytes != len(pool) * block_bytes:
        page_bytes = pool.nbytes // len(pool) if len(pool) else 0
        raise Invalid(f"pool has pages of {page_bytes} bytes, the layout's blocks have {block_bytes}: give one block a page")
    if writable and not pool.flags.writeable:
        raise Invalid("pool is read-only: load needs one to write to")
    return Rows(pool.reshape(-1).view(np.uint8).reshape(len(pool), block_bytes))


def as_pages(pages: ArrayLike, pool: Pool) -> Pages:
    """Page numbers as int64 `[blocks]`; raises Invalid when one is not in the pool."""
    array = np.asarray(pages)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise Invalid(f"pages must be a list of page numbers, not {array.dtype} of shape {array.shape}")
    if array.size and not (array.min() >= 0 and array.max() < len(pool)):
        raise Invalid(f"pages are from {array.min()} to {array.max()}, the pool has {len(pool)}")
    return array.astype(np.int64)

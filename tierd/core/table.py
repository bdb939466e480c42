"""A compact hash table from 32-bit hash fragments to node ids, for entering a chain in its middle.

Every block of a tree needs an entry, so an entry is eight bytes in two numpy arrays: buckets of eight cells, two candidate
buckets per key, no relocation ("two choices" hashing: Azar, Broder, Karlin, Upfal 1999; bucketized as in Fan et al., MemC3,
2013). A removed cell is simply empty: no tombstones, so a full turn-over of the cache costs no rebuild. A fragment is not an identity:
callers verify every candidate against the full hash.

All methods work on arrays of keys; nothing here runs a Python statement per key.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CELLS = 8
LOAD_MAX = 0.75
BUCKETS_MIN = 64


class Table:
    """Multimap from uint32 fragments to int32 owners (> 0); at most `LOAD_MAX` full, grows by doubling.

    A cell is `owner << 32 | fragment` (uint64, 0: empty); `_free` has one bit per empty cell of a bucket.
    """

    def __init__(self) -> None:
        self.size = 0
        self.spilled: dict[int, list[int]] = {}
        self._allocate(BUCKETS_MIN)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self._cells.nbytes + self._free.nbytes + self._winner.nbytes

    def candidates(self, fragment: int) -> list[int]:
        """Owners that may hold the key; usually one, sometimes none, rarely more."""
        first, second = ((fragment * factor & _WORD) >> self._shift for factor in (_FIRST, _SECOND))
        found = []
        for bucket in (first, second) if first != second else (first,):
            cells = self._cells[bucket * CELLS : (bucket + 1) * CELLS].tolist()
            found += [cell >> 32 for cell in cells if cell & _LOW == fragment and cell]
        return found + self.spilled.get(fragment, []) if self.spilled else found

    def add(self, fragments: NDArray[np.uint32], owners: NDArray[np.int32]) -> None:
        """Enter n keys (uint32[n]) with their owners (int32[n])."""
        while self.size + len(fragments) > LOAD_MAX * len(self._cells):
            self._grow()
        self.size += len(fragments)
        self._place(_cells(fragments, owners))

    def drop(self, fragments: NDArray[np.uint32], owners: NDArray[np.int32]) -> None:
        """Remove n (key, owner) pairs that were added before."""
        self.size -= len(fragments)
        spots, found = self._locate(_cells(fragments, owners))
        self._cells[spots] = 0
        np.bitwise_or.at(self._free, spots // CELLS, _BIT[spots % CELLS])
        for at in np.flatnonzero(~found) if len(spots) < len(found) else ():
            self._unspill(int(fragments[at]), int(owners[at]))

    def reassign(self, fragments: NDArray[np.uint32], old: int, new: int) -> None:
        """Give keys of owner `old` to owner `new`."""
        spots, found = self._locate(_cells(fragments, np.int32(old)))
        self._cells[spots] = _cells(fragments[found], np.int32(new))
        for at in np.flatnonzero(~found) if len(spots) < len(found) else ():
            self._unspill(int(fragments[at]), old)
            self.spilled.setdefault(int(fragments[at]), []).append(new)

    def _allocate(self, buckets: int) -> None:
        self._shift = 64 - (buckets.bit_length() - 1)
        self._cells = np.zeros(buckets * CELLS, np.uint64)
        self._free = np.full(buckets, 0xFF, np.uint8)
        self._winner = np.zeros(buckets, np.int32)

    def _bucket(self, cells: NDArray[np.uint64], factor: int) -> NDArray[np.int64]:
        return (((cells & np.uint64(_LOW)) * np.uint64(factor)) >> np.uint64(self._shift)).view(np.int64)

    def _place(self, cells: NDArray[np.uint64]) -> None:
        """Each round places one key per bucket; keys that lost their bucket try again in the next round."""
        while len(cells):
            bucket, other = self._bucket(cells, _FIRST), self._bucket(cells, _SECOND)
            free, free_other = self._free[bucket], self._free[other]
            better = _ONES[free_other] > _ONES[free]
            bucket, free = np.where(better, other, bucket), np.where(better, free_other, free)
            order = np.arange(len(cells), dtype=np.int32)
            self._winner[bucket] = order
            wins = self._winner[bucket] == order
            if not free.all():
                for cell in cells[free == 0].tolist():
                    self.spilled.setdefault(cell & _LOW, []).append(cell >> 32)
                cells, bucket, wins, free = cells[free != 0], bucket[free != 0], wins[free != 0], free[free != 0]
            placed, left = bucket[wins], free[wins]
            self._cells[placed * CELLS + _LOWEST[left]] = cells[wins]
            self._free[placed] = left & (left - np.uint8(1))
            cells = cells[~wins]

    def _locate(self, cells: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(place of each key that is found, found per key)."""
        rows = self._cells.reshape(-1, CELLS)
        bucket = self._bucket(cells, _FIRST)
        match = rows[bucket] == cells[:, None]
        cell = match.argmax(1)
        found = match[np.arange(len(cells)), cell]
        rest = np.flatnonzero(~found)
        if len(rest):
            bucket[rest] = self._bucket(cells[rest], _SECOND)
            match = rows[bucket[rest]] == cells[rest, None]
            cell[rest] = match.argmax(1)
            found[rest] = match[np.arange(len(rest)), cell[rest]]
        spots = bucket * CELLS + cell
        return (spots if found.all() else spots[found]), found

    def _unspill(self, fragment: int, owner: int) -> None:
        owners = self.spilled.get(fragment, [])
        if owner in owners:  # absent only when two keys of one owner share a fragment: the first removal took the cell
            owners.remove(owner)
            if not owners:
                del self.spilled[fragment]

    def _grow(self) -> None:
        cells = self._cells[self._cells != 0]
        spilled, self.spilled = self.spilled, {}
        self._allocate(len(self._free) * 2)
        self._place(cells)
        for fragment, owners in spilled.items():
            self._place(_cells(np.full(len(owners), fragment, np.uint32), np.array(owners, np.int32)))


_WORD, _LOW = (1 << 64) - 1, (1 << 32) - 1
_FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_BIT = (1 << np.arange(CELLS)).astype(np.uint8)
_ONES = np.array([mask.bit_count() for mask in range(256)], np.uint8)
_LOWEST = np.array([(mask & -mask).bit_length() - 1 if mask else 0 for mask in range(256)], np.int64)


def _cells(fragments: NDArray[np.uint32], owners: NDArray[np.int32] | np.int32) -> NDArray[np.uint64]:
    return (owners.astype(np.uint64) << np.uint64(32)) | fragments


def fragments_of(hashes: bytes | memoryview) -> NDArray[np.uint32]:
    """The table's key of each packed 32-byte hash (uint32[n]): its third 32-bit word."""
    return np.frombuffer(hashes, np.uint32).reshape(-1, 8)[:, 2].copy()

"""A compact hash table from 32-bit hash fragments to node ids, for entering a chain in its middle.

Every block of a tree needs an entry, so an entry is eight bytes in two numpy arrays: buckets of eight cells, two
candidate buckets per key, no relocation ("two choices" hashing: Azar, Broder, Karlin, Upfal 1999; bucketized as in Fan
et al., MemC3, 2013). A removed cell is simply empty: no tombstones, so a full turn-over of the cache costs no rebuild.

A fragment is the upper half of a multilinear hash with secret keys (Lemire and Kaser, "Strongly universal string
hashing is fast", 2014): block hashes are named by clients, and nobody who does not know the keys can make many of them
meet in one bucket. A fragment is not an identity: callers verify every candidate against the full hash.

All methods work on arrays of keys; nothing here runs a Python statement per key, but for the few that found no cell.
"""

from __future__ import annotations

from operator import mul
from struct import Struct

import numpy as np
from numpy.typing import NDArray

CELLS = 8
LOAD_MAX = 0.75
BUCKETS_MIN = 64


class Table:
    """Multimap from uint32 fragments to int32 owners (> 0); at most `LOAD_MAX` full, grows by doubling.

    A cell is `owner << 32 | fragment` (uint64, 0: empty); `_free` has one bit per empty cell of a bucket. `seed` makes
    the secret keys.
    """

    def __init__(self, seed: int = 0) -> None:
        self.size = 0
        self.spilled: dict[int, list[int]] = {}
        """Keys both of whose buckets were full, with their owners."""
        self._keys = np.random.default_rng(seed).integers(1 << 64, size=8, dtype=np.uint64)
        self._key_words: list[int] = self._keys.tolist()
        self._allocate(BUCKETS_MIN)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self._cells.nbytes + self._free.nbytes + self._winner.nbytes

    def fragments(self, hashes: bytes) -> NDArray[np.uint32]:
        """The table's key of each packed 32-byte hash (uint32[n])."""
        words = np.frombuffer(hashes, np.uint32).reshape(-1, 8).astype(np.uint64)
        return ((words @ self._keys) >> _HALF).astype(np.uint32)

    def candidates(self, block: bytes) -> list[int]:
        """Owners that may hold one block hash; usually one, sometimes none, rarely more."""
        fragment = (sum(map(mul, _WORDS.unpack(block), self._key_words)) & _WORD) >> 32
        shift = int(self._shift)
        first, second = (fragment * int(_FIRST) & _WORD) >> shift, (fragment * int(_SECOND) & _WORD) >> shift
        found = []
        for bucket in (first, second) if first != second else (first,):
            cells = self._cells[bucket * CELLS : (bucket + 1) * CELLS].tolist()
            found += [cell >> 32 for cell in cells if cell & _LOW == fragment and cell]
        return found + self.spilled.get(fragment, []) if self.spilled else found

    def contains(self, fragments: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Which keys (uint32[n]) are in the table, whoever owns them."""
        keys, halves = fragments.astype(np.uint64), self._cells.view(np.uint32)[::2].reshape(-1, CELLS)
        rows = halves[np.concatenate((self._bucket(keys, _FIRST), self._bucket(keys, _SECOND)))]
        found: NDArray[np.bool_] = (rows.reshape(2, -1, CELLS) == fragments[:, None]).any((0, 2))
        for key in self.spilled:
            found |= fragments == key
        return found

    def add(self, fragments: NDArray[np.uint32], owners: NDArray[np.int32]) -> None:
        """Enter n keys (uint32[n]) with their owners (int32[n])."""
        while self.size + len(fragments) > LOAD_MAX * len(self._cells):
            self._grow()
        self.size += len(fragments)
        self._place(_cells(fragments, owners))

    def drop(self, fragments: NDArray[np.uint32], owners: NDArray[np.int32]) -> None:
        """Remove n (key, owner) pairs that were added before."""
        self.size -= len(fragments)
        emptied = self._exchange(_cells(fragments, owners), None)
        np.bitwise_or.at(self._free, emptied // CELLS, _BIT[emptied % CELLS])

    def reassign(self, fragments: NDArray[np.uint32], old: int, new: int) -> None:
        """Give keys of owner `old` to owner `new`."""
        self._exchange(_cells(fragments, np.int32(old)), new)

    def check(self) -> None:
        """Raise AssertionError if the accounting is off."""
        empty = (self._cells.reshape(-1, CELLS) == 0) * _BIT
        assert (empty.sum(1, dtype=np.uint8) == self._free).all(), "the bits of free cells are wrong"
        held = int((self._cells != 0).sum()) + sum(map(len, self.spilled.values()))
        assert held == self.size, f"the table holds {held} keys and counts {self.size}"

    def _allocate(self, buckets: int) -> None:
        self._shift = np.uint64(64 - (buckets.bit_length() - 1))
        self._cells = np.zeros(buckets * CELLS, np.uint64)
        self._free = np.full(buckets, 0xFF, np.uint8)
        self._winner = np.zeros(buckets, np.int32)

    def _bucket(self, keys: NDArray[np.uint64], factor: np.uint64) -> NDArray[np.int64]:
        return ((keys * factor) >> self._shift).view(np.int64)

    def _place(self, cells: NDArray[np.uint64]) -> None:
        """Each round places one key per bucket; keys that lost their bucket try again in the next round."""
        while len(cells):
            keys = cells & _KEY
            bucket, other = self._bucket(keys, _FIRST), self._bucket(keys, _SECOND)
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

    def _exchange(self, cells: NDArray[np.uint64], owner: int | None) -> NDArray[np.int64]:
        """Give cells to another owner, or empty them; returns their places (those that had spilled have none).

        Two keys of one owner may share a fragment, so there may be equal cells: each round takes one place of each.
        """
        places: list[NDArray[np.int64]] = []
        while len(cells):
            spots, found = self._locate(cells)
            if len(spots) < len(cells):
                for lost in cells[~found].tolist():
                    self._respill(lost & _LOW, lost >> 32, owner)
                cells = cells[found]
            order = np.arange(len(cells), dtype=np.uint64)
            self._cells[spots] = order
            wins = self._cells[spots] == order
            self._cells[spots] = 0 if owner is None else (cells & _KEY) | np.uint64(owner << 32)
            if wins.all():
                return np.concatenate((*places, spots))
            places.append(spots[wins])
            cells = cells[~wins]
        return np.concatenate((*places, np.empty(0, np.int64)))

    def _locate(self, cells: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(place of each cell that is found, found per cell)."""
        rows = self._cells.reshape(-1, CELLS)
        bucket = self._bucket(cells & _KEY, _FIRST)
        match = rows[bucket] == cells[:, None]
        cell = match.argmax(1)
        found = match[np.arange(len(cells)), cell]
        rest = np.flatnonzero(~found)
        if len(rest):
            bucket[rest] = self._bucket(cells[rest] & _KEY, _SECOND)
            match = rows[bucket[rest]] == cells[rest, None]
            cell[rest] = match.argmax(1)
            found[rest] = match[np.arange(len(rest)), cell[rest]]
        spots = bucket * CELLS + cell
        return (spots if found.all() else spots[found]), found

    def _respill(self, fragment: int, old: int, new: int | None) -> None:
        owners = self.spilled[fragment]
        owners.remove(old)
        if new is not None:
            owners.append(new)
        elif not owners:
            del self.spilled[fragment]

    def _grow(self) -> None:
        cells = self._cells[self._cells != 0]
        spilled, self.spilled = self.spilled, {}
        self._allocate(len(self._free) * 2)
        self._place(cells)
        for fragment, owners in spilled.items():
            self._place(_cells(np.full(len(owners), fragment, np.uint32), np.array(owners, np.int32)))


_WORD, _LOW, _HALF, _KEY = (1 << 64) - 1, (1 << 32) - 1, np.uint64(32), np.uint64((1 << 32) - 1)
_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_WORDS = Struct("<8I")
_BIT = (1 << np.arange(CELLS)).astype(np.uint8)
_ONES = np.array([mask.bit_count() for mask in range(256)], np.uint8)
_LOWEST = np.array([(mask & -mask).bit_length() - 1 if mask else 0 for mask in range(256)], np.int64)


def _cells(fragments: NDArray[np.uint32], owners: NDArray[np.int32] | np.int32) -> NDArray[np.uint64]:
    return (owners.astype(np.uint64) << _HALF) | fragments

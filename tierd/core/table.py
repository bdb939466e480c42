"""A compact hash table from 32-bit hash fragments to node ids, for entering a chain in its middle.

Every block of a tree needs an entry, so an entry is eight bytes in two numpy arrays: buckets of eight cells, two
candidate buckets per key, no relocation ("two choices" hashing: Azar, Broder, Karlin, Upfal 1999; bucketized as in Fan
et al., MemC3, 2013). A removed cell is simply empty: no tombstones, so a full turn-over of the cache costs no rebuild.

A fragment is the upper half of a multilinear hash with secret keys (Lemire and Kaser, "Strongly universal string
hashing is fast", 2014): block hashes are named by clients, and nobody who does not know the keys can make many of them
meet in one bucket. A fragment is not an identity: callers verify every candidate against the full hash.

All methods work on arrays of keys; nothing here runs a Python statement per key, but for the few that found no cell.
Arrays are read by `take`, which costs half of what an index does.
"""

from __future__ import annotations

from operator import mul
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES
from tierd.core.plan import all_true

Cells = NDArray[np.int32]
"""Places in the table, one per key."""

CELLS = 8
LOAD_MAX = 0.75
BUCKETS_MIN = 64


class Table:
    """Multimap from uint32 fragments to int32 owners (> 0); at most `LOAD_MAX` full, enlarged by doubling.

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

    def has_room(self, count: int) -> bool:
        """Whether `count` more keys may be added; if not, `enlarge` comes first."""
        return self.size + count <= LOAD_MAX * len(self._cells)

    def enlarge(self, count: int) -> None:
        """Forget everything and make room for `count` keys more than there were."""
        buckets = len(self._free)
        while self.size + count > LOAD_MAX * buckets * CELLS:
            buckets *= 2
        self.size, self.spilled = 0, {}
        self._allocate(buckets)

    def add(self, fragments: NDArray[np.uint32], owners: NDArray[np.int32] | np.int32) -> Cells:
        """Enter n keys (uint32[n]) with their owners (int32[n], or one for all); returns where they are.

        The places (int32[n], -1: spilled) are good until the next `enlarge`, and are how keys are named from then on.
        """
        assert self.has_room(len(fragments)), "the table is full: enlarge it before"
        self.size += len(fragments)
        return self._place((owners.astype(np.uint64) << _HALF) | fragments)

    def drop(self, dropped: list[tuple[Cells, bytes, int]]) -> None:
        """Remove keys that were added for these hashes, each run of them for one owner."""
        if not dropped:
            return
        places = np.concatenate([self._respill(*run, None) for run in dropped]).astype(np.int64)
        self.size -= sum([len(run[0]) for run in dropped])
        self._cells[places] = 0
        np.bitwise_or.at(self._free, places // CELLS, _BIT[places % CELLS])

    def reassign(self, places: Cells, hashes: bytes, old: int, new: int) -> None:
        """Give keys of owner `old` to owner `new`."""
        places = self._respill(places, hashes, old, new).astype(np.int64)
        self._cells[places] = (self._cells.take(places) & _KEY) | np.uint64(new << 32)

    def check(self) -> None:
        """Raise AssertionError if the accounting is off."""
        empty = (self._cells.reshape(-1, CELLS) == 0) * _BIT
        assert (empty.sum(1, dtype=np.uint8) == self._free).all(), "the bits of free cells are wrong"
        held = int((self._cells != 0).sum()) + sum(map(len, self.spilled.values()))
        assert held == self.size, f"the table holds {held} keys and counts {self.size}"

    def check_entry(self, places: Cells, hashes: bytes, owner: int) -> None:
        """Raise AssertionError if these hashes of an owner are not where they are said to be."""
        fragments = self.fragments(hashes)
        there = (np.uint64(owner << 32) | fragments) == self._cells[places]
        for fragment, place, right in zip(fragments.tolist(), places.tolist(), there.tolist(), strict=True):
            assert right if place >= 0 else owner in self.spilled[fragment], f"cell {place} is not owner {owner}'s"

    def _allocate(self, buckets: int) -> None:
        self._shift = np.uint64(64 - (buckets.bit_length() - 1))
        self._cells = np.zeros(buckets * CELLS, np.uint64)
        self._free = np.full(buckets, 0xFF, np.uint8)
        self._winner = np.zeros(buckets, np.int32)

    def _bucket(self, keys: NDArray[np.uint64], factor: np.uint64) -> NDArray[np.int64]:
        return ((keys * factor) >> self._shift).view(np.int64)

    def _place(self, cells: NDArray[np.uint64]) -> Cells:
        """Each round places one key per bucket; keys that lost their bucket try again in the next round."""
        places: Cells | None = None
        left = np.arange(len(cells), dtype=np.int32)
        while len(left):
            both = ((cells & _KEY) * _FACTORS >> self._shift).view(np.int64)
            free_both = self._free.take(both)
            ones = _ONES.take(free_both)
            better = ones[1] > ones[0]
            bucket, free = np.where(better, both[1], both[0]), np.where(better, free_both[1], free_both[0])
            self._winner[bucket] = left
            won = self._winner.take(bucket) == left
            if places is None and all_true(won) and all_true(free):
                return self._fill(bucket, free, cells)
            if places is None:
                places = np.full(len(cells), -1, np.int32)
            if not all_true(free):
                full = free == 0
                for cell in cells[full].tolist():
                    self.spilled.setdefault(cell & _LOW, []).append(cell >> 32)
                won, lost = won & ~full, ~won & ~full
            else:
                lost = ~won
            places[left[won]] = self._fill(bucket[won], free[won], cells[won])
            left, cells = left[lost], cells[lost]
        return _NO_CELLS if places is None else places

    def _fill(self, bucket: NDArray[np.int64], free: NDArray[np.uint8], cells: NDArray[np.uint64]) -> Cells:
        """Put each cell into the lowest free place of its bucket, no two into the same bucket; returns the places."""
        places = bucket * CELLS + _LOWEST.take(free)
        self._cells[places] = cells
        self._free[bucket] = _REST.take(free)
        return places.astype(np.int32)

    def _respill(self, places: Cells, hashes: bytes, old: int, new: int | None) -> Cells:
        """Remove keys that spilled, or give them to another owner; returns the places of the others."""
        if self.spilled and len(places) and places.min() < 0:
            for at in np.flatnonzero(places < 0).tolist():
                (fragment,) = self.fragments(hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES]).tolist()
                owners = self.spilled[fragment]
                owners.remove(old)
                if new is not None:
                    owners.append(new)
                elif not owners:
                    del self.spilled[fragment]
            places = places[places >= 0]
        return places


_WORD, _LOW, _HALF, _KEY = (1 << 64) - 1, (1 << 32) - 1, np.uint64(32), np.uint64((1 << 32) - 1)
_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_FACTORS = np.array([[_FIRST], [_SECOND]])
_WORDS = Struct("<8I")
_NO_CELLS = np.empty(0, np.int32)
_BIT = (1 << np.arange(CELLS)).astype(np.uint8)
_ONES = np.array([mask.bit_count() for mask in range(256)], np.uint8)
_REST = np.array([mask & (mask - 1) for mask in range(256)], np.uint8)
_LOWEST = np.array([(mask & -mask).bit_length() - 1 if mask else 0 for mask in range(256)], np.int64)

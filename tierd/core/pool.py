"""The slots of one namespace in one tier: which are free, who uses the others, and in which segment each one lies.

Slots are numbered through all segments: number = ordinal * slots_per_segment + index in the segment. A slot is
FREE -> FILLING (taken, someone writes) -> READY (in the index) -> FREE; READY -> RETIRED when its block left the index
while someone still uses it, and QUARANTINED when its medium lied. **A slot goes back to the free ones only with no
users**; users are leases and transfers (the holder bits in the segment's directory are their shadow that outlives the
daemon).

The directory of a segment is written here and nowhere else in the core, in the order that recovery relies on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES
from tierd.core.ahead import Ahead
from tierd.core.plan import all_true, any_true

Slots = NDArray[np.int32]
Rows = NDArray[np.int64]
"""Indexes of slots in their segment."""
Group = tuple[int, Rows, NDArray[np.intp] | slice]
"""Slots of one segment: its ordinal, their rows, and where they stand among the slots asked for."""

ABSENT, FREE, FILLING, READY, RETIRED, QUARANTINED = range(6)
STATES = ("absent", "free", "filling", "ready", "retired", "quarantined")


class Directory(Protocol):
    """What the core needs of a segment's directory; slots are indexes in the segment (int64[n])."""

    holders: NDArray[np.uint64]
    """One bit per attached session, by slot (memory only)."""

    def begin(self, slots: Rows, hashes: bytes, parents: bytes) -> object: ...
    def ready(self, slots: Rows) -> None: ...
    def free(self, slots: Rows) -> None: ...
    def touch(self, slots: Rows, last_use: NDArray[np.uint64] | int, use_counts: NDArray[np.uint32] | int) -> None: ...
    def hashes(self, slots: Rows) -> bytes: ...


class Pool:
    """Slots of one (namespace, tier). Arrays `users` and `state` are indexed by slot number."""

    def __init__(self, slots_per_segment: int) -> None:
        self.slots_per_segment = slots_per_segment
        self.segments: dict[int, Directory] = {}
        self.closing: set[int] = set()
        """Ordinals that take no new blocks because their segment is being given up."""
        self.pinned: set[int] = set()
        """Ordinals that are not given up because a pin uses a slot of their segment."""
        self.users: NDArray[np.int32] = np.zeros(0, np.int32)
        self.state: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self.last_use: dict[int, int] = {}
        """Latest use of anything in a segment, by ordinal."""
        self.ahead = Ahead(Counter())
        """What prefetches brought; a cache counts it as its own."""
        self._stack: Slots = np.zeros(0, np.int32)
        self._free = 0
        self._grouped: tuple[tuple[int, bytes], list[Group]] = (0, b""), []

    @property
    def free(self) -> int:
        """Slots that can be taken at once."""
        return self._free

    @property
    def slots(self) -> int:
        """Slots of all segments that are not being given up."""
        return (len(self.segments) - len(self.closing)) * self.slots_per_segment

    @property
    def next_ordinal(self) -> int:
        """The lowest one that no segment has."""
        return next(at for at in range(len(self.segments) + 1) if at not in self.segments)

    def add_segment(self, directory: Directory, now: int, ordinal: int | None = None) -> int:
        """Add a segment of free slots, under a certain ordinal if that is free; returns its ordinal."""
        ordinal = self.next_ordinal if ordinal is None or ordinal in self.segments else ordinal
        first, last = ordinal * self.slots_per_segment, (ordinal + 1) * self.slots_per_segment
        if last > len(self.users):
            grown = max(last, 2 * len(self.users))
            self.users = _resized(self.users, grown)
            self.state = _resized(self.state, grown)
            self._stack = _resized(self._stack, grown)
        self.segments[ordinal] = directory
        self.last_use[ordinal] = now
        self.state[first:last] = FREE
        self._push(np.arange(first, last, dtype=np.int32))
        return ordinal

    def take(self, count: int) -> Slots:
        """Take up to `count` free slots: FILLING, with one user (the taker)."""
        count = min(count, self._free)
        self._free -= count
        taken = self._stack[self._free : self._free + count][::-1].copy()
        rows = rows_of(taken)
        self.state[rows] = FILLING
        self.users[rows] = 1
        return taken

    def claim(self, slots: Slots, state: int) -> None:
        """Take given free slots, as recovery found them: READY, or RETIRED for what only waits for its holders (and
        needs
        a user at once)."""
        assert (self.state[slots] == FREE).all(), "only free slots can be claimed"
        self.state[slots] = state
        self._keep_free(self.state[self._stack[: self._free]] == FREE)

    def begin(self, slots: Slots, hashes: bytes, parents: bytes) -> None:
        """Write FILLING and the identities (packed 32-byte hashes) of taken slots."""
        for ordinal, local, where in self.by_segment(slots):
            self.segments[ordinal].begin(local, _select(hashes, where), _select(parents, where))

    def enter(self, slots: Slots) -> None:
        """Filled slots are in the index now (and ready on a medium that whoever wrote it published); the filler's use
        ends.
        """
        rows = rows_of(slots)
        assert all_true(self.state[rows] == FILLING), "only a filling slot can become ready"
        self.state[rows] = READY
        self.users[rows] -= 1

    def ready(self, slots: Slots) -> None:
        """Publish filled slots, in the directory too; the filler's use ends."""
        self.enter(slots)
        for ordinal, local, _ in self.by_segment(slots):
            self.segments[ordinal].ready(local)

    def use(self, slots: Slots) -> None:
        """One more user of each slot."""
        self.users[rows_of(slots)] += 1
        if self.ahead.unused:
            self.ahead.used(slots)

    def unuse(self, slots: Slots) -> None:
        """One user less; retired slots without users become free."""
        rows = rows_of(slots)
        users = self.users[rows] - 1
        assert users.min(initial=0) >= 0, "a slot was given back more often than it was used"
        self.users[rows] = users
        retired = self.state[rows] == RETIRED
        if any_true(retired):
            self._release(slots[retired & (users == 0)])

    def give(self, slots: Slots) -> None:
        """The filler gives its slots back unwritten, or with bytes that nobody may see."""
        self.state[slots] = RETIRED
        self.unuse(slots)

    def fill_again(self, slots: Slots) -> None:
        """Those of these slots that are only waited for, by one user, are filled by it, unnamed as when they were taken."""
        closing = np.isin(slots // self.slots_per_segment, list(self.closing))
        slots = slots[(self.state[slots] == RETIRED) & (self.users[slots] == 1) & ~closing]
        self.state[slots] = FILLING
        for ordinal, local, _ in self.by_segment(slots):
            self.segments[ordinal].free(local)

    def hashes(self, slots: Slots) -> bytes:
        """The blocks that are ready in these slots of a memory tier, packed in the order of their segments."""
        return b"".join(self.segments[ordinal].hashes(local) for ordinal, local, _ in self.by_segment(slots))

    def retire(self, slots: Slots) -> None:
        """The blocks left the index: free at once what nobody uses, the rest with its last user."""
        if self.ahead.unused:
            self.ahead.gone(slots)
        idle = self.users.take(slots) == 0
        if not all_true(idle):
            self.state[slots] = RETIRED
            slots = slots[idle]
        self._release(slots)

    def quarantine(self, slots: Slots) -> None:
        """Never use these slots again in this life; on the medium they are free."""
        self.state[slots] = QUARANTINED
        for ordinal, local, _ in self.by_segment(slots):
            self.segments[ordinal].free(local)

    def hold(self, slots: Slots, bit: int) -> None:
        """Set a session's holder bit, before it is told the slots."""
        mask = np.uint64(1 << bit)
        for ordinal, rows in self._rows_by_segment(slots):
            self.segments[ordinal].holders[rows] |= mask

    def unhold(self, slots: Slots, bit: int) -> None:
        """Clear a session's holder bit."""
        mask = ~np.uint64(1 << bit)
        for ordinal, rows in self._rows_by_segment(slots):
            self.segments[ordinal].holders[rows] &= mask

    def close_segment(self, ordinal: int) -> None:
        """Use a segment for new blocks no more: what is being filled retires; the caller must retire its blocks."""
        self.closing.add(ordinal)
        first = ordinal * self.slots_per_segment
        state = self.state[first : first + self.slots_per_segment]
        state[state == FILLING] = RETIRED
        self._keep_free(self._stack[: self._free] // self.slots_per_segment != ordinal)

    def is_idle(self, ordinal: int) -> bool:
        """Whether nobody uses any slot of the segment."""
        first = ordinal * self.slots_per_segment
        return not self.users[first : first + self.slots_per_segment].any()

    def remove_segment(self, ordinal: int) -> Directory:
        """Forget an idle, closing segment."""
        assert ordinal in self.closing and self.is_idle(ordinal), f"segment {ordinal} is in use"
        first = ordinal * self.slots_per_segment
        self.state[first : first + self.slots_per_segment] = ABSENT
        self.closing.discard(ordinal)
        del self.last_use[ordinal]
        return self.segments.pop(ordinal)

    def touched(self, slots: Slots, now: int) -> None:
        """Note the use of slots for the choice of a segment to give up."""
        for ordinal, _, _ in self.by_segment(slots):
            self.last_use[ordinal] = max(now, self.last_use[ordinal])

    def counts(self) -> dict[str, int]:
        """Slots by state."""
        found = np.bincount(self.state, minlength=len(STATES)).tolist()
        return dict(zip(STATES[1:], found[1:], strict=True))

    def by_segment(self, slots: Slots) -> list[Group]:
        """Group slot numbers, once per segment. The last answer is kept: one request asks several times for its slots."""
        key, grouped = (len(slots), slots.tobytes()), self._grouped
        if grouped[0] != key:
            grouped = self._grouped = key, list(self._group(slots))
        return grouped[1]

    def _group(self, slots: Slots) -> Iterator[Group]:
        if not len(slots):
            return
        ordinals = slots // self.slots_per_segment
        cuts = (ordinals[1:] != ordinals[:-1]).nonzero()[0]
        order = None
        if len(cuts) and np.count_nonzero(np.bincount(ordinals)) <= len(cuts):
            short = len(self.state) <= self.slots_per_segment << 16  # 16-bit keys are sorted by radix
            order = np.argsort(ordinals.astype(np.uint16) if short else ordinals, kind="stable")
            slots, ordinals = slots[order], ordinals[order]
            cuts = (ordinals[1:] != ordinals[:-1]).nonzero()[0]
        starts = [0, *(cuts + 1).tolist()]
        local = slots.astype(np.int64) - ordinals * self.slots_per_segment
        local.flags.writeable = False
        for start, end in zip(starts, [*starts[1:], len(slots)], strict=True):
            yield int(ordinals[start]), local[start:end], slice(start, end) if order is None else order[start:end]

    def check(self) -> None:
        """Raise AssertionError if the accounting is off."""
        free = self._stack[: self._free]
        assert len(np.unique(free)) == len(free) and (self.state[free] == FREE).all(), "the free stack is wrong"
        closing = np.isin(np.arange(len(self.state)) // self.slots_per_segment, list(self.closing))
        assert ((self.state == FREE) & ~closing).sum() == self._free, "free slots are lost"
        assert not self.users[self.state == FREE].any(), "a free slot has users"
        assert (self.users >= 0).all(), "negative users"
        self.ahead.check((self.state == READY) & (self.users == 0))
        assert (self.users[self.state == RETIRED] > 0).all(), "a retired slot without users was not freed"

    def _rows_by_segment(self, slots: Slots) -> Iterator[tuple[int, NDArray[np.int64] | slice]]:
        """Rows of each segment, as slices where slots lie in runs: an ordinal may come several times."""
        if len(slots) > SMALL:
            cuts = np.flatnonzero((slots[1:] != slots[:-1] + 1) | (slots[1:] % self.slots_per_segment == 0))
            if len(cuts) * RUN_MIN < len(slots):
                firsts = slots[[0, *(cuts + 1).tolist()]].tolist()
                lasts = slots[[*cuts.tolist(), -1]].tolist()
                for first, last in zip(firsts, lasts, strict=True):
                    ordinal, start = divmod(first, self.slots_per_segment)
                    yield ordinal, slice(start, start + last - first + 1)
                return
        for ordinal, local, _ in self.by_segment(slots):
            yield ordinal, local

    def _keep_free(self, kept: NDArray[np.bool_]) -> None:
        free = self._stack[: self._free][kept]
        self._free = len(free)
        self._stack[: self._free] = free

    def _release(self, slots: Slots) -> None:
        slots = np.sort(slots)  # segment by segment: cheaper than to group them afterwards
        self.state[rows_of(slots)] = FREE
        for ordinal, local, _ in self._group(slots):
            self.segments[ordinal].free(local)
        if self.closing:
            slots = slots[~np.isin(slots // self.slots_per_segment, list(self.closing))]
        self._push(slots)

    def _push(self, slots: Slots) -> None:
        """The lowest are taken first, among the latest at least: else a chain is soon spread over all segments, and each
        of them costs a store its array operations and the medium a call.
        """
        self._stack[self._free : self._free + len(slots)] = slots[::-1]
        self._free += len(slots)
        latest = self._stack[max(0, self._free - SORTED_MAX) : self._free]
        latest[::-1].sort()


SORTED_MAX = 4096
RUN_MIN = 8
"""Runs shorter than this are not worth a slice each."""
SMALL = 64
"""For fewer slots than this, looking for a slice costs more than it saves."""


def rows_of(slots: Slots) -> NDArray[np.int64] | slice:
    """The fastest index for these slots: a slice where they are neighbours in rising order, as they are in a young
    pool.
    """
    if len(slots) > SMALL and int(slots[-1]) - int(slots[0]) == len(slots) - 1 and all_true(slots[1:] - slots[:-1] == 1):
        return slice(int(slots[0]), int(slots[-1]) + 1)
    return slots.astype(np.int64)


def _resized(array: NDArray[Any], size: int) -> NDArray[Any]:
    grown = np.zeros(size, array.dtype)
    grown[: len(array)] = array
    return grown


def _select(hashes: bytes, where: NDArray[np.intp] | slice) -> bytes:
    if isinstance(where, slice):
        return hashes[where.start * HASH_BYTES : where.stop * HASH_BYTES]
    return np.frombuffer(hashes, "V32")[where].tobytes()

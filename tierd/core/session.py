"""What one attached client holds: leases, pages, and the slots of its tier that it was told.

A told slot carries the session's bit in the holders column of its segment, set before it is told and cleared when the
last lease or page that named it lets go: by release, commit, abort, resume or the session's end, never by a timer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tierd.core.ladder import Ladder
from tierd.core.plan import Lease, Slots
from tierd.core.pool import FILLING, FREE, RETIRED, Pool, rows_of
from tierd.errors import Gone, Invalid

Counts = NDArray[np.int32]


class Session:
    """One client with its bit (0 to 63), in one mapped tier.

    Both counts are by slot of that tier: `pages`, how often the client holds it as a page, and `told`, how many leases
    and pages named it to the client. A page that is still being filled is a reserved one.
    """

    __slots__ = ("_ladder", "bit", "id", "leases", "pages", "pool", "restored", "tier", "told")

    def __init__(self, session_id: int, bit: int, tier: int, ladder: Ladder) -> None:
        self.id = session_id
        self.bit = bit
        self.tier = tier
        self.pool: Pool = ladder.pools[tier]
        self.leases: dict[int, Lease] = {}
        self.pages: Counts = np.zeros(0, np.int32)
        self.told: Counts = np.zeros(0, np.int32)
        self.restored: Slots = np.empty(0, np.int32)
        """Slots that carry this session's bit from an earlier life of the daemon."""
        self._ladder = ladder

    @property
    def paged(self) -> bool:
        """Whether the session uses its tier's slots as pages."""
        return self.tier < self._ladder.paged

    def lease(self, lease_id: int, writing: bool) -> Lease:
        """A lease by its id; raises Gone when it is not held, Invalid when it was made for the other direction."""
        lease = self.leases.get(lease_id)
        if lease is None:
            raise Gone(f"lease {lease_id} is not held by this session")
        if lease.writing != writing:
            verbs = "commit or abort" if lease.writing else "load or release"
            raise Invalid(f"lease {lease_id} was made for the other direction: {verbs} it")
        return lease

    def tell(self, slots: Slots) -> None:
        """Set the holder bit on slots (used already) that the client is about to be told."""
        self.told = _grown(self.told, len(self.pool.users))
        rows = rows_of(slots)
        counts = self.told[rows].copy()
        self.told[rows] = counts + 1
        fresh = slots[counts == 0] if counts.any() else slots
        self.pool.hold(fresh, self.bit)

    def untell(self, slots: Slots) -> None:
        """One lease or page less names these slots; the bit goes with the last."""
        rows = rows_of(slots)
        counts = self.told[rows] - 1
        self.told[rows] = counts
        done = slots[counts == 0] if counts.any() else slots
        self.pool.unhold(done, self.bit)

    def let_go(self, lease: Lease, part: slice | NDArray[np.bool_]) -> None:
        """Hold some blocks of a reading lease no longer."""
        here, told = lease.here[part], lease.told[part]
        if told.all():
            self.untell(here)
            self.pool.unuse(here)
        else:
            self.untell(here[told])
            for pool, row in zip(self._ladder.pools, lease.slots[:, part], strict=True):
                if len(held := row[row >= 0]):
                    pool.unuse(held)
        lease.slots[:, part], lease.told[part] = -1, False

    # -- pages --------------------------------------------------------------------------------------------------------

    def hold(self, slots: Slots) -> None:
        """Hold slots as pages (used already, each of them once), and tell them."""
        self.pages = _grown(self.pages, len(self.pool.users))
        self.pages[slots] += 1
        self.tell(slots)

    def holds(self, slots: Slots) -> NDArray[np.bool_]:
        """Which of these slots, however wrong their numbers, the session holds as pages."""
        inside = (slots >= 0) & (slots < len(self.pages))
        inside[inside] = self.pages[slots[inside]] > 0
        return inside

    def drop(self, slots: Slots) -> None:
        """Hold pages once less for each time that they are there; raises Invalid when one is not held that often."""
        distinct, times = np.unique(slots, return_counts=True)
        short = ~self.holds(distinct)
        short[~short] = self.pages[distinct[~short]] < times[~short]
        if short.any():
            raise Invalid(f"page {distinct[short][0]} is released more often than this session holds it")
        for some in rounds(slots):
            self.pages[some] -= 1
            self.untell(some)
            filling = self.pool.state[some] == FILLING
            self.pool.give(some[filling])
            self.pool.unuse(some[~filling])

    def all_pages(self) -> Slots:
        """Every page as often as it is held."""
        held = np.flatnonzero(self.pages)
        return np.repeat(held, self.pages[held]).astype(np.int32)

    # -- lives --------------------------------------------------------------------------------------------------------

    def restore(self, slots: Slots) -> None:
        """Hold slots that carry this session's bit from an earlier life, until `resume` or the session's end."""
        self.pool.claim(slots[self.pool.state[slots] == FREE], RETIRED)
        self.pool.use(slots)
        self.restored = slots

    def forget_restored(self) -> None:
        """What was restored and not told again is free."""
        gone, self.restored = self.restored, self.restored[:0]
        told = np.isin(gone, np.flatnonzero(self.told))
        self.pool.unhold(gone[~told], self.bit)
        self.pool.unuse(gone)

    def hold_again(self, held: Slots) -> None:
        """Hold pages as a client says that it does, each as often as it is there."""
        for some in rounds(held):
            self.pool.use(some)
            self.hold(some)

    def used(self) -> Iterator[Slots]:
        """Slots of its tier that it uses besides those of its leases, as often as it uses them."""
        yield self.restored
        yield self.all_pages()

    def check(self) -> None:
        """Raise AssertionError if `told` is not what leases and pages say, or the holders column differs from it."""
        told = _grown(self.pages, len(self.pool.users)).copy()
        for lease in self.leases.values():
            np.add.at(told, lease.here[lease.told], 1)
        assert (told[: len(self.told)] == self.told).all() and not told[len(self.told) :].any(), "told slots are wrong"
        expected = told > 0
        expected[self.restored] = True
        for ordinal, directory in self.pool.segments.items():
            first = ordinal * self.pool.slots_per_segment
            bits = (directory.holders & np.uint64(1 << self.bit)) != 0
            assert (bits == expected[first : first + self.pool.slots_per_segment]).all(), f"bits of session {self.id} are wrong"


def rounds(slots: Slots) -> Iterator[Slots]:
    """Slots that are there several times, as sets that have each of them once."""
    distinct, times = np.unique(slots, return_counts=True)
    for number in range(int(times.max(initial=0))):
        yield distinct[times > number]


def _grown(counts: Counts, size: int) -> Counts:
    if len(counts) >= size:
        return counts
    grown = np.zeros(size, np.int32)
    grown[: len(counts)] = counts
    return grown

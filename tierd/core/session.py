"""What one attached client holds: leases, and the slots of the mapped tier that it was told.

A told slot carries the session's bit in the holders column of its segment, set before it is told and cleared when the
last lease that named it lets go: by release, commit, abort, resume or the session's end, never by a timer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tierd.core.plan import LOWER, UPPER, Lease, Slots
from tierd.core.pool import FREE, RETIRED, Pool, rows_of
from tierd.errors import Gone, Invalid


class Session:
    """One client with its bit (0 to 63). `told` counts, per upper slot, the leases that named it to the client."""

    __slots__ = ("_pools", "bit", "id", "leases", "restored", "told")

    def __init__(self, session_id: int, bit: int, pools: list[Pool]) -> None:
        self.id = session_id
        self.bit = bit
        self.leases: dict[int, Lease] = {}
        self.told: NDArray[np.int32] = np.zeros(0, np.int32)
        self.restored: Slots = np.empty(0, np.int32)
        """Slots that carry this session's bit from an earlier life of the daemon."""
        self._pools = pools

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
        if len(self.told) < len(self._pools[UPPER].users):
            grown = np.zeros(len(self._pools[UPPER].users), np.int32)
            grown[: len(self.told)] = self.told
            self.told = grown
        rows = rows_of(slots)
        counts = self.told[rows].copy()
        self.told[rows] = counts + 1
        fresh = slots[counts == 0] if counts.any() else slots
        self._pools[UPPER].hold(fresh, self.bit)

    def untell(self, slots: Slots) -> None:
        """One lease less names these slots; the bit goes with the last."""
        rows = rows_of(slots)
        counts = self.told[rows] - 1
        self.told[rows] = counts
        done = slots[counts == 0] if counts.any() else slots
        self._pools[UPPER].unhold(done, self.bit)

    def let_go(self, lease: Lease, part: slice) -> None:
        """Hold some blocks of a reading lease no longer."""
        upper, lower, told = lease.upper[part], lease.lower[part], lease.told[part]
        if told.all():
            self.untell(upper)
            self._pools[UPPER].unuse(upper)
        else:
            self.untell(upper[told])
            self._pools[UPPER].unuse(upper[upper >= 0])
            if len(below := lower[lower >= 0]):
                self._pools[LOWER].unuse(below)
        lease.upper[part], lease.lower[part], lease.told[part] = -1, -1, False

    def restore(self, slots: Slots) -> None:
        """Hold slots that carry this session's bit from an earlier life, until `resume` or the session's end."""
        pool = self._pools[UPPER]
        pool.claim(slots[pool.state[slots] == FREE], RETIRED)
        pool.use(slots)
        self.restored = slots

    def forget_restored(self) -> None:
        """What was restored and not told again is free."""
        gone, self.restored = self.restored, self.restored[:0]
        told = np.isin(gone, np.flatnonzero(self.told))
        self._pools[UPPER].unhold(gone[~told], self.bit)
        self._pools[UPPER].unuse(gone)

    def check(self) -> None:
        """Raise AssertionError if `told` is not what the leases say, or the holders column differs from it."""
        told = np.zeros(len(self._pools[UPPER].users), np.int32)
        for lease in self.leases.values():
            np.add.at(told, lease.upper[lease.told], 1)
        assert (told[: len(self.told)] == self.told).all() and not told[len(self.told) :].any(), "told slots are wrong"
        expected = told > 0
        expected[self.restored] = True
        pool = self._pools[UPPER]
        for ordinal, directory in pool.segments.items():
            first = ordinal * pool.slots_per_segment
            bits = (directory.holders & np.uint64(1 << self.bit)) != 0
            assert (bits == expected[first : first + pool.slots_per_segment]).all(), f"bits of session {self.id} are wrong"

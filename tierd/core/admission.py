"""Which blocks may come to the prefix-closed tier: all, those that were asked for again, or those that its policy wants.

On chat four of five blocks that are written at once are never read again. What is turned away may come later: a block that is
read while it is still in memory is offered again. The tier stays prefix-closed in every case, since only the head of a run
is let in, and no block is asked for more often than its parent.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES

EVERYTHING, SECOND_SIGHT, POLICY = "everything", "second-sight", "policy"
ADMISSIONS = (EVERYTHING, SECOND_SIGHT, POLICY)
SEEN_TURNS, SEEN_MIN = 4, 50_000
"""As many blocks are remembered as the tier has slots, times this, and at least so many."""
WRITE_PRICE = 3.0
"""How many times as much as what it drives out a block has to be worth to its policy, where every write wears the medium."""


class Admission:
    """Lets in the head of a run; `slots` says how many blocks the tier holds."""

    def __init__(self, kind: str, slots: Callable[[], int]) -> None:
        assert kind in ADMISSIONS
        self.kind = kind
        self._slots = slots
        self._seen: NDArray[np.uint64] = np.zeros(0, np.uint64)
        """Marks of blocks that were seen once, each at the place that its bits say; a later one takes the place over."""

    def offered(self, hashes: bytes) -> int:
        """How many leading blocks of a run that was just stored or read may be written."""
        if self.kind != SECOND_SIGHT:
            return len(hashes) // HASH_BYTES
        self._grow()
        marks = np.frombuffer(hashes, np.uint64)[:: HASH_BYTES // 8]
        places = marks & np.uint64(len(self._seen) - 1)
        seen = np.flatnonzero(self._seen[places] == marks)
        self._seen[places] = marks
        return int(seen[-1]) + 1 if len(seen) else 0  # whoever saw a block saw those before it

    def _grow(self) -> None:
        wanted = 1 << (max(SEEN_TURNS * self._slots(), SEEN_MIN) - 1).bit_length()
        if len(self._seen) < wanted:
            known, self._seen = self._seen[self._seen > 0], np.zeros(wanted, np.uint64)
            self._seen[known & np.uint64(wanted - 1)] = known

"""What became of blocks that were brought to a tier before anybody had asked for them.

A block that a prefetch has moved is *late* if somebody waited for it, else *useful* if it is used before it leaves the
tier, else *wasted*. Counted when it is known: what was moved is their sum, and what is in the tier still unused.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int32]
Mask = NDArray[np.bool_]
PREFETCHED = "prefetched"
USEFUL, LATE, WASTED = "useful", "late", "wasted"
FATES = (USEFUL, LATE, WASTED)


class Ahead:
    """Marks on the slots of one tier whose blocks nobody has used since a prefetch brought them. Memory, one byte a slot, is
    taken with the first of them.
    """

    def __init__(self, counters: Counter[tuple[str, ...]]) -> None:
        self.unused = 0
        """How many slots are marked: with none there is nothing to look for."""
        self._counters = counters
        self._marked: Mask = np.zeros(0, np.bool_)

    def came(self, slots: Slots, moved: Mask, entered: Mask, awaited: Mask) -> None:
        """A prefetch has ended for some slots: which were moved, are in the index now, and had somebody waiting (bool each)."""
        self._count(LATE, int(np.count_nonzero(moved & awaited)))
        self._count(WASTED, int(np.count_nonzero(moved & ~awaited & ~entered)))
        unused = slots[entered & ~awaited]
        if len(unused):
            missing = int(unused.max()) + 1 - len(self._marked)
            self._marked = np.concatenate((self._marked, np.zeros(max(missing, 0), np.bool_)))
            self._marked[unused] = True
            self.unused += len(unused)

    def used(self, slots: Slots) -> None:
        """Somebody uses these slots."""
        self._ends(USEFUL, slots)

    def gone(self, slots: Slots) -> None:
        """The blocks of these slots have left the tier."""
        self._ends(WASTED, slots)

    def _ends(self, fate: str, slots: Slots) -> None:
        known = slots[slots < len(self._marked)]
        if len(marked := known[self._marked[known]]):
            self._marked[marked] = False
            self.unused -= len(marked)
            self._count(fate, len(marked))

    def _count(self, fate: str, blocks: int) -> None:
        if blocks:
            self._counters[PREFETCHED, fate] += blocks

    def check(self, idle: Mask) -> None:
        """Raise AssertionError unless every mark is on a slot that is `idle` (bool per slot): ready, without users."""
        marked = np.flatnonzero(self._marked)
        assert idle[marked].all(), "a block that a prefetch brought was used or has gone, and was not counted"
        assert len(marked) == self.unused, "marks were lost"

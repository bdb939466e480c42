"""Scrubbing, as far as the cache is concerned: slots are used while they are read, and what is wrong is given up before
anybody asks for it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tierd.core.cache import Cache
from tierd.core.distrust import distrust
from tierd.core.plan import IO_ERROR, MISMATCH, OK, Slots
from tierd.core.pool import READY

OUTCOMES = {"ok": OK, "io_error": IO_ERROR, "mismatch": MISMATCH}
"""What a block can be found to be, by the names of the counters."""


def hold(cache: Cache, first: int, count: int) -> Slots:
    """The slots of the lowest tier among numbers [first, first + count) that have a block, used until `let_go`."""
    pool = cache.pools[cache.ladder.closed]
    slots = first + np.flatnonzero(pool.state[first : first + count] == READY).astype(np.int32)
    pool.use(slots)
    return slots


def let_go(cache: Cache, slots: Slots, outcome: NDArray[np.uint8]) -> None:
    """Slots that were held have been read (uint8 for each: OK, IO_ERROR or MISMATCH; anything else: it was not)."""
    tier = cache.ladder.closed
    pool = cache.pools[tier]
    for name, code in OUTCOMES.items():
        cache.counters["scrubbed", name] += int(np.count_nonzero(outcome == code))
    bad = slots[np.isin(outcome, (IO_ERROR, MISMATCH)) & (pool.state[slots] == READY)]  # others have left the tree meanwhile
    if len(bad):
        distrust(cache.index, tier, pool, pool.hashes(bad), bad)
    pool.unuse(slots)

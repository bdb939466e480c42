"""How old blocks are when something happens to them, counted in blocks by bucket among a cache's other counters.

Three ages: `idle`, since the last use of a block that leaves a tier to make room; `lived`, since its slot was taken (of every
SAMPLE-th slot); `gap`, since the last lookup of a block that is looked up again (of every SAMPLE-th hash, see `seen`). One
call for all blocks of an eviction or a request; nothing here is done per block.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

IDLE, LIVED, GAP = "idle", "lived", "gap"
EVERYWHERE = "all"
"""In place of a tier's name, where an age is not one of a tier."""
SAMPLE = 64
"""One slot or hash in so many is followed; a power of two."""
BOUNDS = (1, 10, 60, 600, 3600, 6 * 3600, 24 * 3600)
"""Upper bounds of the buckets, in seconds; one more holds what is older."""
BUCKETS = (*map(str, BOUNDS), "+Inf")
SUM = "milliseconds"
_BOUNDS = 1000 * np.array(BOUNDS, np.int64)


def note_ages(
    counters: Counter[tuple[str, ...]],
    kind: str,
    tier: str,
    milliseconds: NDArray[np.int64],
    blocks: NDArray[np.int64] | None = None,
) -> None:
    """Count blocks by their ages (int64[n]), one each, or so many (int64[n])."""
    if not len(milliseconds):
        return
    milliseconds = np.maximum(milliseconds, 0)  # the wall clock may have been set back
    found = np.bincount(np.searchsorted(_BOUNDS, milliseconds), blocks, len(BUCKETS)).tolist()
    for bucket, number in zip(BUCKETS, found, strict=True):
        if number:
            counters[kind, tier, bucket] += int(number)
    counters[kind, tier, SUM] += int(milliseconds.sum() if blocks is None else milliseconds @ blocks)

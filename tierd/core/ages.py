"""How old blocks are when something happens to them, counted in blocks by bucket among a cache's other counters.

Three ages: `idle`, since the last use of a block that leaves a tier to make room; `lived`, since it was stored; `gap`, since
the last lookup of a block that is looked up again (of every SAMPLE-th hash, see `seen`). One call for all blocks of an eviction
or a request; nothing here is done per block: what was used together has one age.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

IDLE, LIVED, GAP = "idle", "lived", "gap"
EVERYWHERE = "all"
"""In place of a tier's name, where an age is not one of a tier."""
SAMPLE = 64
"""One hash in so many is followed; a power of two."""
BOUNDS = (1, 10, 60, 600, 3600, 6 * 3600, 24 * 3600)
"""Upper bounds of the buckets, in seconds; one more holds what is older."""
BUCKETS = (*map(str, BOUNDS), "+Inf")
SUM = "milliseconds"
_BOUNDS = [1000 * bound for bound in BOUNDS]


def note_ages(counters: Counter[tuple[str, ...]], kind: str, tier: str, ages: Iterable[tuple[int, int]]) -> None:
    """Count blocks by their ages: pairs of milliseconds and how many blocks are so old."""
    found, total = [0] * len(BUCKETS), 0
    for milliseconds, blocks in ages:
        age = max(milliseconds, 0)  # the wall clock may have been set back
        found[bisect_left(_BOUNDS, age)] += blocks
        total += age * blocks
    if any(found):
        for bucket, blocks in zip(BUCKETS, found, strict=True):
            if blocks:
                counters[kind, tier, bucket] += blocks
        counters[kind, tier, SUM] += total

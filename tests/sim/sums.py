"""What has to add up in a cache at all times, whatever happened to it."""

from __future__ import annotations

from tierd.core.ahead import FATES, PREFETCHED
from tierd.core.cache import Cache
from tierd.core.pool import STATES


def check_sums(cache: Cache, moved_ahead: int) -> None:
    """Slots by state are all slots; what prefetches moved has ended one way, or still waits to be used."""
    for pool in cache.pools:
        counts = pool.counts()
        assert sum(counts.values()) == len(pool.segments) * pool.slots_per_segment, "slots are lost"
        assert set(counts) == set(STATES[1:])
    ended = sum(cache.counters[PREFETCHED, fate] for fate in FATES)
    unused = sum(pool.ahead.unused for pool in cache.pools)
    assert ended + unused == moved_ahead, "what prefetches moved does not add up"

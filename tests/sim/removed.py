"""What a cache says of blocks that are gone, against the model."""

from __future__ import annotations

from collections.abc import Container, Iterable

from tierd.block import split
from tierd.core.cache import Cache
from tierd.core.removed import Removed


def listened(cache: Cache) -> Cache:
    """The same cache, with somebody who wants to know."""
    cache.index.removed = Removed(lambda: None)
    return cache


def check_removed(cache: Cache, before: Iterable[bytes], now: Container[bytes]) -> None:
    """All that was there before and is not now was said to be gone, once, and nothing else."""
    assert cache.index.removed is not None
    hashes, too_many = cache.index.removed.take()
    assert not too_many
    assert sorted(split(hashes)) == sorted(block for block in before if block not in now)

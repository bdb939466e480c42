"""Policies against libcachesim, an implementation of others: on chains of one block the semantics coincide."""

from __future__ import annotations

import random

import libcachesim
import numpy as np
import pytest

from tierd.core.policy.opt import best, next_uses
from tierd.replay.shelf import Shelf
from tierd.replay.trace import block_hashes

POINTS = 0.0005
REQUESTS, OBJECTS = 40_000, 4_000


def popular(seed: int) -> list[int]:
    """Numbers of blocks, some far more often than others, and a scan in between."""
    dice = random.Random(seed)
    asked = []
    for at in range(REQUESTS):
        scan = at % 9000 > 7800
        asked.append(OBJECTS + at % 1500 if scan else min(OBJECTS - 1, int(dice.paretovariate(0.6))))
    return asked


def theirs(cache: object, asked: list[int]) -> float:
    """Hits of libcachesim, as a share."""
    upcoming: dict[int, int] = {}
    after = []
    for at in range(len(asked) - 1, -1, -1):
        after.append(upcoming.get(asked[at], (1 << 63) - 1))
        upcoming[asked[at]] = at
    hits = 0
    for at, (block, again) in enumerate(zip(asked, after[::-1], strict=True)):
        request = libcachesim.Request(obj_id=block, obj_size=1, clock_time=at, next_access_vtime=again)
        hits += cache.get(request)  # type: ignore[attr-defined]
    return hits / len(asked)


@pytest.mark.parametrize("slots", [100, 500, 2000])
@pytest.mark.parametrize(("policy", "name"), [("lru", "LRU"), ("arc", "ARC"), ("s3fifo", "S3FIFO")])
def test_hit_rates_are_those_of_libcachesim(policy: str, name: str, slots: int) -> None:
    """To 0.05 points, at several sizes, with popular blocks and scans."""
    asked = popular(slots)
    shelf = Shelf(slots, policy)
    names = block_hashes(OBJECTS + REQUESTS)
    ours = sum(shelf.request(names[block].tobytes(), now) for now, block in enumerate(asked)) / len(asked)
    shelf.index.check()
    assert ours == pytest.approx(theirs(getattr(libcachesim, name)(cache_size=slots), asked), abs=POINTS)


@pytest.mark.parametrize("slots", [100, 500, 2000])
def test_the_best_possible_is_that_of_libcachesim(slots: int) -> None:
    """Without bypass, which libcachesim does not have; with it, never worse."""
    asked = popular(slots)
    uses = next_uses([np.array([block], np.int32) for block in asked], OBJECTS + REQUESTS)
    ours = best(uses, slots, bypass=False).hits.sum() / len(asked)
    assert ours == pytest.approx(theirs(libcachesim.Belady(cache_size=slots), asked), abs=POINTS)
    assert best(uses, slots).hits.sum() / len(asked) >= ours

"""What comes back from the directories after a restart, row by row."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sim.clients import chain
from tests.sim.directories import Segment, rows_of
from tests.sim.world import LOWER, UPPER, World
from tierd.block import ROOT
from tierd.core.cache import Cache
from tierd.core.pool import Pool
from tierd.core.recovery import Recovered, recover


class Remains:
    """Directories of two tiers, as a daemon left them behind; then the cache that is made from them."""

    def __init__(self, slots: int = 64) -> None:
        self.slots = slots
        self.segments = [{0: Segment(slots)}, {0: Segment(slots)}]
        self.used = [0, 0]
        self.cache = Cache({"cpu": Pool(slots), "nvme": Pool(slots)})

    def put(self, tier: int, hashes: list[bytes], parents: list[bytes], last_use: int | list[int] = 5) -> np.ndarray:
        """Ready rows in the next slots of a tier."""
        at = np.arange(self.used[tier], self.used[tier] + len(hashes), dtype=np.int32)
        self.used[tier] += len(hashes)
        directory = self.segments[tier][0].directory
        directory.begin(at, b"".join(hashes), b"".join(parents))
        directory.ready(at)
        directory.touch(at, np.array(last_use, np.uint64), 3)
        return at

    def recover(self, now: int = 1_000) -> Recovered:
        """Start again; the cache checks itself."""
        for tier, pool in enumerate(self.cache.pools):
            pool.add_segment(self.segments[tier][0].directory, 0)
        result = recover(self.cache, [rows_of(segments, self.slots) for segments in self.segments], now)
        self.cache.check()
        return result

    def found(self, hashes: list[bytes]) -> dict[str, int]:
        """Where a lookup finds a chain."""
        if not self.cache.sessions:
            self.cache.open_session(1, 0, UPPER)
        tiers = self.cache.lookup(1, b"".join(hashes), ROOT, 2_000).tiers
        return {tier: number for tier, number in tiers.items() if number}


def parents(hashes: list[bytes], parent: bytes = ROOT) -> list[bytes]:
    """The parent of each block of a chain."""
    return [parent, *hashes[:-1]]


def test_chains_may_lie_in_both_tiers() -> None:
    """A block is kept when its ancestors are somewhere; each copy of it is."""
    remains, hashes = Remains(), chain(range(8))
    above = parents(hashes)
    remains.put(UPPER, hashes[:5], above[:5])
    remains.put(LOWER, hashes[3:], above[3:])
    assert remains.recover() == Recovered(kept=10, duplicates=0, orphans=0)
    assert remains.found(hashes) == {"cpu": 5, "nvme": 3}


def test_what_has_lost_its_root_is_freed() -> None:
    """Blocks behind a gap are given up, in the directory too, and their slots are used again."""
    remains, hashes = Remains(), chain(range(8))
    above = parents(hashes)
    remains.put(UPPER, hashes[:3], above[:3])
    remains.put(UPPER, hashes[4:6], above[4:6])
    remains.put(LOWER, hashes[5:], above[5:])
    assert remains.recover() == Recovered(kept=3, duplicates=0, orphans=5)
    assert remains.found(hashes) == {"cpu": 3, "miss": 5}
    assert remains.cache.pools[UPPER].free == 61 and remains.cache.pools[LOWER].free == 64
    codes = remains.segments[UPPER][0].directory.codes()
    assert (codes[3:] == 0).all()


def test_the_latest_of_two_copies_in_a_tier_stays() -> None:
    """Of one hash in two slots, the higher generation is kept; copies in different tiers are no duplicates."""
    remains, hashes = Remains(), chain(range(2))
    directory = remains.segments[LOWER][0].directory
    (old,) = remains.put(LOWER, hashes[:1], [ROOT])
    (new,) = remains.put(LOWER, chain([9]), [ROOT])
    directory.free([new])
    directory.begin([new], hashes[0], ROOT)
    directory.ready([new])
    remains.put(UPPER, hashes, parents(hashes))
    assert remains.recover() == Recovered(kept=3, duplicates=1, orphans=0)
    assert directory.codes()[old] == 0
    found = remains.cache.index.match(hashes[0])
    assert found and found[0].node.slots[LOWER, 0] == new


def test_hashes_that_begin_alike_are_told_apart() -> None:
    """Clients make the hashes: equal first words are no reason to confuse blocks or to lose them."""
    remains = Remains()
    hashes = [bytes(8) + block[8:] for block in chain(range(20))]
    remains.put(UPPER, hashes, parents(hashes))
    remains.put(LOWER, hashes, parents(hashes))
    assert remains.recover() == Recovered(kept=40, duplicates=0, orphans=0)
    assert remains.found(hashes) == {"cpu": 20}


def test_siblings_that_were_used_together_stay_siblings() -> None:
    """Branches of one parent with the same last use hang below it, not below one another."""
    remains = Remains()
    head = chain(range(3))
    branches = [chain([10 * number, 1], head[-1]) for number in range(1, 4)]
    remains.put(UPPER, head, parents(head))
    for branch in branches:
        remains.put(UPPER, branch, parents(branch, head[-1]))
    remains.recover()
    for branch in branches:
        assert remains.found(head + branch) == {"cpu": 5}


@pytest.mark.parametrize("last_use", [[9, 9, 1, 1, 5, 7], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [7, 1, 7, 1, 7, 1]])
def test_no_block_is_hotter_than_its_parent(last_use: list[int]) -> None:
    """Whatever the recency says, which is written late, tails are evicted before heads."""
    remains, hashes = Remains(slots=6), chain(range(6))
    remains.put(UPPER, hashes, parents(hashes), last_use)
    remains.recover()
    remains.cache.open_session(1, 0, UPPER)
    for left in range(5, 0, -1):
        placed = remains.cache.store(1, chain([100 + left])[0], ROOT, 10_000 + left)
        remains.cache.abort(1, placed.lease)
        remains.cache.pools[UPPER].take(1)
        assert remains.found(hashes) == {"cpu": left, "miss": 6 - left}
        remains.cache.close_session(1)
        remains.cache.open_session(1, 0, UPPER)


def test_no_branch_is_hotter_than_its_stem() -> None:
    """Where several branches were used after what they need, as far as the directories know, the stem outlives them."""
    remains, stem = Remains(slots=6), chain(range(2))
    branches = [chain([10 * number, 1], stem[-1]) for number in (1, 2)]
    remains.put(UPPER, stem, parents(stem), 1)
    for branch in branches:
        remains.put(UPPER, branch, parents(branch, stem[-1]), 9)
    remains.recover()
    remains.cache.open_session(1, 0, UPPER)
    remains.cache.store(1, b"".join(chain(range(50, 54))), ROOT, 10_000)
    assert remains.found(stem) == {"cpu": 2}


def test_a_damaged_recency_makes_nothing_immortal() -> None:
    """Recency has no crc: a last use in the future counts as now."""
    remains, hashes = Remains(slots=6), chain(range(3))
    remains.put(UPPER, hashes, parents(hashes), [5, (1 << 64) - 1, 1 << 63])
    remains.recover(now=1_000)
    assert max(node.last_use for node in remains.cache.index.nodes()) <= 1_000


def test_a_deep_chain_of_many_uses_comes_back() -> None:
    """Ten thousand blocks, each last used at another time: neither recursion nor quadratic work."""
    count = 10_000
    remains, hashes = Remains(slots=count), chain(range(count))
    remains.put(UPPER, hashes, parents(hashes), list(range(count, 0, -1)))
    cache = remains.cache
    cache.pools[UPPER].add_segment(remains.segments[UPPER][0].directory, 0)
    assert recover(cache, [rows_of(segments, count) for segments in remains.segments]).kept == count
    assert remains.found(hashes) == {"cpu": count}


def test_what_was_not_written_yet_is_written_after_a_restart() -> None:
    """Blocks that were committed and were only in memory reach nvme in the next life."""
    world = World()
    client = world.open()
    hashes, branch = chain(range(12)), chain([90, 91], chain(range(3))[-1])
    for run, parent in ((hashes, ROOT), (branch, hashes[2])):
        lease = world.store(client, run, parent)
        assert lease
        world.commit(client, lease)
    world.plan_write_back(4)
    world.finish(world.running[0])
    world.restart()
    world.run_all()
    assert all(LOWER in world.where[block] for block in [*hashes, *branch])


def test_slots_that_wait_for_a_client_are_not_given_to_others() -> None:
    """A slot with a holder bit is used again only when its session has resumed without it, or is gone."""
    world = World(upper=1, lower=0)
    client = world.open()
    world.store(client, chain(range(5)))
    world.restart()
    assert world.cache.pools[UPPER].free == 3 and world.cache.pools[UPPER].counts()["retired"] == 5
    world.resume(client, [True, True, False, False, False])
    assert world.cache.pools[UPPER].free == 6
    world.kill(client)
    assert world.cache.pools[UPPER].free == 8

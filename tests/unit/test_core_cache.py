"""What the cache promises to those who look up and store, case by case. The world checks every answer too."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sim.cases import LONG, crowd_out, put, put_below, read_all, small
from tests.sim.clients import chain
from tests.sim.world import LOWER, UPPER
from tierd.block import ROOT
from tierd.core.plan import DEMAND, NO_ROOM, PENDING, STORED, WRITE_BACK, Wait
from tierd.errors import Gone, Invalid

# -- finding ----------------------------------------------------------------------------------------------------------


def test_a_gap_ends_the_prefix() -> None:
    """Blocks behind a block that is nowhere are no hit, though they are there."""
    world, client = small()
    other = world.open()
    hashes = chain(range(6))
    first = world.store(client, hashes[:2])
    second = world.store(other, hashes[:4])  # blocks 2 and 3 only: the first two are pending
    world.commit(other, second)
    assert world.lookup(client, hashes).tiers == dict(gpu=0, cpu=0, nvme=0, remote=0, pending=2, miss=4)
    world.abort(client, first)
    assert world.lookup(client, hashes).tiers["miss"] == 6
    assert set(hashes[2:4]) <= set(world.where)


def test_a_later_store_links_orphans_again() -> None:
    """When the blocks of a gap are stored, what is behind it is a hit without being stored again."""
    world, client = small()
    other = world.open()
    hashes = chain(range(6))
    first = world.store(client, hashes[:2])
    world.commit(other, world.store(other, hashes))
    world.abort(client, first)
    placed = world.cache.store(client.id, b"".join(hashes), ROOT, world.now)
    assert [code if code < 0 else 0 for code in placed.slots.tolist()] == [0, 0, STORED, STORED, STORED, STORED]
    world.cache.commit(client.id, placed.lease, None, world.now)
    assert world.cache.lookup(client.id, b"".join(hashes), ROOT, world.now).told == 6
    world.cache.check()


def test_what_is_being_stored_is_pending_and_nobody_elses_to_write() -> None:
    """A second session is not given slots for blocks that a first one writes; a lookup counts them as pending."""
    world, client = small()
    other = world.open()
    hashes = chain(range(5))
    lease = world.store(client, hashes[:3])
    placed = world.cache.store(other.id, b"".join(hashes), ROOT, world.now)
    assert placed.slots[:3].tolist() == [PENDING] * 3 and (placed.slots[3:] >= 0).all()
    world.cache.abort(other.id, placed.lease)
    assert world.lookup(other, hashes).tiers["pending"] == 3
    world.commit(client, lease)
    assert world.lookup(other, hashes).tiers["cpu"] == 3


def test_two_sessions_that_store_one_chain_keep_one_copy() -> None:
    """Whoever comes second stores only what is still new, and both find all of it."""
    world, client = small()
    other = world.open()
    hashes = chain(range(8))
    first, second = world.store(client, hashes[:5]), world.store(other, hashes)
    world.commit(other, second)
    world.commit(client, first)
    assert world.cache.pools[UPPER].counts()["ready"] == 8
    assert world.lookup(client, hashes).told == world.lookup(other, hashes).told == 8


def test_a_chain_can_be_entered_in_its_middle() -> None:
    """`parent` may be any block; an unknown one makes a lookup miss and a store fail."""
    world, client = small()
    hashes = chain(range(8))
    put(world, client, hashes)
    assert world.lookup(client, hashes[3:], hashes[2]).told == 5
    put(world, client, chain([50, 51], hashes[4]), hashes[4])
    assert world.lookup(client, [*hashes[:5], *chain([50, 51], hashes[4])]).told == 7
    assert world.lookup(client, hashes[3:], chain([77])[0]).blocks == 0
    assert world.store(client, chain([60], chain([77])[0]), chain([77])[0]) is None


# -- room -------------------------------------------------------------------------------------------------------------


def test_tails_go_first_and_the_coldest_chain_before_others() -> None:
    """Under pressure a cold prefix loses its tail; what was used since stays whole."""
    world, client = small(lower=0)
    cold, warm = chain(range(8)), chain(range(50, 58))
    put(world, client, cold)
    put(world, client, warm)
    world.now += 1
    world.release(client, world.lookup(client, cold).lease)
    world.now += 1
    put(world, client, chain(range(70, 73)))
    assert [block in world.where for block in warm] == [True] * 5 + [False] * 3
    assert all(block in world.where for block in cold)


def test_leased_blocks_outlive_pressure() -> None:
    """What a session was told stays, byte for byte, however much others store."""
    world, client = small(lower=0)
    hashes = chain(range(6))
    put(world, client, hashes)
    world.lookup(client, hashes)
    other = world.open()
    for number in range(10):
        world.now += 1
        put(world, other, chain(range(100 * number + 100, 100 * number + 120)))
    assert all(UPPER in world.where[block] for block in hashes)


def test_a_store_takes_the_last_evictable_slot_and_no_more() -> None:
    """When everything is held, a store gets nothing at once; it gets all that is released."""
    world, client = small(upper=1, lower=0)
    put(world, client, chain(range(8)))
    found = world.lookup(client, chain(range(8)))
    placed = world.cache.store(client.id, b"".join(chain(range(20, 24))), ROOT, world.now)
    assert placed.lease == 0 and placed.slots.tolist() == [NO_ROOM] * 4
    world.release(client, found.lease, 6, 2)
    placed = world.cache.store(client.id, b"".join(chain(range(20, 24))), ROOT, world.now)
    assert placed.slots[2:].tolist() == [NO_ROOM] * 2 and (placed.slots[:2] >= 0).all()


def test_a_store_does_not_evict_its_own_ancestors() -> None:
    """A chain that only the upper tier has keeps its head: the rest of it finds no room instead."""
    world, client = small(upper=1, lower=0)
    hashes = chain(range(12))
    put(world, client, hashes[:8])
    world.now += 1
    assert world.store(client, hashes[8:], hashes[7]) == 0
    assert all(block in world.where for block in hashes[:8])


def test_a_chain_longer_than_its_tier_is_stored_over_the_tier_below() -> None:
    """Ancestors that are below already make room for what comes behind them."""
    world, client = small(upper=1)
    put_below(world, client, LONG)
    assert read_all(world, client, LONG) == len(LONG)


def test_nvme_gives_up_tails_and_never_a_parent() -> None:
    """A full lower tier stays prefix-closed, also while new blocks enter it."""
    world, client = small(upper=4, lower=2)
    for number in range(6):
        world.now += 1
        head = chain(range(3))
        put(world, client, head + chain(range(100 * number + 100, 100 * number + 107), head[-1]))
        world.run_all()
        world.check()
    assert world.cache.counters["evicted", "nvme", "clean"] > 0 and not world.gaps


def test_nvme_keeps_what_is_leased_and_its_parents() -> None:
    """Blocks that a lookup holds below outlive pressure there, and so does what they need to survive alone."""
    world, client = small(upper=2, lower=3)
    hashes = chain(range(6))
    put_below(world, client, hashes)
    put_below(world, client, [*hashes[:3], *chain([50], hashes[2])])  # a branch: the stem is a node of its own
    crowd_out(world, client)
    assert world.lookup(client, hashes[3:], hashes[2]).tiers["nvme"] == 3
    for number in range(4):
        world.now += 1
        put(world, client, chain(range(100 * number + 100, 100 * number + 110)))
        world.plan_write_back(16)
        for transfer in [transfer for transfer in world.running if transfer.target == "nvme"]:
            world.finish(transfer)
        world.check()
    assert world.cache.counters["evicted", "nvme", "drop"] + world.cache.counters["evicted", "nvme", "clean"] > 8
    assert all(LOWER in world.where[block] for block in hashes)


# -- ownership --------------------------------------------------------------------------------------------------------


def test_a_segment_that_is_given_up_takes_nothing_more() -> None:
    """Blocks that were being stored or moved into it are not found later, and their slots are let go."""
    world, client = small(upper=2)
    hashes = chain(range(10))
    lease = world.store(client, hashes)
    world.vacate(UPPER, 1)
    done = world.commit(client, lease)
    assert (done.committed, done.dropped) == (2, 8) or (done.committed, done.dropped) == (8, 2)
    world.check()
    assert world.collect() == 1
    world.add_segment(UPPER)
    put(world, client, hashes)
    assert world.lookup(client, hashes).told == 10
    world.check()


def test_a_transfer_into_a_segment_that_is_given_up_ends_nowhere() -> None:
    """The lease that waited goes on with another slot."""
    world, client = small()
    hashes = chain(range(3))
    put_below(world, client, hashes)
    crowd_out(world, client)
    found = world.lookup(client, hashes)
    (transfer,) = world.running
    world.vacate(UPPER, int(transfer.target_slots[0]) // 8)
    world.finish(transfer)
    world.check()
    assert isinstance(world.load(client, found.lease, 0, 3), Wait)
    world.run_all()
    assert world.load(client, found.lease, 0, 3) == 3


def test_a_block_that_came_up_and_was_stored_again_has_one_copy() -> None:
    """Whoever is second gives its slot back: a promotion after a commit, or a commit after a promotion."""
    for promotion_first in (True, False):
        world, client = small(upper=4)
        hashes = chain(range(4))
        put_below(world, client, hashes)
        crowd_out(world, client)
        put(world, client, chain([50], hashes[-1]), hashes[-1])  # keeps the chain known
        world.prefetch(hashes)
        (transfer,) = world.running
        for ordinal in sorted({int(slot) // 8 for slot in transfer.source_slots}):
            world.vacate(LOWER, ordinal)
        lease = world.store(client, hashes)
        assert lease
        if promotion_first:
            world.finish(transfer)
            world.check()
        world.commit(client, lease)
        if not promotion_first:
            world.finish(transfer)
        world.check()
        assert world.lookup(client, hashes).told == 4


def test_a_client_may_go_on_copying_what_it_says_it_holds() -> None:
    """After a restart its slots wait for it, whatever others store; what it does not name is free."""
    world, client = small(lower=0)
    hashes = chain(range(6))
    put(world, client, hashes)
    world.lookup(client, hashes)
    world.store(client, chain(range(20, 24)))
    world.restart()
    other = world.open()
    put(world, other, chain(range(100, 120)))
    client.write()
    world.check()
    lease = world.resume(client, iter([True] * 3 + [False] * 3 + [True, False, False, False]))
    for number in range(5):
        world.now += 1
        put(world, other, chain(range(200 + 20 * number, 220 + 20 * number)))
        client.write()
        world.check()
    world.release(client, lease)
    assert world.cache.pools[UPPER].counts()["retired"] == 0


def test_a_session_can_hold_only_what_it_was_told() -> None:
    """Naming another slot at resume is refused, and changes nothing."""
    world, client = small()
    put(world, client, chain(range(3)))
    with pytest.raises(Invalid, match="never told"):
        world.cache.resume(client.id, np.array([5], np.int32), np.zeros(1, np.bool_))
    world.check()


def test_a_lease_cannot_be_used_by_others_or_the_other_way() -> None:
    """Unknown leases are Gone; load and release of a store, or commit of a lookup, are Invalid."""
    world, client = small()
    put(world, client, chain(range(3)))
    reading, writing = world.lookup(client, chain(range(3))).lease, world.store(client, chain([8]))
    assert writing
    with pytest.raises(Invalid):
        world.cache.commit(client.id, reading, None, 0)
    with pytest.raises(Invalid):
        world.cache.load(client.id, writing, 0, 1, 0)
    with pytest.raises(Gone):
        world.cache.release(world.open().id, reading)
    for first, count in ((3, 1), (-1, 1), (0, 0)):
        with pytest.raises(Invalid):
            world.cache.load(client.id, reading, first, count, 0)
    world.check()


# -- misuse -----------------------------------------------------------------------------------------------------------


def test_hashes_that_are_not_a_chain_are_refused() -> None:
    """A hash that is there twice, or the root's, cannot be stored: it would have two places."""
    world, client = small()
    block = chain([1])[0]
    for hashes in ([block, chain([2])[0], block], [block, ROOT]):
        with pytest.raises(Invalid, match="chained"):
            world.cache.store(client.id, b"".join(hashes), ROOT, 0)
    world.check()


def test_a_hash_has_one_place_whatever_a_client_says() -> None:
    """A block that is known behind another parent is not entered a second time."""
    world, client = small()
    hashes, elsewhere = chain(range(4)), chain([50])
    put(world, client, hashes)
    placed = world.cache.store(client.id, elsewhere[0] + hashes[2], ROOT, world.now)
    done = world.cache.commit(client.id, placed.lease, None, world.now)
    assert (done.committed, done.dropped) == (1, 1)
    world.cache.check()
    assert world.cache.lookup(client.id, b"".join(hashes), ROOT, world.now).told == 4


def test_a_clock_that_runs_backwards_does_no_harm() -> None:
    """The order of eviction is the order of use, whatever the wall clock says."""
    world, client = small(lower=0)
    for number, now in enumerate((5_000, 3_000, 1_000, 4_000)):
        world.now = now
        put(world, client, chain(range(10 * number, 10 * number + 8)))
    assert [chain([10 * number])[0] in world.where for number in range(4)] == [False, False, True, True]


def test_transfers_say_where_from_and_why() -> None:
    """The mover gets reason, tiers and the parents of all blocks."""
    world, client = small()
    hashes = chain(range(3))
    put(world, client, hashes)
    world.plan_write_back(8)
    down = world.running[0]
    assert (down.reason, down.source, down.target) == (WRITE_BACK, "cpu", "nvme")
    assert (down.hashes, down.parents) == (b"".join(hashes), b"".join([ROOT, *hashes[:2]]))
    world.finish(down)
    crowd_out(world, client)
    world.lookup(client, hashes)
    up = world.running[0]
    assert (up.reason, up.source, up.target, up.parents) == (DEMAND, "nvme", "cpu", down.parents)

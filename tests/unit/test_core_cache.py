"""What the cache promises, case by case. The world checks every answer against its model; here is what each case is
about.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.sim.world import Client, World, chain
from tierd.block import ROOT
from tierd.core.plan import DEMAND, IO_ERROR, LOWER, MISMATCH, NO_ROOM, OK, PENDING, STORED, UPPER, WRITE_BACK, Wait
from tierd.errors import Busy, Gone, Invalid

LONG = chain(range(100, 140))
"""Longer than the upper tier of a small world."""


def small(upper: int = 2, lower: int = 8, share: float = 0.25) -> tuple[World, Client]:
    """Segments of eight slots, and one client."""
    world = World(upper, lower, slots=8, window_share=share)
    return world, world.open()


def put(world: World, client: Client, hashes: list[bytes], parent: bytes = ROOT) -> None:
    """Store and commit as much as has room."""
    if lease := world.store(client, hashes, parent):
        world.commit(client, lease)
    world.check()


def put_below(world: World, client: Client, hashes: list[bytes]) -> None:
    """Store a chain part by part, and write each part back."""
    for at in range(0, len(hashes), 4):
        put(world, client, hashes[at : at + 4], hashes[at - 1] if at else ROOT)
        world.run_all()
    assert all(LOWER in world.where[block] for block in hashes)


def crowd_out(world: World, client: Client) -> None:
    """Fill the upper tier with something else that is below too, so that everything older is only below."""
    put_below(world, client, chain(range(900, 900 + world.cache.upper.slots)))


def read_all(world: World, client: Client, hashes: list[bytes]) -> int:
    """Look up and load in windows, letting go of each; returns the blocks that were read."""
    found = world.lookup(client, hashes)
    at = 0
    while at < found.blocks:
        answer = world.load(client, found.lease, at, 4)
        if isinstance(answer, Wait):
            world.finish(next(transfer for transfer in world.running if transfer.id in answer.transfers))
        elif answer is None:
            break
        else:
            world.release(client, found.lease, at, answer)
            at += answer
        world.check()
    if found.lease:
        world.release(client, found.lease)
    return at


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
    assert world.cache.upper.counts()["ready"] == 8
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


# -- promotion --------------------------------------------------------------------------------------------------------


def test_a_prefix_longer_than_the_cpu_tier_is_served_in_windows() -> None:
    """All of it is reported, and comes up window by window as the client lets go."""
    world, client = small(upper=1)
    put_below(world, client, LONG)
    crowd_out(world, client)
    assert world.lookup(client, LONG).blocks == len(LONG)
    world.kill(client)
    assert read_all(world, world.open(), LONG) == len(LONG)


def test_a_prefix_whose_head_fills_the_cpu_tier_is_still_served_whole() -> None:
    """A lookup does not hold the whole tier for the head: the tail needs a window of it."""
    world, client = small(upper=1)
    put_below(world, client, LONG)
    crowd_out(world, client)
    read_all(world, client, LONG[:8])
    assert sum(UPPER in world.where[block] for block in LONG[:8]) == 8
    found = world.lookup(client, LONG)
    assert found.blocks == len(LONG) and 0 < found.told < 8
    world.release(client, found.lease)
    assert read_all(world, client, LONG) == len(LONG)


def test_what_a_lookup_could_do_without_is_not_held() -> None:
    """A copy above that is below too makes room for a block before it."""
    world, client = small(upper=1, share=1.0)
    other = world.open()
    hashes = chain(range(2))
    put_below(world, client, hashes)
    crowd_out(world, client)
    tail = world.lookup(client, hashes[1:], hashes[0])
    world.finish(world.running[0])
    world.release(client, tail.lease)
    world.store(other, chain(range(50, 57)))
    assert [sorted(world.where[block]) for block in hashes] == [[LOWER], [UPPER, LOWER]]
    assert world.cache.upper.free == 0
    assert world.lookup(client, hashes).blocks == 2
    assert world.running[0].hashes == hashes[0]
    world.check()


def test_two_leases_each_larger_than_the_tier_both_arrive() -> None:
    """They take turns at the slots, or are told Busy at once; neither waits for the other for ever."""
    world, client = small(upper=1, lower=12)
    other = world.open()
    second = chain(range(300, 340))
    put_below(world, client, LONG)
    put_below(world, client, second)
    readers = {client: (LONG, world.lookup(client, LONG)), other: (second, world.lookup(other, second))}
    at = dict.fromkeys(readers, 0)
    for _ in range(500):
        for reader, (hashes, found) in readers.items():
            if at[reader] == len(hashes) or not found.lease:
                continue
            answer = world.load(reader, found.lease, at[reader], 8)
            if isinstance(answer, int):
                world.release(reader, found.lease, at[reader], answer)
                at[reader] += answer
        if world.running:
            world.finish(world.running[0])
        world.check()
    assert [found.blocks for _, found in readers.values()] == list(at.values()) == [40, 40]


def test_a_block_on_its_way_up_is_moved_once() -> None:
    """Lookups of two sessions and a prefetch share one transfer."""
    world, client = small()
    other = world.open()
    hashes = chain(range(4))
    put_below(world, client, hashes)
    crowd_out(world, client)
    assert world.prefetch(hashes) == 4
    found, again = world.lookup(client, hashes), world.lookup(other, hashes)
    assert len(world.running) == 1
    world.finish(world.running[0])
    assert world.load(client, found.lease, 0, 4) == world.load(other, again.lease, 0, 4) == 4


def test_what_came_up_meanwhile_is_not_moved_again() -> None:
    """A lease takes over copies that another lookup has brought up."""
    world, client = small(share=0.1)
    other = world.open()
    hashes = chain(range(3))
    put_below(world, client, hashes)
    crowd_out(world, client)
    mine = world.lookup(client, hashes)
    assert read_all(world, other, hashes) == 3
    moved = len(world.cache.transfers)
    assert world.load(client, mine.lease, 0, 3) == 3
    assert len(world.cache.transfers) == moved == 0


def test_a_mismatch_ends_the_lease_and_its_slot_is_not_used_again() -> None:
    """Blocks before the damaged one are served, the others are Gone; the tier has one slot less."""
    world, client = small()
    hashes = chain(range(4))
    put_below(world, client, hashes)
    crowd_out(world, client)
    found = world.lookup(client, hashes)
    bad = world.where[hashes[2]][LOWER]
    world.finish(world.running[0], [OK, OK, MISMATCH, OK])
    assert world.load(client, found.lease, 0, 4) == 2
    with pytest.raises(Gone):
        world.cache.load(client.id, found.lease, 2, 1, world.now)
    assert world.cache.pools[LOWER].counts()["quarantined"] == 1
    assert world.lookup(client, hashes).blocks == 2
    put_below(world, client, chain(range(700, 760)))
    assert bad not in [at.get(LOWER) for at in world.where.values()]


def test_a_lease_ends_at_damage_that_another_one_found() -> None:
    """Also a lease that did not wait for the transfer gets no block that is not trusted any more."""
    world, client = small(share=0.1)
    other = world.open()
    hashes = chain(range(4))
    put_below(world, client, hashes)
    crowd_out(world, client)
    mine = world.lookup(client, hashes)  # waits for the first block only: a window is one block
    world.finish(world.running[0])
    theirs = world.lookup(other, hashes[2:], hashes[1])
    world.finish(world.running[0], [MISMATCH])
    assert theirs.blocks == 2
    assert world.load(client, mine.lease, 0, 2) == 1
    world.run_all()
    assert world.load(client, mine.lease, 1, 2) == 1
    with pytest.raises(Gone):
        world.cache.load(client.id, mine.lease, 2, 1, world.now)


def test_everything_held_is_busy_at_once() -> None:
    """A load that finds no slot is refused now, and served when something is released."""
    world, client = small(upper=1)
    other = world.open()
    hashes, filler = chain(range(4)), chain(range(60, 68))
    put_below(world, client, hashes)
    put_below(world, client, filler)
    held = world.lookup(other, filler)
    assert held.told == 8
    assert world.lookup(client, hashes).blocks == 0
    world.release(other, held.lease, 7, 1)
    found = world.lookup(client, hashes)
    world.finish(world.running[0])
    assert world.load(client, found.lease, 0, 1) == 1
    with pytest.raises(Busy):
        world.cache.load(client.id, found.lease, 1, 1, world.now)
    world.release(other, held.lease, 6, 1)
    assert isinstance(world.load(client, found.lease, 1, 1), Wait)


# -- write-back -------------------------------------------------------------------------------------------------------


def test_a_failed_write_back_keeps_nvme_prefix_closed() -> None:
    """Nothing behind the block that failed enters; the next commit of the chain writes all of it."""
    world, client = small()
    hashes = chain(range(8))
    put(world, client, hashes[:6])
    world.plan_write_back(8)
    world.finish(world.running[0], [OK, OK, IO_ERROR, OK, OK, OK])
    assert [LOWER in world.where[block] for block in hashes[:6]] == [True] * 2 + [False] * 4
    put(world, client, hashes[6:], hashes[5])
    world.run_all()
    assert all(LOWER in world.where[block] for block in hashes)


def test_writes_of_one_chain_are_entered_in_its_order() -> None:
    """Parts that are under way together may end in any order: a child waits for its parent, and both are below then."""
    world, client = small()
    hashes = chain(range(8))
    put(world, client, hashes)
    while world.plan_write_back(3):
        pass
    assert [len(transfer) for transfer in world.running] == [3, 3, 2]
    for transfer in world.running[::-1]:
        assert not any(LOWER in world.where[block] for block in hashes)
        world.finish(transfer)
        world.check()
    assert all(LOWER in world.where[block] for block in hashes)
    assert not world.cache.transfers


def test_a_child_of_a_failed_write_does_not_enter() -> None:
    """It was written, but its parent is not below: its slot is free again."""
    world, client = small()
    hashes = chain(range(4))
    put(world, client, hashes)
    world.plan_write_back(2)
    world.plan_write_back(2)
    parent, child = world.running
    world.finish(child)
    world.finish(parent, [OK, IO_ERROR])
    assert [LOWER in world.where[block] for block in hashes] == [True, False, False, False]
    assert world.cache.pools[LOWER].free == 63
    world.check()


def test_write_back_takes_ancestors_along() -> None:
    """A chain that was committed from its end is written from its head, each block once."""
    world, client = small()
    other = world.open()
    hashes = chain(range(6))
    first = world.store(client, hashes[:3])
    world.commit(other, world.store(other, hashes))
    assert not world.plan_write_back(8)
    assert world.cache.counters["write_back_orphans",] == 3
    world.commit(client, first)
    world.cache.write_back.queue.clear()
    put(world, client, chain([9], hashes[-1]), hashes[-1])
    world.run_all()
    assert all(LOWER in world.where[block] for block in hashes)


def test_write_back_makes_no_room_at_the_cost_of_its_own_chain() -> None:
    """What a full nvme tier cannot take is dropped and counted; the chain's head stays below."""
    world, client = small(upper=4, lower=1)
    hashes = chain(range(12))
    put(world, client, hashes)
    world.run_all()
    assert [LOWER in world.where[block] for block in hashes] == [True] * 8 + [False] * 4
    assert world.cache.counters["write_back_short",] > 0


def test_the_queue_is_bounded() -> None:
    """Without a medium that keeps up, the oldest runs are forgotten and counted."""
    world, client = small()
    for number in range(40):
        world.now += 1
        put(world, client, chain(range(10 * number, 10 * number + 8)))
    assert world.cache.write_back.blocks <= 4 * world.cache.upper.slots
    assert world.cache.counters["write_back_dropped",] > 0


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
    assert world.cache.upper.counts()["retired"] == 0


def test_a_session_can_hold_only_what_it_was_told() -> None:
    """Naming another slot at resume is refused, and changes nothing."""
    world, client = small()
    put(world, client, chain(range(3)))
    with pytest.raises(Invalid, match="never told"):
        world.cache.resume(client.id, np.array([5], np.int32))
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

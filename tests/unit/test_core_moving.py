"""Promotion and write-back, case by case: windows, single flight, order, damage. The world checks every answer too."""

from __future__ import annotations

import pytest

from tests.sim.cases import LONG, crowd_out, put, put_below, read_all, small
from tests.sim.clients import Client, chain
from tests.sim.world import LOWER, UPPER, World
from tierd.core.ahead import LATE, PREFETCHED, USEFUL, WASTED
from tierd.core.plan import IO_ERROR, MISMATCH, OK, Wait
from tierd.core.promotion import pieces
from tierd.errors import Busy, Gone

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
    assert world.cache.pools[UPPER].free == 0
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
    assert world.prefetch(hashes) == 4 and not world.cache.hastened
    found, again = world.lookup(client, hashes), world.lookup(other, hashes)
    assert world.cache.hastened == world.running and len(world.running) == 1
    world.finish(world.running[0])
    assert world.load(client, found.lease, 0, 4) == world.load(other, again.lease, 0, 4) == 4


def fates(world: World) -> tuple[int, ...]:
    """Prefetched blocks that were useful, late and wasted."""
    return tuple(world.cache.counters[PREFETCHED, fate] for fate in (USEFUL, LATE, WASTED))


def prefetched(world: World, client: Client, blocks: int = 4) -> list[bytes]:
    """A chain that is below alone, and on its way up before anybody wants it."""
    hashes = chain(range(blocks))
    put_below(world, client, hashes)
    crowd_out(world, client)
    assert world.prefetch(hashes) == blocks
    return hashes


def test_a_prefetched_block_is_useful_when_it_is_read_from_its_tier() -> None:
    """Once, however often it is read; what nobody has read yet is not counted."""
    world, client = small()
    hashes = prefetched(world, client)
    world.finish(world.running[0])
    assert fates(world) == (0, 0, 0)
    for _ in range(2):
        assert read_all(world, client, hashes[:3]) == 3
    assert fates(world) == (3, 0, 0)
    world.check()


def test_a_prefetched_block_that_somebody_waited_for_is_late() -> None:
    """It is not useful as well when it is read then."""
    world, client = small()
    hashes = prefetched(world, client)
    assert read_all(world, client, hashes[:1]) == 1
    assert read_all(world, client, hashes) == 4
    assert fates(world) == (3, 1, 0)
    world.check()


def test_a_prefetched_block_that_leaves_unread_is_wasted() -> None:
    """Evicted, or come to a segment that is being given up."""
    world, client = small()
    hashes = prefetched(world, client)
    world.finish(world.running[0])
    crowd_out(world, client, 700)
    assert fates(world) == (0, 0, 4)
    assert world.prefetch(hashes) == 4
    world.vacate(UPPER, int(world.running[0].target_slots[0]) // 8)
    world.finish(world.running[0])
    assert fates(world) == (0, 0, 8)
    world.check()


def test_a_prefetched_block_that_cannot_be_read_is_none_of_these() -> None:
    """It was not moved."""
    world, client = small()
    prefetched(world, client)
    world.finish(world.running[0], [OK, OK, IO_ERROR, OK])
    crowd_out(world, client, 700)
    assert fates(world) == (0, 0, 3)


def test_what_came_up_meanwhile_is_not_moved_again() -> None:
    """A lease takes over copies that another lookup has brought up."""
    world, client = small(share=0.1)
    other = world.open()
    hashes = chain(range(3))
    put_below(world, client, hashes)
    crowd_out(world, client)
    mine = world.lookup(client, hashes)
    assert read_all(world, other, hashes) == 3
    for at in range(3):
        assert world.load(client, mine.lease, at, 1) == 1
        assert not world.cache.transfers


def test_a_block_whose_transfer_was_for_nothing_is_asked_for_again() -> None:
    """The segment that it was to come to is given up: when its turn to be loaded comes, it is brought to another one."""
    world, client = small(share=1.0)
    hashes = chain(range(4))
    put_below(world, client, hashes)
    crowd_out(world, client)
    found = world.lookup(client, hashes)
    [transfer] = world.running
    world.vacate(UPPER, int(transfer.target_slots[0]) // 8)
    world.finish(transfer)
    assert isinstance(world.load(client, found.lease, 0, 4), Wait)
    world.finish(world.running[0])
    assert world.load(client, found.lease, 0, 4) == 4
    world.check()


def test_the_last_transfers_of_a_lease_are_smaller() -> None:
    """Whoever loads has little left to copy when the last block has come; no block is left out or moved twice."""
    for blocks in range(1, 200):
        cuts = list(pieces(0, blocks, 16, tapers=True))
        sizes = [end - first for first, end in cuts]
        assert [first for first, _ in cuts] == [0, *(end for _, end in cuts[:-1])] and sum(sizes) == blocks
        assert sizes[-1] <= 7 and max(sizes) <= 16 and min(sizes[:-1], default=4) >= 4
    assert [end - first for first, end in pieces(3, 42, 16, tapers=False)] == [16, 16, 7]


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
    world.cache.write_back.queues[LOWER].runs.clear()
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
    assert world.cache.write_back.queues[LOWER].blocks <= 4 * world.cache.pools[UPPER].slots
    assert world.cache.counters["write_back_dropped",] > 0

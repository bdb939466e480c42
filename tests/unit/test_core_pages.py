"""Slots as pages, and three tiers: what the cache promises to engines that compute in its slots, case by case."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sim.clients import Client, Place, chain
from tests.sim.pages import PagedWorld
from tierd.block import ROOT
from tierd.core.plan import DEMAND, NAMED, UNNAMED, WRITE_BACK, Hint, Wait
from tierd.core.policy.chd import Chd, own_kind
from tierd.errors import Busy, Invalid

GPU, CPU, NVME = 0, 1, 2


def three(gpu: int = 2, cpu: int = 3, nvme: int = 8) -> tuple[PagedWorld, Client]:
    """Segments of eight slots in three tiers, and one engine in the top one."""
    world = PagedWorld(cpu, nvme, slots=8, gpu=gpu)
    return world, world.open(GPU)


def compute(world: PagedWorld, client: Client, hashes: list[bytes], parent: bytes = ROOT) -> list[Place]:
    """Reserve, fill and name a page for each block; returns those that are blocks now."""
    places = world.reserve(client, len(hashes))
    naming = list(zip(places, [parent, *hashes[:-1]], hashes, strict=True))
    codes = world.commit_pages(client, naming)
    world.check()
    return [place for place, code in zip(places, codes, strict=True) if code == NAMED]


def pending(world: PagedWorld, reason: str) -> list[tuple[str, str, int]]:
    """Transfers under way for one reason: source, target, blocks."""
    return [(run.source, run.target, len(run)) for run in world.running if run.reason == reason]


# -- pages ------------------------------------------------------------------------------------------------------------


def test_a_named_page_is_a_hit_in_its_own_slot() -> None:
    """Nothing is copied: whoever looks the block up in the tier is told the slot that it was computed in."""
    world, client = three()
    hashes = chain(range(5))
    places = compute(world, client, hashes)
    found = world.lookup(world.open(GPU), hashes)
    assert found.tiers["gpu"] == found.told == 5 and not world.running
    assert [world._place(GPU, slot) for slot in found.slots.tolist()] == places


def test_a_duplicate_is_answered_with_the_slot_that_has_it() -> None:
    """Who computes a block for the second time goes on with the first one's page, and keeps its own to use again."""
    world, client = three()
    other, hashes = world.open(GPU), chain(range(3))
    first = compute(world, client, hashes)
    spare = world.reserve(other, 3)
    codes = world.commit_pages(other, list(zip(spare, [ROOT, *hashes[:-1]], hashes, strict=True)))
    assert [world._place(GPU, code) for code in codes] == first
    more = chain(range(50, 53))
    assert world.commit_pages(other, list(zip(spare, [ROOT, *more[:-1]], more, strict=True))) == [NAMED] * 3
    world.release_pages(client, first)
    world.check()
    assert all(other.pages[place].times == 1 for place in [*first, *spare])


def test_a_parent_may_be_anywhere_in_the_request() -> None:
    """Blocks are named in the order of their chain, whatever the order of the request."""
    world, client = three()
    hashes = chain(range(4))
    naming = list(zip(world.reserve(client, 4), [ROOT, *hashes[:-1]], hashes, strict=True))
    assert world.commit_pages(client, naming[::-1]) == [NAMED] * 4
    assert world.lookup(client, hashes).told == 4


def test_without_a_parent_a_page_stays_reserved() -> None:
    """Its block cannot be reached: the page is the session's alone, and can be named later."""
    world, client = three()
    hashes = chain(range(2))
    (page,) = world.reserve(client, 1)
    assert world.commit_pages(client, [(page, hashes[0], hashes[1])]) == [UNNAMED]
    compute(world, client, hashes[:1])
    assert world.commit_pages(client, [(page, hashes[0], hashes[1])]) == [NAMED]


def test_a_block_that_is_only_below_comes_up_by_being_computed() -> None:
    """The page becomes its copy in the gpu tier; nothing is moved."""
    world, client = three()
    hashes = chain(range(4))
    world.commit(copier := world.open(CPU), world.store(copier, hashes))
    places = compute(world, client, hashes)
    assert len(places) == 4 and all({GPU, CPU} <= world.where[block].keys() for block in hashes)
    assert world.lookup(client, hashes).tiers["gpu"] == 4


def test_reserved_pages_are_nobody_elses_and_end_with_their_session() -> None:
    """They are not evicted however much others want; the death of the process frees them at once."""
    world, client = three(gpu=1)
    other = world.open(GPU)
    world.reserve(client, 6)
    assert len(world.reserve(other, 5)) == 2
    with pytest.raises(Busy, match="every page"):
        world.cache.reserve(other.id, 1, world.now)
    world.kill(client)
    assert len(world.reserve(other, 6)) == 6


def test_pages_outlive_pressure_until_the_last_hold_is_gone() -> None:
    """A page that was given twice is released twice; then it may be evicted, not before."""
    world, client = three(gpu=1)
    hashes = chain(range(4))
    places = compute(world, client, hashes)
    twin = world.reserve(client, 4)
    world.commit_pages(client, list(zip(twin, [ROOT, *hashes[:-1]], hashes, strict=True)))
    world.release_pages(client, [*twin, *places])
    assert world.reserve(client, 8) == world.reserve(client, 1) or len(world.cache.sessions[client.id].all_pages()) == 8
    assert all(GPU in world.where[block] for block in hashes)
    world.release_pages(client, [place for place, page in client.pages.items() if not page.block])
    world.release_pages(client, places)
    assert len(world.reserve(client, 8)) == 8 and not any(GPU in world.where.get(block, {}) for block in hashes)


def test_what_a_session_does_not_hold_it_cannot_name_or_release() -> None:
    """Numbers from nowhere, of others, or too often are refused before anything has changed."""
    world, client = three()
    (page,) = world.reserve(client, 1)
    mine, (block,) = world._number(GPU, page), chain([1])
    other = world.open(GPU)
    for slots, session in (([mine + 1], client), ([-1], client), ([1 << 30], client), ([mine], other)):
        with pytest.raises(Invalid, match="not held"):
            world.cache.commit_pages(session.id, np.array(slots, np.int32), ROOT, block, world.now)
        with pytest.raises(Invalid, match="more often"):
            world.cache.release_pages(session.id, np.array(slots, np.int32))
    with pytest.raises(Invalid, match="more often"):
        world.cache.release_pages(client.id, np.array([mine, mine], np.int32))
    with pytest.raises(Invalid, match="twice"):
        world.cache.commit_pages(client.id, np.array([mine, mine], np.int32), ROOT + block, block * 2, world.now)
    with pytest.raises(Invalid, match="64 and 32 bytes"):
        world.cache.commit_pages(client.id, np.array([mine], np.int32), ROOT + block, block, world.now)
    with pytest.raises(Invalid, match="say so in hello"):
        world.cache.reserve(world.open(CPU).id, 1, world.now)
    world.check()


def test_a_chain_that_bites_its_tail_is_refused() -> None:
    """A hash that comes twice in one chain, or is all zeros, would be in the tree twice."""
    world, client = three()
    slots = np.array([world._number(GPU, place) for place in world.reserve(client, 2)], np.int32)
    one, two = chain([1]), chain([2])
    for parents, hashes in ((ROOT + one[0], one[0] + one[0]), (ROOT + two[0], two[0] + ROOT)):
        with pytest.raises(Invalid, match="twice, or all zeros" if ROOT in hashes else "in a chain twice"):
            world.cache.commit_pages(client.id, slots, parents, hashes, world.now)
    world.check()


def test_a_hint_stays_with_the_last_block_of_a_turn() -> None:
    """Why a turn ended is counted, and kept where the next turn would continue; a turn without a block is counted too."""
    world, client = three()
    hashes = chain(range(4))
    places = compute(world, client, hashes)
    world.cache.ended(hashes[-1], Hint("tool_use", "talk"))
    world.cache.ended(ROOT, Hint("tool_use", None))
    world.release_pages(client, places)
    entry = world.cache.index.find(hashes[-1])
    assert entry and entry[0].hint == Hint("tool_use", "talk")
    assert world.cache.counters["turn", "tool_use"] == 2


def test_the_end_of_a_turn_moves_its_chain_in_an_order_that_learns() -> None:
    """Under chd every run of a conversation is of the class of what its turn ended with; one that was not said, of another."""
    world = PagedWorld(3, 8, slots=8, gpu=2, policies={"gpu": "chd"})
    client = world.open(GPU)
    said, silent = chain(range(4)), chain([9, 8, 7])
    for hashes in (said, silent):
        world.lookup(client, hashes)
        compute(world, client, hashes)
    world.cache.ended(said[-1], Hint("tool_use", None))
    kinds = []
    for hashes in (said, silent):
        order, entry = world.cache.index.orders[GPU], world.cache.index.find(hashes[-1])
        assert isinstance(order, Chd) and entry
        kinds.append({order._runs[node].kind for node in world.cache.index.path(entry[0]) if node in order._runs})
    assert kinds == [{own_kind(1, "tool_use")}, {own_kind(1, None)}]


# -- lives ------------------------------------------------------------------------------------------------------------


def test_pages_outlive_the_daemon() -> None:
    """After a restart reserved pages are reserved and named ones are blocks, for as long as the engine says."""
    world, client = three()
    hashes = chain(range(3))
    named, reserved = compute(world, client, hashes), world.reserve(client, 2)
    world.restart()
    world.resume(client)
    world.check()
    assert world.lookup(client, hashes).tiers["gpu"] == 3
    more = chain([7, 8], hashes[-1])
    naming = list(zip(reserved, [hashes[-1], *more[:-1]], more, strict=True))
    assert world.commit_pages(client, naming) == [NAMED] * 2
    world.release_pages(client, [*named, *reserved])
    world.check()


def test_a_name_whose_answer_got_lost_can_be_given_again() -> None:
    """The engine does not know whether its pages were named before the daemon died: asking again is right either way."""
    world, client = three()
    hashes = chain(range(3))
    naming = list(zip(world.reserve(client, 3), [ROOT, *hashes[:-1]], hashes, strict=True))
    world.commit_pages(client, naming, answered=False)
    world.restart()
    world.resume(client)
    assert world.commit_pages(client, naming) == [NAMED] * 3
    world.release_pages(client, [place for place, _, _ in naming])
    world.check()
    assert not world.cache.pools[GPU].users.any()


def test_what_a_resumed_session_does_not_name_is_free() -> None:
    """Pages that an engine forgot, or whose answer it never got, can be had by others."""
    world, client = three(gpu=1)
    world.reserve(client, 8)
    world.restart()
    world.resume(client, [True] * 3 + [False] * 5)
    assert len(world.reserve(world.open(GPU), 8)) == 5


def test_a_page_whose_segment_is_given_up_is_its_engines_until_released() -> None:
    """It is answered as named, since others may have read it before; nobody finds it, and its slot goes with the hold."""
    world, client = three()
    hashes = chain(range(16))
    places = world.reserve(client, 16)
    world.vacate(GPU, 1)
    codes = world.commit_pages(client, list(zip(places, [ROOT, *hashes[:-1]], hashes, strict=True)))
    assert codes == [NAMED] * 16
    assert sum(GPU in at for at in world.where.values()) == 8
    world.release_pages(client, places)
    assert world.collect() == 1


# -- three tiers ------------------------------------------------------------------------------------------------------


def test_what_was_named_goes_down_the_ladder() -> None:
    """First to cpu, then from there to nvme; gpu evictions are clean then."""
    world, client = three(gpu=1)
    hashes = chain(range(6))
    places = compute(world, client, hashes)
    assert world.plan_write_back(8)
    assert pending(world, WRITE_BACK) == [("gpu", "cpu", 6)]
    world.finish(world.running[0])
    assert world.plan_write_back(8)
    assert pending(world, WRITE_BACK) == [("cpu", "nvme", 6)]
    world.run_all()
    assert all(world.where[block].keys() == {GPU, CPU, NVME} for block in hashes)
    world.release_pages(client, places)
    world.reserve(client, 8)
    assert world.cache.counters["evicted", "gpu", "clean"] == 6 and not world.cache.counters["evicted", "gpu", "drop"]


def test_without_room_in_cpu_blocks_go_straight_to_nvme() -> None:
    """A cpu tier that is held by others delays nothing."""
    world, client = three(cpu=1)
    copier = world.open(CPU)
    world.commit(copier, world.store(copier, chain(range(20, 28))))
    world.lookup(copier, chain(range(20, 28)))
    hashes = chain(range(4))
    compute(world, client, hashes)
    world.run_all()
    assert all(world.where[block].keys() == {GPU, NVME} for block in hashes)


def test_what_is_below_anyway_is_not_copied_to_cpu() -> None:
    """Its eviction is clean already; cpu keeps its room for others."""
    world, client = three()
    hashes = chain(range(4))
    places = compute(world, client, hashes)
    world.run_all()
    world.release_pages(client, places)
    world.vacate(CPU, world.where[hashes[0]][CPU] // 8)
    world.cache.write_back.push(GPU, ROOT, b"".join(hashes))
    world.run_all()
    assert all(CPU not in world.where[block] for block in hashes)


def test_a_block_comes_from_the_closest_copy() -> None:
    """A prefix that is partly in cpu and else in nvme is brought up by one transfer from each."""
    world, client = three(gpu=2, cpu=2)
    hashes = chain(range(6))
    world.release_pages(client, compute(world, client, hashes))
    world.run_all()
    for block in hashes[3:]:  # as if cpu had made room
        entry = world.cache.index.find(block)
        assert entry
        world.cache.pools[CPU].retire(world.cache.index.clear(CPU, entry[0], np.array([entry[1]])))
        del world.where[block][CPU]
    world.release_pages(client, world.reserve(client, 16))
    assert world.cache._promotion.window(GPU) == 4
    assert world.lookup(client, hashes).tiers == dict(gpu=0, cpu=3, nvme=3, remote=0, pending=0, miss=0)
    assert pending(world, DEMAND) == [("cpu", "gpu", 3), ("nvme", "gpu", 1)]


def test_a_copying_client_is_brought_what_only_an_engine_has() -> None:
    """A session of the cpu tier finds what is in gpu: it is copied down while it waits."""
    world, client = three()
    hashes = chain(range(3))
    compute(world, client, hashes)
    copier = world.open(CPU)
    found = world.lookup(copier, hashes)
    assert (found.blocks, found.told) == (3, 0) and found.tiers["gpu"] == 3
    assert pending(world, DEMAND) == [("gpu", "cpu", 3)]
    assert isinstance(world.load(copier, found.lease, 0, 3), Wait)
    world.run_all()
    assert world.load(copier, found.lease, 0, 3) == 3


def test_a_chain_longer_than_every_tier_in_memory_is_read_through_the_top_one() -> None:
    """Windows of it come up from wherever they are."""
    world, client = three(gpu=1, cpu=1, nvme=8)
    hashes = chain(range(40))
    for at in range(0, 40, 4):
        world.release_pages(client, compute(world, client, hashes[at : at + 4], hashes[at - 1] if at else ROOT))
        world.run_all()
    found, at = world.lookup(client, hashes), 0
    while at < found.blocks:
        answer = world.load(client, found.lease, at, 4)
        if isinstance(answer, int):
            world.release(client, found.lease, at, answer)
            at += answer
        else:
            world.run_all()
    assert at == 40

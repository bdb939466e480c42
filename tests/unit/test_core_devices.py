"""Several devices: a gpu tier on each of them, above one cpu and one nvme tier, over one index."""

from __future__ import annotations

import numpy as np

from tests.sim.clients import Client, chain
from tests.sim.pages import PagedWorld
from tests.sim.pins import copies, pin
from tests.unit.test_core_pages import compute, pending
from tierd.core.plan import DEMAND, WRITE_BACK, Wait

FIRST, SECOND, CPU, NVME = range(4)


def two(gpu: int = 2, cpu: int = 4, nvme: int = 8) -> tuple[PagedWorld, Client, Client]:
    """Segments of eight slots on two devices, in cpu and nvme, and an engine on each device."""
    world = PagedWorld(cpu, nvme, slots=8, gpu=gpu, devices=2)
    return world, world.open(FIRST), world.open(SECOND)


def lose(world: PagedWorld, hashes: list[bytes], tier: int) -> None:
    """Take copies away, as if the tier had made room."""
    for block in hashes:
        entry = world.cache.index.find(block)
        assert entry
        world.cache.pools[tier].retire(world.cache.index.clear(tier, entry[0], np.array([entry[1]])))
        del world.where[block][tier]


def test_what_is_named_on_any_device_goes_down_to_the_same_tiers() -> None:
    """Each device's blocks are copied to cpu, and from there to nvme; never to another device."""
    world, one, other = two()
    mine, theirs = chain(range(4)), chain(range(20, 26))
    compute(world, one, mine)
    compute(world, other, theirs)
    assert world.plan_write_back(8) and world.plan_write_back(8)
    assert pending(world, WRITE_BACK) == [("gpu0", "cpu", 4), ("gpu1", "cpu", 6)]
    world.run_all()
    assert all(world.where[block].keys() == {FIRST, CPU, NVME} for block in mine)
    assert all(world.where[block].keys() == {SECOND, CPU, NVME} for block in theirs)


def test_what_another_device_computed_is_found_and_comes_through_cpu() -> None:
    """It is a hit of the cpu tier: that is where it is read, though the other device has it too. Both have it then."""
    world, one, other = two()
    hashes = chain(range(4))
    compute(world, one, hashes)
    world.run_all()
    found = world.lookup(other, hashes)
    assert (found.blocks, found.told, found.tiers["cpu"]) == (4, 0, 4)
    assert pending(world, DEMAND) == [("cpu", "gpu1", 4)]
    world.run_all()
    assert world.load(other, found.lease, 0, 4) == 4
    assert all(world.where[block].keys() == {FIRST, SECOND, CPU, NVME} for block in hashes)


def test_what_only_another_device_has_comes_from_there() -> None:
    """It counts for gpu, and is read from the other device's slots, which stay the other engine's."""
    world, one, other = two()
    hashes = chain(range(4))
    compute(world, one, hashes)
    found = world.lookup(other, hashes)
    assert (found.blocks, found.told, found.tiers["gpu"]) == (4, 0, 4)
    assert pending(world, DEMAND) == [("gpu0", "gpu1", 4)]
    assert isinstance(world.load(other, found.lease, 0, 4), Wait)
    world.run_all()
    assert world.load(other, found.lease, 0, 4) == 4


def test_another_device_is_closer_than_nvme() -> None:
    """A prefix of which cpu has only the head comes from there, and the rest from the other device, though nvme has it all."""
    world, one, other = two()
    hashes = chain(range(4))
    compute(world, one, hashes)
    world.run_all()
    lose(world, hashes[2:], CPU)
    found = world.lookup(other, hashes)
    assert (found.tiers["cpu"], found.tiers["gpu"], found.tiers["nvme"]) == (2, 2, 0)
    assert pending(world, DEMAND) == [("cpu", "gpu1", 2), ("gpu0", "gpu1", 2)]


def test_each_device_makes_room_by_itself() -> None:
    """An engine that fills its device with new pages takes nothing from another device, however cold that is."""
    world, one, other = two(gpu=1)
    hashes = chain(range(6))
    world.release_pages(one, compute(world, one, hashes))
    world.run_all()
    for first in (100, 200, 300):
        world.now += 1000
        world.release_pages(other, compute(world, other, chain(range(first, first + 8))))
    assert all(FIRST in world.where[block] for block in hashes)
    assert world.cache.counters["evicted", "gpu0", "clean"] == world.cache.counters["evicted", "gpu0", "drop"] == 0
    assert world.lookup(one, hashes).told == 6


def test_two_devices_may_compute_the_same_block() -> None:
    """Each keeps its own page under the name: a duplicate is one of the same device only. Below it is stored once."""
    world, one, other = two()
    hashes = chain(range(4))
    assert len(compute(world, one, hashes)) == len(compute(world, other, hashes)) == 4
    assert all(world.where[block].keys() == {FIRST, SECOND} for block in hashes)
    world.run_all()
    assert world.cache.counters["written",] == 4
    assert world.lookup(one, hashes).told == world.lookup(other, hashes).told == 4


def test_a_restart_finds_every_device_as_it_was() -> None:
    """What was on a device is there again, and what was not yet below goes down."""
    world, one, other = two()
    mine, theirs = chain(range(4)), chain(range(20, 26))
    compute(world, one, mine)
    compute(world, other, theirs)
    before = {block: dict(at) for block, at in world.where.items()}
    world.restart()
    assert world.where == before
    world.run_all()
    assert all(NVME in world.where[block] for block in mine + theirs)


def test_a_pin_holds_one_page_of_what_only_devices_have_and_none_of_what_is_below() -> None:
    """The block stays though both engines fill their devices; on the other one it goes, as one that was computed in vain."""
    world, one, other = two(gpu=1, cpu=1, nvme=0)
    hashes, below = chain(range(2)), chain(range(10, 14))
    world.store(world.open(), chain(range(500, 508)))  # fills the cpu tier, and is never committed
    for engine in (one, other):
        world.release_pages(engine, compute(world, engine, hashes))
    pin(world, hashes[-1], 1)
    assert sorted(tier for tier, _ in copies(world)) == [SECOND] * 2
    assert world.cache.pools[SECOND].pinned and not world.cache.pools[FIRST].pinned
    for engine, first in ((one, 100), (other, 200)):
        world.release_pages(engine, world.reserve(engine, 6 if engine is other else 8))
        compute(world, engine, chain(range(first, first + 6)))
    assert all(world.where[block].keys() == {SECOND} for block in hashes)
    world, one, other = two()
    compute(world, one, below)
    compute(world, other, below)
    world.run_all()
    pin(world, below[-1], 1)
    assert sorted({tier for tier, _ in copies(world)}) == [CPU, NVME]

"""The keeper on real segments: how memory changes hands, what it costs who loses it, and a medium that is slow or full."""

from __future__ import annotations

import asyncio
import os
from threading import Event
from typing import Any

import pytest

from tierd import clock
from tierd import purge as purging
from tierd.block import ROOT, chain
from tierd.errors import Busy
from tierd.keeper import Keeper, until
from tierd.layout import Layout, Namespace
from tierd.purge import leave, purge
from tierd.space import Space
from tierd.tiers.host import HostSegment
from tierd.tiers.segment import HEADER_BYTES, Header
from tierd.tiers.tier import MemorySegment, MemoryTier, Tier

LAYOUT = Layout(layers=1, kv_heads=1, head_dim=64, dtype="float16")
SEGMENT_BYTES = 256 << 10


class FaultyTier(MemoryTier):
    """Memory that can be told to refuse a new segment, and to take its time."""

    def __init__(self, segments: int) -> None:
        super().__init__("cpu", segments * SEGMENT_BYTES, SEGMENT_BYTES, "off")
        self.is_full = False
        self.may_go_on = Event()
        self.may_go_on.set()

    def create(self, namespace: Namespace, ordinal: int, epoch: int) -> HostSegment:
        self.may_go_on.wait(20)
        if self.is_full:
            raise Busy("the machine has no memory left")
        return super().create(namespace, ordinal, epoch)


class SlowToEnd(FaultyTier):
    """Memory that takes its time to be given up."""

    def __init__(self, segments: int) -> None:
        super().__init__(segments)
        self.may_end = Event()
        self.may_end.set()

    def discard(self, segment: MemorySegment) -> bool:
        self.may_end.wait(20)
        return super().discard(segment)


def space_of(keeper: Keeper, model: str) -> Space:
    """A namespace that the keeper serves."""
    namespace = Namespace("test", model, LAYOUT)
    tiers: list[Tier] = keeper.tiers
    space = keeper.spaces[namespace.id] = Space(namespace, tiers, 0.25, write_back=True)
    return space


async def full_of(keeper: Keeper, model: str, segments: int) -> Space:
    """A namespace with as many segments, full of blocks that nobody uses."""
    space = space_of(keeper, model)
    arena = space.arenas[0]
    for _ in range(segments):
        assert await keeper.grow(space, arena)
    space.cache.open_session(1, 0, 0)
    placed = space.cache.store(1, chain(list(range(arena.pool.slots)), 1, ROOT), ROOT, 1)
    assert space.cache.commit(1, placed.lease, None, 1).committed == arena.pool.slots
    assert arena.pool.free == 0
    return space


def test_memory_that_the_machine_refuses_costs_a_namespace_one_segment_and_not_all() -> None:
    """The new segment cannot be made: whoever waits for it is told, and nobody else loses blocks for it."""

    async def story() -> None:
        tier = FaultyTier(4)
        keeper = Keeper([tier], 1)
        old, new = await full_of(keeper, "old", 4), space_of(keeper, "new")
        tier.is_full = True
        for _ in range(3):
            with pytest.raises(Busy, match="its medium is full"):
                await keeper.supply(new, 0, 1)
        assert len(old.arenas[0].segments) == 3
        assert tier.budget.used == 3 * old.arenas[0].geometry.total_bytes
        await keeper.close()

    asyncio.run(story())


def test_memory_given_up_for_another_is_not_taken_back() -> None:
    """The one that lost a segment asks for memory at every turn, and the one that it was given up for has it."""

    async def story() -> None:
        keeper = Keeper([FaultyTier(4)], 1)
        old, new = await full_of(keeper, "old", 4), space_of(keeper, "new")

        async def greedy() -> None:
            while True:
                keeper.supply_ahead(old, 0)
                await asyncio.sleep(0)

        background = asyncio.create_task(greedy())
        await keeper.supply(new, 0, 1)
        background.cancel()
        assert (len(old.arenas[0].segments), len(new.arenas[0].segments)) == (3, 1)
        assert keeper.handovers == 1
        await keeper.close()

    asyncio.run(story())


def test_a_sync_ends_while_others_go_on_storing() -> None:
    """It waits for what was committed before it; the queue is never empty meanwhile."""

    async def story() -> None:
        above, below = FaultyTier(2), FaultyTier(2)
        below.name = "nvme"
        keeper = Keeper([above, below], 1)
        space = await full_of(keeper, "busy", 2)

        async def others() -> None:
            for seed in range(1, 1_000_000):
                placed = space.cache.store(1, chain([seed << 8 | at for at in range(8)], 1, ROOT), ROOT, 1)
                if placed.lease:
                    space.cache.commit(1, placed.lease, None, 1)
                await asyncio.sleep(0)

        background = asyncio.create_task(others())
        await asyncio.sleep(0.01)
        await keeper.sync(clock.monotonic_seconds() + 20)
        assert keeper.unwritten() > 0, "the others made a pause, so nothing was shown"
        assert space.cache.counters["written",] > 0
        background.cancel()
        await keeper.close()

    asyncio.run(story())


def test_commits_while_a_slow_medium_grows_do_not_pile_up() -> None:
    """However often write-back is asked to go on meanwhile, one growth is all that waits."""

    async def story() -> None:
        above, below = FaultyTier(2), FaultyTier(2)
        below.name = "nvme"
        keeper = Keeper([above, below], 1)
        space = await full_of(keeper, "busy", 2)
        below.may_go_on.clear()
        before = len(asyncio.all_tasks())
        for _ in range(1000):
            keeper.pump(space)
        assert len(asyncio.all_tasks()) == before + 1
        assert space.arenas[1].growing is not None
        below.may_go_on.set()
        assert await space.arenas[1].growing
        await keeper.close()

    asyncio.run(story())


def test_a_segment_that_is_being_made_while_its_namespace_is_purged_belongs_to_the_new_epoch() -> None:
    """What is stored in it afterwards is not taken for something that was purged, by a later life either."""

    async def scenario() -> None:
        tier = FaultyTier(2)
        keeper = Keeper([tier], io_threads=1)
        space = space_of(keeper, "a")
        arena = space.arenas[0]
        tier.may_go_on.clear()
        growing = asyncio.create_task(keeper.grow(space, arena))
        await asyncio.sleep(0)
        assert (await purge(keeper, space, shred=False)).segments == 0
        tier.may_go_on.set()
        assert await growing
        (segment,) = arena.segments.values()
        on_medium = Header.unpack(os.pread(segment.directory_fd, HEADER_BYTES, 0))
        assert on_medium.epoch == segment.directory.epoch == space.epoch == 2
        await keeper.close()

    asyncio.run(scenario())


def test_a_purged_namespace_is_not_forgotten_before_its_last_segment_is_gone() -> None:
    """Whoever waits for the bytes to be overwritten would take it for done, and its name would begin at an older epoch."""

    async def scenario() -> None:
        tier = SlowToEnd(1)
        keeper = Keeper([tier], io_threads=1)
        space = await full_of(keeper, "a", 1)
        space.cache.close_session(1)
        tier.may_end.clear()
        assert (await purge(keeper, space, shred=True)).segments == 1
        gone = asyncio.create_task(leave(space))
        async with asyncio.timeout(20):
            await until(lambda: bool(space.arenas[0].leaving))
            keeper.forget_empty()
            assert list(keeper.spaces.values()) == [space] and space.dying == 1
            tier.may_end.set()
            await until(lambda: not space.dying)
            await gone
        keeper.forget_empty()
        assert not keeper.spaces
        await keeper.close()

    asyncio.run(scenario())


def test_a_namespace_that_comes_while_a_scrape_counts_does_not_spoil_it() -> None:
    """The exporter's threads go through the spaces of a loop that does not wait for them."""
    keeper = Keeper([FaultyTier(1)], 1)
    space_of(keeper, "first")

    class Comes(Space):
        """One that is met just before another one comes."""

        @property
        def cache(self) -> Any:
            space_of(keeper, "another")
            return self._cache

        @cache.setter
        def cache(self, cache: Any) -> None:
            self._cache = cache

    late = Namespace("test", "late", LAYOUT)
    keeper.spaces[late.id] = Comes(late, keeper.tiers, 0.25, write_back=True)
    assert keeper.unwritten() == 0 and len(keeper.spaces) == 3


def test_a_purge_does_not_wait_for_ever_for_memory_that_does_not_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so after a while; what was there is forgotten all the same."""

    async def story() -> None:
        tier = SlowToEnd(2)
        keeper = Keeper([tier], 1)
        space = await full_of(keeper, "old", 2)
        space.cache.close_session(1)
        tier.may_end.clear()
        await purge(keeper, space, False)
        with pytest.raises(Busy, match="have not been given up in"):
            await leave(space)
        assert not space.cache.index.blocks
        tier.may_end.set()
        await keeper.close()

    monkeypatch.setattr(purging, "LEAVE_SECONDS_MAX", 0.2)
    asyncio.run(story())


def test_memory_that_cannot_be_overwritten_counts_on_and_nobody_waits_for_it() -> None:
    """A GPU refuses: the bytes are not anybody's again in this life, and the keeper goes on and ends."""

    class Refusing(FaultyTier):
        def discard(self, segment: MemorySegment) -> bool:
            raise OSError("the GPU does not answer")

    async def story() -> None:
        keeper = Keeper([Refusing(2)], 1)
        space = await full_of(keeper, "old", 2)
        used, ordinals = keeper.tiers[0].budget.used, list(space.arenas[0].segments)
        space.cache.close_session(1)
        await keeper._kill(space, ordinals[0], 0)
        assert keeper.tiers[0].budget.used == used and len(space.arenas[0].segments) == 1
        await keeper.close()

    asyncio.run(story())

"""Namespaces on real segments under a keeper, and a medium that can be told to be slow or full."""

from __future__ import annotations

from threading import Event

from tierd.block import ROOT, chain
from tierd.errors import Busy
from tierd.keeper import Keeper
from tierd.layout import Layout, Namespace
from tierd.space import Space
from tierd.tiers.host import HostSegment
from tierd.tiers.tier import MemoryTier, Tier

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

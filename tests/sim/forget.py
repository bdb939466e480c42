"""A purge in a world: what was stored before is not there, for whoever asks and whatever is under way."""

from __future__ import annotations

from tests.sim.world import World
from tierd.core.purge import purge


def forget_all(world: World) -> None:
    """Purge the world's namespace, and check what is left."""
    world.losses = True
    count = purge(world.cache)
    assert count >= len(world.where), "there were more blocks than a purge knows of"
    world.settle(evicts=set(range(world.tiers)))
    assert not world.where and not world.cache.index.blocks, "purged blocks are still found"

"""Pins in a world: what is pinned stays where it is, whatever else happens, until it is unpinned."""

from __future__ import annotations

from collections.abc import Iterator

from tests.sim.world import World
from tierd.core.pool import QUARANTINED
from tierd.errors import Busy, Gone


def pin(world: World, block: bytes, segments_max: int) -> None:
    """Pin the chain that ends in a block, where pins may be in so many segments of each tier."""
    chain = [*world._ancestors(block), block]
    before = [set(pool.pinned) for pool in world.cache.pools]
    try:
        assert world.cache.pins.pin(block, [segments_max] * world.tiers) == len(chain)
    except Gone:
        assert block not in world.known or not all(world.where.get(one) for one in chain), "a chain that is there is pinned"
        assert [pool.pinned for pool in world.cache.pools] == before, "what is refused changes nothing"
    except Busy:
        assert [pool.pinned for pool in world.cache.pools] == before, "what is refused changes nothing"
    else:
        fresh = [pool.pinned - old for pool, old in zip(world.cache.pools, before, strict=True)]
        assert all(not new or len(old | new) <= segments_max for old, new in zip(before, fresh, strict=True))
    world.settle()


def unpin(world: World, block: bytes) -> None:
    """End a pin."""
    world.cache.pins.unpin(block)
    world.settle()


def pin_again(world: World, blocks: list[bytes]) -> None:
    """What a start does with what an earlier life had pinned."""
    for block in blocks:
        pin(world, block, 100)


def pinned_stays(world: World) -> None:
    """Every pinned copy is found where it was when it was pinned, unless its medium lied. In a tier with gaps what is behind
    one may go with what fills it.
    """
    for tier, (block, slot) in copies(world):
        lied = world.cache.pools[tier].state[slot] == QUARANTINED
        assert lied or world.where.get(block, {}).get(tier) == slot or (world.gaps and tier == world.closed), (
            "a pin did not hold"
        )


def copies(world: World) -> Iterator[tuple[int, tuple[bytes, int]]]:
    """Tier, block and slot of all pinned copies."""
    for last, slots in world.cache.pins.chains.items():
        chain = [*reversed(world._ancestors(last)), last]
        for tier, row in enumerate(slots.tolist()):
            yield from ((tier, (block, slot)) for block, slot in zip(chain, row, strict=True) if slot >= 0)

"""Pins in a world: what is pinned stays where it is, whatever else happens, until it is unpinned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tests.sim.world import World
from tierd.core.pins import FOREVER, Term
from tierd.core.pool import QUARANTINED
from tierd.errors import Busy, Gone

CHAINS_MAX = 3


def pin(world: World, block: bytes, segments_max: int, term: Term = FOREVER) -> None:
    """Pin the chain that ends in a block, where pins may be in so many segments of each tier."""
    chain = [*world._ancestors(block), block]
    pins, limits = world.cache.pins, [segments_max] * world.tiers
    before, terms = [set(pool.pinned) for pool in world.cache.pools], dict(pins.terms)
    try:
        assert pins.pin(block, limits, CHAINS_MAX, term) == len(chain)
    except Gone:
        assert block not in world.known or not all(world.where.get(one) for one in chain), "a chain that is there is pinned"
        assert ([pool.pinned for pool in world.cache.pools], pins.terms) == (before, terms), "what is refused changes nothing"
    except Busy:
        assert ([pool.pinned for pool in world.cache.pools], pins.terms) == (before, terms), "what is refused changes nothing"
    else:
        assert pins.terms[block] == Term(*map(max, terms.get(block, term), term)), "of two terms the greater counts"
        assert all(terms[gone] < term for gone in terms.keys() - pins.terms), "a pin gives way to greater terms only"
        assert len(pins.chains) <= CHAINS_MAX
        for pool, old in zip(world.cache.pools, before, strict=True):
            assert len(pool.pinned) <= max(segments_max, len(old)), "pins are in no more segments than they may be"
    world.settle()


def lapse(world: World, now: int) -> None:
    """The terms that are over end, and no others."""
    pins = world.cache.pins
    over = {block for block, term in pins.terms.items() if term.until <= now}
    left = pins.terms.keys() - over
    assert pins.lapse(now) == len(over)
    assert pins.terms.keys() == pins.chains.keys() == left
    world.settle()


def unpin(world: World, block: bytes) -> None:
    """End a pin."""
    world.cache.pins.unpin(block)
    world.settle()


def pin_again(world: World, terms: Mapping[bytes, Term]) -> None:
    """What a start does with what an earlier life had pinned."""
    for block, term in terms.items():
        pin(world, block, 100, term)


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

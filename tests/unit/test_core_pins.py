"""Pins, case by case: what they protect, from what, and what they may cost. The world checks every answer too."""

from __future__ import annotations

import pytest

from tests.sim.cases import LONG, crowd_out, put, put_below, read_all, small
from tests.sim.clients import chain
from tests.sim.pins import copies, pinned_stays
from tests.sim.world import LOWER, UPPER
from tierd.errors import Busy, Gone

HASHES = chain(range(6))
ANY = [100, 100]


def test_a_pinned_chain_outlives_all_that_comes_after_it() -> None:
    """Ten times the tier is stored, and every block of the chain is still in memory; unpinned it goes."""
    world, client = small(upper=2, lower=0)
    put(world, client, HASHES)
    assert world.cache.pins.pin(HASHES[-1], ANY[:1]) == len(HASHES)
    for turn in range(20):
        put(world, client, chain(range(100 + 8 * turn, 108 + 8 * turn)))
    assert all(UPPER in world.where[block] for block in HASHES)
    assert world.cache.pins.unpin(HASHES[-1]) == len(HASHES)
    for turn in range(20):
        put(world, client, chain(range(500 + 8 * turn, 508 + 8 * turn)))
    assert not any(block in world.where for block in HASHES)
    world.check()


def test_a_block_that_two_pins_share_stays_until_both_have_ended() -> None:
    """Each holds the whole of its own chain."""
    world, client = small(upper=2, lower=0)
    put(world, client, HASHES)
    pins = world.cache.pins
    pins.pin(HASHES[-1], ANY[:1])
    pins.pin(HASHES[2], ANY[:1])
    pins.unpin(HASHES[-1])
    for turn in range(20):
        put(world, client, chain(range(100 + 8 * turn, 108 + 8 * turn)))
    assert [UPPER in world.where.get(block, {}) for block in HASHES] == [True] * 3 + [False] * 3
    pins.unpin(HASHES[2])
    assert not world.cache.pools[UPPER].pinned
    world.check()


def test_what_is_below_is_pinned_there_too() -> None:
    """A chain whose head is in memory as well: were the head's segment below to go, the tail would be lost with it."""
    world, client = small(upper=1, lower=8)
    put_below(world, client, LONG)
    crowd_out(world, client)
    assert read_all(world, client, LONG[:8]) == 8
    assert UPPER in world.where[LONG[0]] and UPPER not in world.where[LONG[-1]]
    world.cache.pins.pin(LONG[-1], ANY)
    below = world.cache.pools[LOWER]
    assert {world.where[block][LOWER] // world.slots for block in LONG} == below.pinned
    for ordinal in below.segments.keys() - below.pinned:
        world.vacate(LOWER, ordinal)
    pinned_stays(world)
    assert {block for tier, (block, _) in copies(world) if tier == LOWER} == set(LONG)
    world.check()


def test_a_chain_with_a_gap_cannot_be_pinned() -> None:
    """Nor one that was never stored: it is said which block is missing, and nothing is held."""
    world, client = small(upper=2, lower=0)
    with pytest.raises(Gone, match="not known here"):
        world.cache.pins.pin(HASHES[0], ANY[:1])
    put(world, client, HASHES)
    world.vacate(UPPER, world.where[HASHES[0]][UPPER] // world.slots)
    with pytest.raises(Gone, match=r"not known here|is in no tier any more"):
        world.cache.pins.pin(HASHES[-1], ANY[:1])
    assert not world.cache.pools[UPPER].pinned
    world.check()


def test_pins_are_in_no_more_segments_than_they_may_be() -> None:
    """One more is refused, and costs nothing; what lies in a segment that has pins already is not."""
    world, client = small(upper=3, lower=0)
    for first in (0, 100):
        put(world, client, chain(range(first, first + 4)))
    put(world, client, chain(range(200, 208)))
    pins = world.cache.pins
    assert pins.pin(chain(range(4))[-1], [1]) == 4
    assert pins.pin(chain(range(100, 104))[-1], [1]) == 4
    with pytest.raises(Busy, match="in 2 segments of the cpu tier, pins may be in 1"):
        pins.pin(chain(range(200, 208))[-1], [1])
    assert len(pins.chains) == 2
    world.check()


def test_the_end_of_a_pin_that_is_not_there_is_an_error() -> None:
    """Somebody believes that something is pinned that is not."""
    world, _ = small()
    with pytest.raises(Gone, match="is not pinned"):
        world.cache.pins.unpin(HASHES[0])

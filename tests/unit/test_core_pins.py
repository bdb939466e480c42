"""Pins, case by case: what they protect, from what, and what they may cost. The world checks every answer too."""

from __future__ import annotations

import pytest

from tests.sim.cases import LONG, crowd_out, put, put_below, read_all, small
from tests.sim.clients import chain
from tests.sim.pins import copies, pinned_stays
from tests.sim.world import LOWER, UPPER, World
from tierd.core.pins import FOREVER, Term
from tierd.errors import Busy, Gone

HASHES = chain(range(6))
ANY = [100, 100]
MANY = 100


def test_a_pinned_chain_outlives_all_that_comes_after_it() -> None:
    """Ten times the tier is stored, and every block of the chain is still in memory; unpinned it goes."""
    world, client = small(upper=2, lower=0)
    put(world, client, HASHES)
    assert world.cache.pins.pin(HASHES[-1], ANY[:1], MANY) == len(HASHES)
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
    pins.pin(HASHES[-1], ANY[:1], MANY)
    pins.pin(HASHES[2], ANY[:1], MANY)
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
    world.cache.pins.pin(LONG[-1], ANY, MANY)
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
        world.cache.pins.pin(HASHES[0], ANY[:1], MANY)
    put(world, client, HASHES)
    world.vacate(UPPER, world.where[HASHES[0]][UPPER] // world.slots)
    with pytest.raises(Gone, match=r"not known here|is in no tier any more"):
        world.cache.pins.pin(HASHES[-1], ANY[:1], MANY)
    assert not world.cache.pools[UPPER].pinned
    world.check()


def test_pins_are_in_no_more_segments_than_they_may_be() -> None:
    """One more is refused, and costs nothing; what lies in a segment that has pins already is not."""
    world, client = small(upper=3, lower=0)
    for first in (0, 100):
        put(world, client, chain(range(first, first + 4)))
    put(world, client, chain(range(200, 208)))
    pins = world.cache.pins
    assert pins.pin(chain(range(4))[-1], [1], MANY) == 4
    assert pins.pin(chain(range(100, 104))[-1], [1], MANY) == 4
    with pytest.raises(Busy, match="in 2 segments of the cpu tier, pins may be in 1"):
        pins.pin(chain(range(200, 208))[-1], [1], MANY)
    assert len(pins.chains) == 2
    world.check()


def test_the_end_of_a_pin_that_is_not_there_is_an_error() -> None:
    """Somebody believes that something is pinned that is not."""
    world, _ = small()
    with pytest.raises(Gone, match="is not pinned"):
        world.cache.pins.unpin(HASHES[0])


def three_kept(term: Term, *others: Term) -> tuple[World, list[bytes]]:
    """Chains of one segment each, pinned where pins may be in two and for these terms, and the last block of each."""
    world, client = small(upper=4, lower=0)
    lasts = []
    for number in range(1 + len(others)):
        hashes = chain(range(100 * number, 100 * number + 8))
        put(world, client, hashes)
        lasts.append(hashes[-1])
    for last, its in zip(lasts, (term, *others), strict=True):
        world.cache.pins.pin(last, [2], MANY, its)
    return world, lasts


def test_a_pin_gives_way_to_one_of_a_higher_priority() -> None:
    """And of two that could, the lower one does; what gave way is counted, and evicted like everything else."""
    world, (_, low, high) = three_kept(Term(5, 1000), Term(1, 9000), Term(9, 500))
    assert low not in world.cache.pins.chains and high in world.cache.pins.chains
    assert world.cache.counters["pin_displaced",] == 1
    world.check()


def test_of_one_priority_the_term_that_ends_sooner_gives_way() -> None:
    """So what is kept again and again, all for as long, is the latest."""
    world, (first, second, third) = three_kept(Term(0, 1000), Term(0, 1001), Term(0, 1002))
    assert world.cache.pins.chains.keys() == {second, third} and first in world.known


def test_a_pin_without_an_end_gives_way_to_nothing() -> None:
    """To no priority: the new one is refused, and no other one has ended for it."""
    with pytest.raises(Busy, match="in 3 segments of the cpu tier, pins may be in 2"):
        three_kept(FOREVER, FOREVER, Term(100, 1 << 60))


def test_pins_end_for_one_that_fits_only_then() -> None:
    """What would not fit even if all lesser ones ended costs none of them."""
    world, client = small(upper=4, lower=0)
    little, large = chain(range(8)), chain(range(100, 124))
    put(world, client, little)
    put(world, client, large)
    pins = world.cache.pins
    pins.pin(little[-1], [2], MANY, Term(0, 1000))
    with pytest.raises(Busy):
        pins.pin(large[-1], [2], MANY, Term(100, 1000))
    assert little[-1] in pins.chains


def test_a_pin_that_is_there_stays_for_the_greater_term() -> None:
    """A request cannot shorten what another one asked for, nor an operator's pin; the operator's wins over a request's."""
    world, client = small(upper=2, lower=0)
    put(world, client, HASHES)
    pins, last = world.cache.pins, HASHES[-1]
    pins.pin(last, [2], MANY, Term(3, 100))
    pins.pin(last, [2], MANY, Term(1, 200))
    assert pins.terms[last] == Term(3, 200)
    pins.pin(last, [2], MANY)
    pins.pin(last, [2], MANY, Term(9, 300))
    assert pins.terms[last] == FOREVER


def test_a_term_ends_and_its_blocks_go_in_their_turn() -> None:
    """At its millisecond, not before; others stay."""
    world, client = small(upper=2, lower=0)
    put(world, client, HASHES)
    pins = world.cache.pins
    pins.pin(HASHES[-1], [2], MANY, Term(0, 1000))
    pins.pin(HASHES[2], [2], MANY, Term(0, 2000))
    assert (pins.lapse(999), pins.lapse(1000), pins.lapse(1000)) == (0, 1, 0)
    for turn in range(20):
        put(world, client, chain(range(100 + 8 * turn, 108 + 8 * turn)))
    assert [block in world.where for block in HASHES] == [True] * 3 + [False] * 3
    world.check()


def test_the_number_of_pins_is_bounded() -> None:
    """One more takes the place of the least, or is refused."""
    world, client = small(upper=2, lower=0)
    put(world, client, HASHES)
    pins = world.cache.pins
    pins.pin(HASHES[0], [2], 2, Term(1, 1000))
    pins.pin(HASHES[1], [2], 2)
    pins.pin(HASHES[2], [2], 2, Term(2, 1000))
    assert pins.chains.keys() == {HASHES[1], HASHES[2]}
    with pytest.raises(Busy, match="its maximum of 2 pins"):
        pins.pin(HASHES[3], [2], 2, Term(1, 5000))
    world.check()

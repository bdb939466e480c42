"""Quotas: what a namespace may have and keeps, to the byte, whoever else wants it; and the file that remembers them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from tests.unit.spaces import FaultyTier, full_of, space_of
from tierd.block import ROOT, chain
from tierd.errors import Busy, Invalid
from tierd.keeper import Keeper
from tierd.quotas import FILE, Quota, Quotas
from tierd.space import Space

ONE, OTHER = b"a" * 32, b"b" * 32
SEEDS, STEPS = 20, 120
LATER = 1 << 45
"""Unix milliseconds after all segments were made."""


def allot(space: Space, least: int = 0, most: int = 0) -> None:
    """A quota of so many segments of the cpu tier."""
    size = space.arenas[0].geometry.total_bytes
    space.allot({"cpu": Quota(least * size, most * size)})


def segments(space: Space) -> int:
    """How many segments a namespace has that will stay."""
    arena = space.arenas[0]
    return len(arena.segments) - len(arena.pool.closing)


def store(space: Space, seed: int, blocks: int) -> int:
    """Store a chain of its own, so much later; returns how many blocks found a slot."""
    if not space.cache.sessions:
        space.cache.open_session(1, 0, 0)
    placed = space.cache.store(1, chain([seed << 20 | at for at in range(blocks)], 1, ROOT), ROOT, LATER + seed)
    return space.cache.commit(1, placed.lease, None, LATER + seed).committed if placed.lease else 0


def test_a_namespace_at_its_maximum_evicts_its_own_blocks() -> None:
    """The tier is half empty, and it stores as much as ever, in the segments that it may have."""

    async def story() -> None:
        keeper = Keeper([FaultyTier(4)], 1)
        space = space_of(keeper, "model")
        allot(space, most=2)
        for seed in range(1, 6):
            await keeper.supply(space, 0, 2 * space.arenas[0].pool.slots_per_segment)
            assert store(space, seed, space.arenas[0].pool.slots) == space.arenas[0].pool.slots
        assert segments(space) == 2
        assert not keeper.can_grow(space.arenas[0])
        assert keeper.tiers[0].budget.used == space.arenas[0].used_bytes == 2 * space.arenas[0].geometry.total_bytes
        await keeper.close()

    asyncio.run(story())


def test_at_its_maximum_a_namespace_takes_over_nothing() -> None:
    """However much warmer its blocks are: a colder segment of another namespace stays where it is."""

    async def story() -> None:
        keeper = Keeper([FaultyTier(4)], 1)
        old, new = await full_of(keeper, "old", 3), space_of(keeper, "new")
        allot(new, most=1)
        await keeper.supply(new, 0, 1)
        for seed in range(2, 50):
            store(new, seed, new.arenas[0].pool.slots)
            keeper.supply_ahead(new, 0)
            await asyncio.sleep(0)
        assert (segments(old), segments(new), keeper.handovers) == (3, 1, 0)
        await keeper.close()

    asyncio.run(story())


def test_no_namespace_pushes_another_below_its_minimum() -> None:
    """A busy namespace takes over all that is not promised to the idle one, and then it lives inside that."""

    async def story() -> None:
        keeper = Keeper([FaultyTier(4)], 1)
        old, new = await full_of(keeper, "old", 4), space_of(keeper, "new")
        allot(old, least=2)
        await keeper.supply(new, 0, 1)
        for seed in range(2, 200):
            store(new, seed, new.arenas[0].pool.slots)
            keeper.supply_ahead(new, 0)
            await asyncio.sleep(0.001 if segments(new) < 2 else 0)
            assert segments(old) >= 2
        assert (segments(old), segments(new)) == (2, 2)
        await keeper.close()

    asyncio.run(story())


def test_what_is_promised_is_had_from_whoever_is_warmer() -> None:
    """A namespace below its minimum gets up to it from one that was used later, and not more."""

    async def story() -> None:
        keeper = Keeper([FaultyTier(4)], 1)
        warm, owed = await full_of(keeper, "warm", 4), space_of(keeper, "owed")
        allot(owed, least=3)
        await keeper.supply(owed, 0, 1)
        while segments(owed) < 3:
            store(owed, 1, owed.arenas[0].pool.slots)  # older than all that the other one has
            store(warm, 1_000_000, 8)
            keeper.supply_ahead(owed, 0)
            await asyncio.sleep(0.001)
        for _ in range(50):
            keeper.supply_ahead(owed, 0)
            await asyncio.sleep(0)
        assert (segments(warm), segments(owed)) == (1, 3)
        await keeper.close()

    asyncio.run(story())


def test_a_namespace_that_gets_nothing_is_told_why() -> None:
    """Everything is promised to another one, or its own quota has no room for a segment."""

    async def story() -> None:
        keeper = Keeper([FaultyTier(2)], 1)
        old, new = await full_of(keeper, "old", 2), space_of(keeper, "new")
        allot(old, least=2)
        with pytest.raises(Busy, match="or are promised it"):
            await keeper.supply(new, 0, 1)
        new.allot({"cpu": Quota(0, 1)})
        with pytest.raises(Busy, match="quota of 1 bytes of the cpu tier has room for no segment"):
            await keeper.supply(new, 0, 1)
        assert segments(old) == 2
        await keeper.close()

    asyncio.run(story())


def test_a_lower_maximum_costs_the_coldest_segments() -> None:
    """They go at once, their bytes too, and what was used last is still there."""

    async def story() -> None:
        tier = FaultyTier(4)
        keeper = Keeper([tier], 1)
        space = await full_of(keeper, "model", 4)
        hot = chain(list(range(4)), 1, ROOT)
        lease = space.cache.lookup(1, hot, ROOT, LATER).lease
        space.cache.release(1, lease)
        allot(space, most=1)
        keeper.fit(space)
        keeper.fit(space)  # nothing is chosen twice
        assert segments(space) == 1
        while space.arenas[0].used_bytes > space.arenas[0].geometry.total_bytes:
            await asyncio.sleep(0.001)
        assert tier.budget.used == space.arenas[0].used_bytes
        assert space.cache.lookup(1, hot, ROOT, LATER).blocks == 4
        await keeper.close()

    asyncio.run(story())


def test_a_maximum_that_is_lowered_while_a_segment_is_made_holds() -> None:
    """The new segment comes, since nobody can stop that, and one goes for it."""

    async def story() -> None:
        tier = FaultyTier(4)
        keeper = Keeper([tier], 1)
        space = await full_of(keeper, "model", 1)
        tier.may_go_on.clear()
        growing = asyncio.create_task(keeper.grow(space, space.arenas[0]))
        await asyncio.sleep(0)
        allot(space, most=1)
        keeper.fit(space)
        tier.may_go_on.set()
        assert await growing
        assert segments(space) == 1
        await keeper.close()

    asyncio.run(story())


def test_an_idle_namespace_keeps_what_it_was_promised_when_names_run_out() -> None:
    """Of two that nobody uses, the one without a promise is given up for a new name."""

    async def story() -> None:
        keeper = Keeper([FaultyTier(4)], 1)
        promised, other = await full_of(keeper, "promised", 1), await full_of(keeper, "other", 1)
        allot(promised, least=1)
        assert keeper.give_up_one()
        assert (segments(promised), segments(other)) == (1, 0)
        await keeper.close()

    asyncio.run(story())


@pytest.mark.parametrize("seed", range(SEEDS))
def test_quotas_hold_in_seeded_lives_of_three_namespaces(seed: int) -> None:
    """They store, touch and grow in any order, and quotas change: at every step nobody has more than its maximum, nobody falls
    below its minimum by another's doing, and bytes add up.
    """
    random = Random(seed)

    async def story() -> None:
        tier = FaultyTier(6)
        keeper = Keeper([tier], 1)
        spaces = [space_of(keeper, name) for name in "abc"]
        size = spaces[0].arenas[0].geometry.total_bytes
        before = [0, 0, 0]
        for step in range(1, STEPS):
            at = random.randrange(3)
            space = spaces[at]
            match random.choice(["store", "store", "store", "supply", "quota", "wait"]):
                case "store" if space.arenas[0].pool.slots:
                    store(space, random.choice((step, 7)), random.choice((1, space.arenas[0].pool.slots)))
                    keeper.supply_ahead(space, 0)
                case "supply":
                    try:
                        await asyncio.wait_for(keeper.supply(space, 0, random.choice((1, 64))), 20)
                    except Busy:
                        assert not space.arenas[0].is_owed or any(other.arenas[0].leaving for other in spaces)
                case "quota":
                    promised = sum(other.arenas[0].quota.least // size for other in spaces if other is not space)
                    least = random.randint(0, 6 - promised)
                    allot(space, least, random.choice((0, random.randint(max(1, least), 6))))
                    keeper.fit(space)
                    before[at] = segments(space)
                case _:
                    await asyncio.sleep(0.001)
            assert sum(other.arenas[0].used_bytes for other in spaces) == tier.budget.used <= tier.budget.most
            for one, other in enumerate(spaces):
                arena, has = other.arenas[0], segments(other)
                assert has >= min(before[one], arena.quota.least // size), "pushed below what it was promised"
                assert not arena.quota.most or has * size <= arena.quota.most, "it has more than its maximum"
                before[one] = has
                other.cache.check()
        await keeper.close()

    asyncio.run(story())


async def wrong(quotas: Quotas, least: int, most: int = 0) -> str:
    """Why a quota of the cpu tier of 100 bytes is refused."""
    with pytest.raises(Invalid) as refused:
        await quotas.set(OTHER, "cpu", Quota(least, most), 100)
    return str(refused.value)


def test_a_tier_is_promised_once(tmp_path: Path) -> None:
    """The sum of minimums is never over the tier's bytes; each tier has its own."""

    async def story() -> None:
        quotas = Quotas(tmp_path)
        await quotas.set(ONE, "cpu", Quota(60), 100)
        assert "100, of which 60 are promised" in await wrong(quotas, 41)
        await quotas.set(OTHER, "cpu", Quota(40), 100)
        await quotas.set(OTHER, "nvme", Quota(100), 100)
        await quotas.set(ONE, "cpu", Quota(50), 100)
        assert dict(quotas.of(OTHER)) == {"cpu": Quota(40), "nvme": Quota(100)}

    asyncio.run(story())


def test_quotas_are_there_in_the_next_life(tmp_path: Path) -> None:
    """As they were answered; one that says nothing any more leaves nothing behind."""

    async def story() -> None:
        quotas = Quotas(tmp_path)
        await quotas.set(ONE, "cpu", Quota(1, 2), 100)
        await quotas.set(OTHER, "nvme", Quota(3), 100)
        await quotas.set(ONE, "cpu", Quota(), 100)

    asyncio.run(story())
    again = Quotas(tmp_path)
    assert again.namespaces == [OTHER]
    assert again.of(OTHER) == {"nvme": Quota(3, 0)}
    assert again.of(ONE) == {}


def test_a_quota_that_cannot_be_noted_is_not_set(tmp_path: Path) -> None:
    """Busy, and the old one holds, in this life and in the next."""

    async def story() -> None:
        folder = tmp_path / "state"
        folder.mkdir()
        quotas = Quotas(folder)
        await quotas.set(ONE, "cpu", Quota(1), 100)
        (folder / "quotas.new").mkdir()
        with pytest.raises(Busy, match="nothing has changed"):
            await quotas.set(ONE, "cpu", Quota(2), 100)
        assert quotas.of(ONE) == Quotas(folder).of(ONE) == {"cpu": Quota(1)}

    asyncio.run(story())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"namespaces": []}',
        '{"namespaces": {"ab": {"cpu": [1, 2]}}}',
        f'{{"namespaces": {{"{ONE.hex()}": {{"cpu": [3, 2]}}}}}}',
        f'{{"namespaces": {{"{ONE.hex()}": {{"cpu": [1]}}}}}}',
        f'{{"namespaces": {{"{ONE.hex()}": {{"cpu": ["1", 2]}}}}}}',
    ],
)
def test_a_file_that_cannot_be_understood_ends_the_start(tmp_path: Path, text: str) -> None:
    """To guess could take from one what it was promised: the error names the file and the remedy."""
    (tmp_path / FILE).write_text(text)
    with pytest.raises(Invalid, match=r"quotas\.json does not say .* remove it"):
        Quotas(tmp_path)

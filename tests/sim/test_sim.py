"""Seeded lives of the cache, a share of what `python -m tests.sim --seeds N` plays."""

from __future__ import annotations

import pytest

from tests.sim.scenario import play

SEEDS = 152


@pytest.mark.parametrize("first", range(0, SEEDS, 38))
def test_no_life_breaks_a_promise(first: int) -> None:
    """Faults, deaths and pressure: never a wrong byte, a lost slot, or a refusal while something is evictable."""
    for seed in range(first, first + 38):
        play(seed, steps=250)


@pytest.mark.parametrize("seed", [1218])
def test_lives_that_once_broke_a_promise(seed: int) -> None:
    """1218: a store behind a block that is being written was refused, and what it does not want was spared for it."""
    play(seed, steps=300)

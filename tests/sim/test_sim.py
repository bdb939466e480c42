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

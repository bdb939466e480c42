"""A replay and a daemon that is asked the same have the same hits: it is the same cache."""

from __future__ import annotations

import random

import pytest

from benchmarks.live import live, replayed, times_of
from tests.sim.clients import chain

POINTS = 0.005


@pytest.mark.parametrize("setting", ["lru/lru/everything", "chd/lru/second-sight", "lru/lru/learned", "chd/chd/everything"])
def test_hit_rates_of_a_daemon_are_those_of_its_replay(setting: str) -> None:
    """To half a point, with conversations that come back and prompts that do not, in tiers that are too small for them."""
    cpu, nvme, admission = setting.split("/")
    dice = random.Random(4)
    talks = [[number] for number in range(40)]
    chains = []
    for _ in range(600):
        talk = dice.choice(talks[: 1 + dice.randrange(40)])
        talk += [dice.getrandbits(30) for _ in range(dice.randint(1, 8))]
        chains.append(b"".join(chain(talk[:90] if dice.random() < 0.8 else [dice.getrandbits(30) for _ in range(20)])))
    settings = {"cpu": 2, "nvme": 10}, {"cpu": cpu, "nvme": nvme}, admission
    times = times_of(range(0, 6000 * len(chains), 6000))
    hits = live(chains, times, *settings)
    asked = sum(map(len, chains)) / 32
    again = replayed(chains, times, *settings) / asked
    assert 0.1 < hits / asked < 0.9
    assert hits / asked == pytest.approx(again, abs=POINTS)

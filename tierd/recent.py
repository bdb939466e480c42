"""What happened in the last minutes: totals noted every few seconds, for the page in a browser."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

from tierd import clock
from tierd.core.ladder import TIERS
from tierd.keeper import Keeper
from tierd.metrics import LOOKUP_TIERS, Metrics

SAMPLE_SECONDS = 2.0
SAMPLES_MAX = 151
"""Five minutes of intervals."""


class Sample(NamedTuple):
    """Totals at one moment (monotonic seconds): bytes moved by source and target, blocks asked for, and those found."""

    seconds: float
    moved: dict[tuple[str, str], int]
    asked: int
    found: int


class Recent:
    """Samples, oldest first; other threads may copy `samples` at any moment."""

    def __init__(self, keeper: Keeper, metrics: Metrics) -> None:
        self._keeper, self._metrics = keeper, metrics
        self.samples: deque[Sample] = deque(maxlen=SAMPLES_MAX)

    async def watch(self) -> None:
        """Until cancelled: note a sample, and wait."""
        while True:
            self.samples.append(self.sample())
            await asyncio.sleep(SAMPLE_SECONDS)

    def sample(self) -> Sample:
        """The totals of now."""
        moved: dict[tuple[str, str], int] = {}
        for (_, source, target), count in list(self._keeper.mover.moved.items()):
            moved[source, target] = moved.get((source, target), 0) + count
        counters = self._metrics.counters()
        asked = {tier: counters["lookup", tier] for tier in LOOKUP_TIERS}
        return Sample(clock.monotonic_seconds(), moved, sum(asked.values()), sum(asked[tier] for tier in TIERS))

"""How late the event loop is: a callback is asked for again and again, and how much later it runs is noted."""

from __future__ import annotations

import asyncio

from prometheus_client import Histogram

from tierd import clock

PAUSE_SECONDS = 0.25


async def watch(lag: Histogram) -> None:
    """Until cancelled."""
    while True:
        due = clock.monotonic_seconds() + PAUSE_SECONDS
        await asyncio.sleep(PAUSE_SECONDS)
        lag.observe(max(0.0, clock.monotonic_seconds() - due))

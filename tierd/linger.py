"""After an answer the event loop looks for the next request for a moment, before it sleeps.

A client that has its answer often asks again within microseconds. To wake a sleeping thread costs the one who wakes it tens of
microseconds on a virtual machine, where it takes an exit to the hypervisor; here that is the client, in the middle of its
request. A lookup of 32 blocks takes 97 us with this and 124 to 142 without. Who stores or loads a long prompt comes back
after each batch that it has copied, a millisecond later: where two answers were that close, the look is as long, which makes a
store of blocks of 360 KiB a fiftieth quicker (two virtual CPUs, AMD EPYC).
"""

from __future__ import annotations

import asyncio

from tierd import clock

SECONDS = 50e-6
BATCH_SECONDS = 1.5e-3
"""Answers that are no further apart are those of somebody who copies in between."""


class Linger:
    """Keeps one loop awake until SECONDS or BATCH_SECONDS after the last `longer`; whatever else it has to do goes on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._answered = self._until = 0.0
        self._awake = False

    def longer(self) -> None:
        """Something was answered just now."""
        now = clock.monotonic_seconds()
        self._until = now + (BATCH_SECONDS if now - self._answered < BATCH_SECONDS else SECONDS)
        self._answered = now
        if not self._awake:
            self._awake = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """A turn of the loop in which nothing waits to be called polls without sleeping when this is due again."""
        self._awake = clock.monotonic_seconds() < self._until
        if self._awake:
            self._loop.call_soon(self._look)

"""The manager's watchdog is fed from the event loop, and only while transfers end.

A loop that hangs feeds nothing. Io threads that hang (a medium that neither answers nor fails) are seen by the mover: there are
transfers, and none of their parts has ended. Then the daemon lets itself be killed, since nothing else frees what those
transfers hold: slots, leases of those who wait, and the order of write-back.
"""

from __future__ import annotations

import asyncio

from tierd import systemd
from tierd.log import get_logger
from tierd.mover import Mover

log = get_logger("watchdog")
STUCK_SHARE, FEED_SHARE = 1 / 2, 1 / 4
"""Of the watchdog's time: without progress for so long it is fed no more; how often it is fed."""


async def feed(mover: Mover) -> None:
    """Until cancelled; returns at once where nobody watches."""
    seconds, stuck = systemd.watchdog_seconds(), False
    while seconds:
        was, stuck = stuck, mover.stuck_seconds() > seconds * STUCK_SHARE
        if not stuck:
            systemd.alive()
        if stuck and not was:
            remedy = f"look at the disk: the service manager ends this process within {seconds:g} s"
            log.error("no transfer ends", seconds=mover.stuck_seconds(), in_flight=sum(mover.in_flight.values()), remedy=remedy)
        elif was and not stuck:
            log.info("transfers end again")
        await asyncio.sleep(seconds * FEED_SHARE)

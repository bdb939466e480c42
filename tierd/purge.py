"""`tierd purge`: what a namespace has stored is forgotten, for this life of the daemon and for every later one.

1. The index forgets it at once; transfers under way, and blocks that clients are writing, end nowhere (`core.purge`).
2. The header of each segment gets the next epoch, and files are synced: to every later life what they hold is stale, also
   what a write that is still under way adds to them, since it is of the epoch before. Only then it is answered.
3. The segments die when nobody uses them any more, as they do when they change hands; with `shred` they are overwritten first.

A crash in between leaves some headers of the older epoch: the next life gives their segments up, since another one is newer.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from tierd.errors import Busy
from tierd.keeper import Keeper, until
from tierd.log import get_logger
from tierd.space import Space
from tierd.tiers.nvme import FileSegment, sync_folder

log = get_logger("purge")
LEAVE_SECONDS_MAX = 30.0
"""For memory that nobody uses any more to be overwritten and given back."""


class Purged(NamedTuple):
    """How many blocks were forgotten, and how many segments die of it."""

    blocks: int
    segments: int


async def purge(keeper: Keeper, space: Space, shred: bool) -> Purged:
    """Forget a namespace, for later lives too; raises Busy where the medium does not take it. It must not be cancelled
    half-way. Segments go when nobody uses them any more.
    """
    open_segments, lower = space.open_segments(), space.lower
    memory = [segment for arena in space.mapped for segment in arena.segments.values()]
    files = [*lower.segments.values(), *lower.leaving] if lower else []
    blocks = space.purge()
    for segment in (*memory, *files):
        segment.shred |= shred
    for segment in memory:
        segment.outdate(space.epoch)
    try:
        await asyncio.to_thread(outdate, files, space.epoch)
    except OSError as error:
        log.error("purge is not safe yet", namespace=space.namespace.id, epoch=space.epoch, reason=error)
        remedy = "it is forgotten in this life, and may be back in the next: see the disk, then purge again"
        raise Busy(f"purge: headers of segment files cannot be written ({error}): {remedy}") from error
    finally:
        keeper.give_up(space, open_segments)
    log.info("purged", namespace=space.namespace.id, epoch=space.epoch, blocks=blocks, segments=len(open_segments), shred=shred)
    return Purged(blocks, len(open_segments))


async def leave(space: Space) -> None:
    """Wait until memory that nobody used any more has gone: till then the service manager keeps it. Raises Busy where it does
    not go.
    """
    await asyncio.sleep(0)  # what was given up just now begins to go
    try:
        await asyncio.wait_for(until(lambda: not any(arena.leaving for arena in space.mapped)), LEAVE_SECONDS_MAX)
    except TimeoutError as error:
        remedy = "all is forgotten, for later lives too; see the log, and restart the daemon to be rid of their bytes"
        raise Busy(f"purge: segments of memory have not been given up in {LEAVE_SECONDS_MAX:g} s: {remedy}") from error


def outdate(files: list[FileSegment], epoch: int) -> None:
    """Mark all files, and wait until the medium has that. Raises OSError for one that it did not take, when all were tried."""
    failed: OSError | None = None
    for segment in files:
        try:
            segment.outdate(epoch)
        except OSError as error:
            failed = error
    for folder in {segment.path.parent for segment in files}:
        sync_folder(folder)
    if failed:
        raise failed

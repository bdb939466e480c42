"""Scrubbing: reading what is on NVMe and comparing it with its digests, at a bounded rate, before somebody needs it.

A pass goes once through every segment that there is; blocks that come meanwhile may be missed, and those that go are not waited
for. A block that cannot be read or is wrong is a miss from then on, and its slot is not used again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd import clock
from tierd.core import scrub
from tierd.core.plan import Slots
from tierd.errors import Invalid
from tierd.keeper import Keeper
from tierd.log import get_logger
from tierd.mover import OUTCOME
from tierd.space import Arena, Space
from tierd.tiers.verify import Verifier

log = get_logger("scrub")
BATCH_SECONDS = 0.25
"""What one batch may take at the rate: a pause is obeyed, and the disk is left to others, at least this often."""
NOT_READ = 255
"""An outcome that is none: a block is not given up because somebody failed to look at it."""
IDLE, RUNNING, PAUSED = "idle", "running", "paused"


class Scrub:
    """One pass at a time; `bytes_per_second` may change at any moment."""

    def __init__(self, keeper: Keeper, bytes_per_second: int) -> None:
        self.bytes_per_second = bytes_per_second
        self.blocks: Counter[str] = Counter()
        """Of the present or last pass, by outcome."""
        self.started = self.finished = 0.0
        """When the present or last pass did (Unix seconds); 0: never."""
        self._keeper = keeper
        self._bytes = 0
        self._pass: asyncio.Task[None] | None = None
        self._may_go_on, self._closing = asyncio.Event(), asyncio.Event()

    @property
    def state(self) -> str:
        """IDLE, RUNNING or PAUSED."""
        if self._pass is None or self._pass.done():
            return IDLE
        return RUNNING if self._may_go_on.is_set() else PAUSED

    def start(self) -> None:
        """Begin a pass, or go on with one that was paused; raises Invalid where there is nothing to read."""
        if not any(tier.name == "nvme" for tier in self._keeper.tiers):
            raise Invalid("scrub: this daemon has no nvme tier: set nvme.bytes")
        self._may_go_on.set()
        if self.state == IDLE:
            self.blocks, self._bytes = Counter(), 0
            self.started, self.finished = clock.unix_milliseconds() / 1000, 0.0
            self._pass = asyncio.get_running_loop().create_task(self._run())

    def pause(self) -> None:
        """Read no further for now; what is being read is finished."""
        self._may_go_on.clear()

    def status(self) -> dict[str, Any]:
        """How far it is; numbers are of the present pass, or of the last one."""
        spaces = self._keeper.spaces.values()
        return {
            "state": self.state,
            "bytes_per_second": self.bytes_per_second,
            "read_bytes": self._bytes,
            "blocks": {name: self.blocks[name] for name in scrub.OUTCOMES},
            "blocks_on_nvme": sum(space.lower.pool.counts()["ready"] for space in spaces if space.lower),
            "started": self.started,
            "finished": self.finished,
        }

    async def close(self) -> None:
        """End a pass, wherever it is."""
        self._closing.set()
        self._may_go_on.set()
        if self._pass:
            await self._pass

    async def _run(self) -> None:
        log.info("scrub begins", bytes_per_second=self.bytes_per_second)
        try:
            for space in list(self._keeper.spaces.values()):
                if space.lower:
                    verifier = Verifier(space.lower.geometry.slot_bytes)
                    for ordinal in sorted(space.lower.segments):
                        await self._read(space, space.lower, ordinal, verifier)
        except Exception:  # a bug, or no memory: the daemon serves, and stops, without a scrub
            log.exception("scrub failed")
            return
        self.finished = clock.unix_milliseconds() / 1000
        log.info("scrub ends", seconds=self.finished - self.started, **self.blocks)

    async def _read(self, space: Space, arena: Arena, ordinal: int, verifier: Verifier) -> None:
        """Read the blocks of one segment, as long as it is there."""
        per_segment, payload_bytes = arena.pool.slots_per_segment, arena.geometry.payload_bytes
        at = 0
        while at < per_segment:
            await self._may_go_on.wait()
            segment = arena.segments.get(ordinal)
            if segment is None or ordinal in arena.pool.closing or self._closing.is_set():
                return
            count = min(verifier.batch, per_segment - at, max(1, int(self.bytes_per_second * BATCH_SECONDS / payload_bytes)))
            slots = scrub.hold(space.cache, ordinal * per_segment + at, count)
            at += count
            if not len(slots):
                continue
            began, outcome = clock.monotonic_seconds(), np.full(len(slots), NOT_READ, np.uint8)
            try:
                outcome = OUTCOME[await asyncio.to_thread(verifier.verify, segment, slots % per_segment)]
            finally:
                scrub.let_go(space.cache, slots, outcome)
            self._note(space, slots, outcome)
            due = began + len(slots) * payload_bytes / self.bytes_per_second
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), max(due - clock.monotonic_seconds(), 0))

    def _note(self, space: Space, slots: Slots, outcome: NDArray[np.uint8]) -> None:
        self._bytes += len(slots) * space.namespace.layout.block_bytes
        for name, code in scrub.OUTCOMES.items():
            found = slots[outcome == code]
            self.blocks[name] += len(found)
            if name != "ok" and len(found):
                log.error("blocks are not what was written", namespace=space.namespace.id, outcome=name, blocks=len(found))

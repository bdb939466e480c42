"""A scrub that cannot look: nothing is given up for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.unit.spaces import SEGMENT_BYTES, FaultyTier, full_of
from tierd import clock
from tierd.keeper import Keeper
from tierd.scrub import IDLE, Scrub
from tierd.tiers.io.posix import PosixEngine
from tierd.tiers.state import StateDirectory
from tierd.tiers.tier import NvmeTier
from tierd.tiers.verify import Verifier


def test_a_scrub_that_fails_gives_up_no_block_and_does_not_keep_the_daemon_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch is as ready as before, nobody uses it, and the next pass finds all of it good."""

    async def story() -> None:
        state = StateDirectory(tmp_path)
        keeper = Keeper([FaultyTier(1), NvmeTier(2 * SEGMENT_BYTES, SEGMENT_BYTES, state, PosixEngine())], 1)
        space = await full_of(keeper, "scrubbed", 1)
        keeper.pump(space)
        await keeper.sync(clock.monotonic_seconds() + 20)
        pool = space.arenas[1].pool
        blocks = pool.counts()["ready"]
        assert blocks == space.arenas[0].pool.slots

        def no_memory(*_: Any) -> None:
            raise MemoryError

        scrub = Scrub(keeper, 1 << 30)
        with monkeypatch.context() as broken:
            broken.setattr(Verifier, "verify", no_memory)
            scrub.start()
            await ended(scrub)
        assert (pool.counts()["ready"], pool.counts()["quarantined"]) == (blocks, 0)
        assert not pool.users.any() and not any(scrub.blocks.values())
        scrub.start()
        await ended(scrub)
        assert scrub.blocks["ok"] == blocks and scrub.finished
        await scrub.close()
        await keeper.close()
        state.close()

    asyncio.run(story())


async def ended(scrub: Scrub) -> None:
    """Wait for the end of a pass."""
    async with asyncio.timeout(20):
        while scrub.state != IDLE:
            await asyncio.sleep(0.01)

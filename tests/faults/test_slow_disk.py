"""A disk that cannot keep up costs blocks that were not written, and nobody else anything."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from typing import Any

from tests.faults.content import chain
from tests.faults.house import House, until
from tests.faults.pressure import store, verify
from tests.faults.raw import RawClient

BLOCK_SECONDS = "0.03"
SERVE = [sys.executable, "-m", "tests.faults.slow", BLOCK_SECONDS, "serve"]
WRITTEN_SECONDS_MAX = 20.0
UNFAIR_BLOCKS = 200
"""So many of a neighbour's blocks may not go before 16 of one's own (30 do, for what is under way already)."""


def opened(house: House, model: str) -> RawClient:
    """A client of that model with its session."""
    client = RawClient(house.socket, model)
    client.hello()
    return client


def on_nvme(status: dict[str, Any], model: str) -> int:
    """Blocks of a model that were written."""
    return next(int(space["slots"]["nvme"]["ready"]) for space in status["namespaces"] if space["model"] == model)


def test_a_disk_that_cannot_keep_up_refuses_no_store(short_path: Path) -> None:
    """Memory is not pinned by what waits to be written: the coldest blocks go, unwritten."""
    with House(short_path, serve=SERVE, cpu__bytes="8MiB", nvme__bytes="32MiB") as house:
        client = opened(house, "burst")
        for number in range(10):
            hashes = chain(f"burst {number}", 100)
            assert store(client, hashes, batch_blocks=100) == 0
        assert verify(client, hashes) == (100, 0)
        dropped = house.wait_ready()["evicted_blocks"]["cpu.drop"]
        assert dropped > 254, "the disk kept up, so nothing was shown"


def test_a_busy_neighbour_does_not_keep_ones_blocks_from_nvme(short_path: Path) -> None:
    """Namespaces take turns at the disk, though one of them always has more to write."""
    with House(short_path, serve=SERVE, cpu__bytes="16MiB", nvme__bytes="64MiB") as house:
        busy, modest = opened(house, "busy"), opened(house, "modest")
        numbers = count()
        store(busy, chain("busy", 200))
        assert store(modest, chain("modest", 16)) == 0

        def is_written_while_the_other_stores() -> bool:
            store(busy, chain(f"busy {next(numbers)}", 32))
            status = house.wait_ready()
            assert status["unwritten_runs"] > 0, "the neighbour was not busy"
            assert on_nvme(status, "busy") < UNFAIR_BLOCKS, "a neighbour's blocks always go first"
            return on_nvme(status, "modest") == 16

        until(is_written_while_the_other_stores, "nothing is written", WRITTEN_SECONDS_MAX)

"""What a daemon that was killed, or that has a slow disk, is expected to do all the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.content import chain
from tests.faults.house import House
from tests.faults.pressure import store, verify
from tests.faults.raw import RawClient
from tierd.block import HASH_BYTES

HEAD_BLOCKS, BRANCH_BLOCKS, BRANCHES = 16, 20, 5


@pytest.mark.parametrize("memory", ["kept", "lost"])
def test_every_branch_of_a_shared_prompt_is_found_after_a_kill(house: House, client: RawClient, memory: str) -> None:
    """Chains that part after the same blocks, and were used at the same moment, are all there again."""
    head = chain("system prompt", HEAD_BLOCKS)
    branches = [head + chain(f"user {number}", BRANCH_BLOCKS, head[-HASH_BYTES:]) for number in range(BRANCHES)]
    for hashes in branches:
        store(client, hashes)
    house.sync()
    if memory == "lost":
        house.crash()
        house.start()
    else:
        house.kill()
        house.wait_ready()
    again = RawClient(house.socket)
    again.hello()
    assert [verify(again, hashes) for hashes in branches] == [(HEAD_BLOCKS + BRANCH_BLOCKS, 0)] * BRANCHES


def test_a_disk_that_cannot_keep_up_refuses_no_store(short_path: Path) -> None:
    """Memory is not pinned by what waits to be written: the coldest blocks go, unwritten."""
    serve = [sys.executable, "-m", "tests.faults.slow", "0.05", "serve"]
    with House(short_path, serve=serve, cpu__bytes="8MiB", nvme__bytes="32MiB") as house:
        client = RawClient(house.socket)
        client.hello()
        for number in range(10):
            hashes = chain(f"burst {number}", 100)
            assert store(client, hashes, batch_blocks=100) == 0
        assert verify(client, hashes) == (100, 0)
        dropped = house.wait_ready()["evicted_blocks"]["cpu.drop"]
        assert dropped > 254, "the disk kept up, so nothing was shown"

"""What is expected of a daemon that was killed."""

from __future__ import annotations

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

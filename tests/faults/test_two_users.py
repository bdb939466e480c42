"""Two users share one daemon: each works on twice the memory tier, and neither sees, starves or crowds out the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from tests.faults.house import POLL_SECONDS, House
from tests.faults.puppet import Puppet

UIDS = (64_001, 64_002)
CHAINS, CHAIN_BLOCKS = 32, 32
"""1,024 blocks a user: twice the 508 that the memory tier has."""
ROUNDS = 3

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")


@pytest.fixture
def open_house(short_path: Path) -> Iterator[House]:
    """A daemon that every user may connect to, with 16 MiB of memory and room on NVMe for both."""
    short_path.chmod(0o755)
    with House(short_path, server__socket_mode="0666", cpu__bytes="16MiB", nvme__bytes="128MiB") as house:
        yield house
        assert house.errors() == []


def most_used(house: House, over: Event) -> dict[str, float]:
    """The greatest share of its limit that each tier had while it was watched."""
    shares = {"cpu": 0.0, "nvme": 0.0}
    while not over.wait(POLL_SECONDS):
        for name, tier in house.wait_ready()["tiers"].items():
            shares[name] = max(shares[name], tier["used_bytes"] / tier["limit_bytes"])
    return shares


@pytest.mark.parametrize("how", ["in turn", "at once"])
def test_two_users_on_twice_the_memory_each_are_served(open_house: House, how: str) -> None:
    """Caps hold at every moment, no byte crosses, no store is refused; both name their blocks alike."""
    over = Event()
    with (
        ThreadPoolExecutor() as threads,
        Puppet(open_house.socket, uid=UIDS[0]) as first,
        Puppet(open_house.socket, uid=UIDS[1]) as second,
    ):
        watched = threads.submit(most_used, open_house, over)
        try:
            for round_number in range(ROUNDS):
                steps = [("work", "shared", CHAINS, CHAIN_BLOCKS, flavour) for flavour in (1, 2)]
                if how == "in turn":
                    results = [first.do(*steps[0]), second.do(*steps[1])]
                else:
                    both = [threads.submit(first.do, *steps[0]), threads.submit(second.do, *steps[1])]
                    results = [task.result() for task in both]
                for had, wrong, refused in results:
                    assert (wrong, refused) == (0, 0)
                    assert had > 0 or round_number == 0
        finally:
            over.set()
        shares = watched.result()
        assert shares["cpu"] == 1.0 and 0 < shares["nvme"] <= 1.0
    domains = {space["domain"] for space in open_house.wait_ready()["namespaces"]}
    assert domains == {f"uid:{uid}" for uid in UIDS}

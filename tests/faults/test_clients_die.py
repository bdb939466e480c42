"""Whatever a client held when it was killed is free within a second."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.faults.content import chain
from tests.faults.house import House, kill_process, until
from tests.faults.pressure import capacity_is_whole, nothing_is_held, press, store
from tests.faults.puppet import Puppet
from tests.faults.raw import RawClient

FREE_SECONDS_MAX = 1.0
BLOCKS = 100
STEPS: dict[str, list[tuple[Any, ...]]] = {
    "connected": [("connect",)],
    "hello": [("hello",)],
    "looked up": [("hello",), ("lookup", "hot", BLOCKS)],
    "looked up what is below": [("hello",), ("lookup", "cold", BLOCKS)],
    "loading": [("hello",), ("lookup", "cold", BLOCKS), ("ask_to_load", BLOCKS - 1, 1)],
    "loaded": [("hello",), ("lookup", "cold", BLOCKS), ("load", 0, BLOCKS)],
    "released": [("hello",), ("lookup", "hot", BLOCKS), ("release",)],
    "store": [("hello",), ("store", "new", BLOCKS)],
    "half written": [("hello",), ("store", "new", BLOCKS), ("fill", 0, BLOCKS // 2)],
    "committed": [("hello",), ("store", "new", BLOCKS), ("fill", 0, BLOCKS), ("commit",)],
}


@pytest.fixture
def stocked(house: House, client: RawClient) -> House:
    """A daemon that has the chain "cold" on NVMe only and "hot" in memory."""
    store(client, chain("cold", BLOCKS))
    house.sync()
    press(client, "between", 2 * 254)
    store(client, chain("hot", BLOCKS))
    house.sync()
    return house


def sessions(house: House) -> int:
    """Sessions that the daemon knows."""
    return int(house.wait_ready()["sessions"])


@pytest.mark.parametrize("step", STEPS)
def test_a_client_killed_at_any_step_holds_nothing(stocked: House, client: RawClient, step: str) -> None:
    """Its session ends, its slots are usable, half-written blocks are seen by nobody."""
    with Puppet(stocked.socket, *STEPS[step]) as puppet:
        puppet.kill()
    until(lambda: sessions(stocked) == 1, "the session of a dead client stays", FREE_SECONDS_MAX)
    capacity_is_whole(stocked, FREE_SECONDS_MAX)
    assert client.lookup(chain("new", BLOCKS))[1] == (BLOCKS if step == "committed" else 0)
    client.ask("bye")
    client.connect()
    client.hello()
    nothing_is_held(stocked, client)


@pytest.mark.parametrize("step", ["looked up", "half written"])
def test_a_child_that_lives_on_keeps_nothing_of_its_dead_parents(stocked: House, client: RawClient, step: str) -> None:
    """It has the socket open, so only the process's own end can be what counts."""
    with Puppet(stocked.socket, *STEPS[step]) as puppet:
        child = puppet.do("fork")
        try:
            puppet.kill()
            until(lambda: sessions(stocked) == 1, "the session of a dead client stays", FREE_SECONDS_MAX)
            capacity_is_whole(stocked, FREE_SECONDS_MAX)
            nothing_is_held(stocked, client)
            os.kill(child, 0)  # it was alive all the time
        finally:
            kill_process(child)


def test_a_lost_connection_frees_nothing_until_the_process_resumes(house: House, client: RawClient) -> None:
    """A client that still copies is not robbed because its socket broke."""
    with Puppet(house.socket, ("hello",), ("store", "slow", BLOCKS)) as puppet:
        puppet.do("disconnect")
        press(client, "others", 4 * 254)
        assert house.slots()["filling"] == BLOCKS
        puppet.do("resume", "nothing")
        capacity_is_whole(house, FREE_SECONDS_MAX)
        nothing_is_held(house, client)

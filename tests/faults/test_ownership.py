"""A slot belongs to whom it was told, over the daemon's death, until he lets go or dies."""

from __future__ import annotations

import pytest

from tests.faults.content import chain
from tests.faults.house import House
from tests.faults.pressure import capacity_is_whole, nothing_is_held, press, store, verify
from tests.faults.puppet import Puppet
from tests.faults.raw import RawClient

BLOCKS = 60
PRESSURE_BLOCKS = 4 * 254
ENDS = ("resumes", "dies", "resumes with nothing")


def restart(house: House, client: RawClient) -> None:
    """Kill the daemon; the client in this process goes on with its session."""
    house.kill()
    house.wait_ready()
    client.connect()
    client.resume([])


def end(puppet: Puppet, how: str, kind: str) -> None:
    """The puppet lets go of what it holds."""
    if how == "dies":
        puppet.kill()
    elif how == "resumes":
        assert puppet.do("resume", kind) > 0
        puppet.do("release")
    else:
        assert puppet.do("resume", "nothing") == 0


@pytest.mark.parametrize("how", ENDS)
def test_a_slow_reader_reads_its_blocks_over_a_restart_and_pressure(house: House, client: RawClient, how: str) -> None:
    """Its slots are given to nobody while it reads, and to everybody when it has let go."""
    store(client, chain("kept", BLOCKS))
    house.sync()
    with Puppet(house.socket, ("hello",)) as puppet:
        assert puppet.do("lookup", "kept", BLOCKS) == [BLOCKS, BLOCKS]
        restart(house, client)
        chains = press(client, "others", PRESSURE_BLOCKS)
        assert puppet.do("spoiled") == 0
        assert all(verify(client, hashes)[1] == 0 for hashes in chains)
        if how == "resumes":
            assert puppet.do("resume", "reading") > 0
            press(client, "more", PRESSURE_BLOCKS)
            assert puppet.do("spoiled") == 0
        end(puppet, how, "reading")
        capacity_is_whole(house)
        nothing_is_held(house, client)


@pytest.mark.parametrize("how", ENDS)
def test_a_late_writer_writes_into_nobodys_block(house: House, client: RawClient, how: str) -> None:
    """What it was told before the restart it may spoil after it; others store the same chain elsewhere."""
    with Puppet(house.socket, ("hello",)) as puppet:
        slots = puppet.do("store", "late", BLOCKS)
        puppet.do("fill", 1, BLOCKS // 2)
        restart(house, client)
        assert store(client, chain("late", BLOCKS)) == 0
        chains = [chain("late", BLOCKS), *press(client, "others", PRESSURE_BLOCKS)]
        puppet.do("fill", 1, BLOCKS)
        house.sync()  # so that what is in memory, at least, is not lost to the promotions that follow
        had = [verify(client, hashes) for hashes in chains]
        assert sum(blocks for blocks, _ in had) > 150 and sum(wrong for _, wrong in had) == 0
        if how == "resumes":
            assert puppet.do("resume", "writing") > 0
            press(client, "more", PRESSURE_BLOCKS)
            assert puppet.do("fill", 1, BLOCKS) is None
            assert len(set(slots)) == BLOCKS
            assert all(verify(client, hashes)[1] == 0 for hashes in chains)
        end(puppet, how, "writing")
        capacity_is_whole(house)
        nothing_is_held(house, client)


def test_a_holder_of_slots_survives_several_lives_of_the_daemon(house: House, client: RawClient) -> None:
    """The bits are in the segment: no life of the daemon that never saw the holder gives its slots away."""
    store(client, chain("kept", BLOCKS))
    with Puppet(house.socket, ("hello",)) as puppet:
        assert puppet.do("lookup", "kept", BLOCKS)[1] == BLOCKS
        for life in range(3):
            restart(house, client)
            press(client, f"life {life}", 2 * 254)
        assert puppet.do("spoiled") == 0
        puppet.kill()
        nothing_is_held(house, client)


def test_a_writer_that_died_with_the_daemon_holds_nothing(house: House, client: RawClient) -> None:
    """The next life finds bits of a process that is gone."""
    with Puppet(house.socket, ("hello",)) as puppet:
        puppet.do("store", "dead", BLOCKS)
        puppet.do("fill", 1, BLOCKS)
        house.kill()
        puppet.kill()
    house.wait_ready()
    client.connect()
    client.resume([])
    capacity_is_whole(house, 1.0)
    nothing_is_held(house, client)

"""A daemon that dies at any of its write calls leaves nothing wrong, loses no slot and keeps what it had answered for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.faults.content import chain
from tests.faults.house import House
from tests.faults.pressure import capacity_is_whole, store, verify
from tests.faults.raw import RawClient
from tierd.errors import Gone, TierdError

BLOCKS = 4
CALLS_MIN, CALLS_MAX = 10, 40
"""A store and its write-back make this many write calls."""


def attempt(house: House, client: RawClient, hashes: bytes) -> bool:
    """Store, commit and write back, as far as the daemon lives; returns whether the commit was answered."""
    committed = False
    try:
        client.hello()
        store(client, hashes)
        committed = True
        house.sync()
    except TierdError:
        pass
    return committed


def die_at(folder: Path, call: int, how: str) -> bool:
    """One sweep's step; returns False when the daemon makes fewer calls."""
    marker = folder / "died"
    serve = [sys.executable, "-m", "tests.faults.deadly", str(marker), str(call), how, "serve"]
    hashes = chain("sweep", BLOCKS)
    with House(folder, serve=serve, cpu__bytes="8MiB", nvme__bytes="8MiB") as house:
        client = RawClient(house.socket)
        committed = attempt(house, client, hashes)
        if not marker.exists():
            return False
        house.wait_ready()
        client.connect()
        try:
            client.resume([])
        except (Gone, AttributeError):  # it died before it had answered hello
            client.connect()
            client.hello()
        had, wrong = verify(client, hashes)
        assert not wrong and (had == BLOCKS or not committed), f"call {call} {how}: {had} blocks, {wrong} wrong"
        again(house, client, hashes)
        house.crash()
        house.start()
        client = RawClient(house.socket)
        client.hello()
        assert verify(client, hashes) == (BLOCKS, 0)
        again(house, client, hashes)
    return True


def again(house: House, client: RawClient, hashes: bytes) -> None:
    """Everything works as if nothing had happened."""
    assert store(client, hashes) == 0
    house.sync()
    assert verify(client, hashes) == (BLOCKS, 0)
    capacity_is_whole(house)
    tiers = house.wait_ready()["tiers"]
    assert all(tier["used_bytes"] <= tier["limit_bytes"] for tier in tiers.values())
    assert house.errors() == []


@pytest.mark.parametrize("how", ["before", "half"])
def test_dying_at_any_write_call_costs_nothing_that_was_answered(short_path: Path, how: str) -> None:
    """Every call of a store with its write-back, from the lock's pid to the last READY; "half" leaves torn writes."""
    for call in range(1, CALLS_MAX):
        folder = short_path / str(call)
        folder.mkdir()
        if not die_at(folder, call, how):
            assert call > CALLS_MIN, f"only {call - 1} write calls were swept"
            return
        shutil.rmtree(folder)
    pytest.fail(f"a store makes more than {CALLS_MAX} write calls: sweep them too")

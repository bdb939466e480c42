"""Scrubbing: damage is found before anybody asks, at a bounded rate, and costs nobody else anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.content import chain
from tests.faults.house import LAYOUT, ROOT, House, until
from tests.faults.pressure import capacity_is_whole, press, store, verify
from tests.faults.raw import RawClient
from tests.faults.test_flipped_bits import flip, payload_of
from tierd.block import HASH_BYTES
from tierd.cli import DAMAGED, OK
from tierd.cli.admin import ask
from tierd.errors import Invalid

BLOCKS, BAD = 24, 9
PASS_SECONDS_MAX = 20.0


def scrub(house: House, action: str) -> dict[str, Any]:
    """What the daemon answers."""
    return ask(house.admin, "scrub", 5.0, action=action)


def scrubbed(house: House) -> dict[str, Any]:
    """A whole pass: how it ended."""
    scrub(house, "start")
    until(lambda: scrub(house, "status")["finished"], "the pass does not end", PASS_SECONDS_MAX)
    return scrub(house, "status")


def tierd(house: House, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command for the daemon of this house."""
    command = [sys.executable, "-m", "tierd", *arguments, "--runtime-dir", str(house.folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_damage_is_found_before_anybody_asks(house: House, client: RawClient) -> None:
    """The block is a miss from then on, in this life and the next, its slot is not used; every other block is whole."""
    hashes = chain("scrubbed", BLOCKS)
    store(client, hashes)
    house.sync()
    assert tierd(house, "scrub", "status").stdout.startswith("no pass was started")
    assert scrubbed(house)["blocks"] == {"ok": BLOCKS, "io_error": 0, "mismatch": 0}
    assert tierd(house, "scrub", "status").returncode == OK
    flip(*payload_of(house, hashes[BAD * HASH_BYTES : (BAD + 1) * HASH_BYTES]), 3)
    found = scrubbed(house)
    assert found["blocks"] == {"ok": BLOCKS - 1, "io_error": 0, "mismatch": 1}
    assert found["read_bytes"] == BLOCKS * LAYOUT.block_bytes
    told = tierd(house, "scrub", "status", "--json")
    assert told.returncode == DAMAGED and json.loads(told.stdout)["blocks"]["mismatch"] == 1
    status = house.wait_ready()
    assert (status["checksum_failures"], status["tiers"]["nvme"]["slots"]["quarantined"]) == (1, 1)
    assert scrubbed(house)["blocks"] == {"ok": BLOCKS - 1, "io_error": 0, "mismatch": 0}
    assert verify(client, hashes) == (BLOCKS, 0), "memory has it still"
    house.stop()
    house.start()
    client = RawClient(house.socket)
    client.hello()
    assert verify(client, hashes) == (BAD, 0)
    assert house.wait_ready()["checksum_failures"] == 0, "the slot was not given up in the file"


def test_a_pass_keeps_its_rate_and_pauses(short_path: Path) -> None:
    """It takes at least as long as its bytes take at that rate; paused, it reads nothing, and goes on where it was."""
    rate = 4 * LAYOUT.block_bytes
    with House(short_path, nvme__scrub_bytes_per_second=str(rate)) as house:
        client = RawClient(house.socket)
        client.hello()
        store(client, chain("slowly", BLOCKS))
        house.sync()
        scrub(house, "start")
        until(lambda: scrub(house, "status")["blocks"]["ok"], "nothing is read")
        scrub(house, "pause")
        quiet = scrub(house, "status")
        assert quiet["state"] == "paused" and quiet["blocks"]["ok"] < BLOCKS
        # What was being read when it was paused may still be counted; a second later it would be some more.
        with pytest.raises(AssertionError):
            until(lambda: scrub(house, "status")["blocks"]["ok"] > quiet["blocks"]["ok"] + 2, "as it should be", 1.0)
        found = scrubbed(house)
        assert found["blocks"]["ok"] == BLOCKS
        assert found["finished"] - found["started"] >= (BLOCKS - 2) * LAYOUT.block_bytes / rate
        assert tierd(house, "scrub", "status").stdout.startswith("scrub    done after ")


def test_scrubbing_under_pressure_costs_no_slot_and_no_byte(short_path: Path) -> None:
    """Blocks come, go and are purged while they are read; a daemon that stops does not wait for the pass."""
    with House(short_path, held=False, cpu__bytes="8MiB", nvme__bytes="16MiB") as house:
        client = RawClient(house.socket)
        client.hello()
        chains = press(client, "first", 256)
        house.sync()
        scrub(house, "start")
        for number in range(4):
            chains = press(client, f"more {number}", 256)
            if scrub(house, "status")["finished"]:
                scrub(house, "start")
        assert not sum(verify(client, hashes)[1] for hashes in chains)
        scrub(house, "start")
        client.ask("bye")
        ask(house.admin, "purge", 10.0, namespace=client.welcome["namespace"].hex())
        client = RawClient(house.socket)
        client.hello()
        press(client, "after", 64)
        house.sync()
        assert scrubbed(house)["blocks"]["mismatch"] == 0
        capacity_is_whole(house)
        scrub(house, "start")
        assert house.stop() == 0
        assert house.errors() == []


def test_scrub_refuses_what_it_cannot_do(short_path: Path) -> None:
    """Another action, and a daemon without NVMe, are answered with the remedy."""
    with House(short_path, held=False, nvme__bytes="0") as house:
        with pytest.raises(Invalid, match=r"no nvme tier: set nvme\.bytes"):
            scrub(house, "start")
        with pytest.raises(Invalid, match="'stop' is not one of start, pause, status"):
            scrub(house, "stop")

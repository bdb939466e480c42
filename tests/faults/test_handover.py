"""Memory changes hands only when nobody maps it any more, over the daemon's death too, and none is forgotten."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.faults.content import chain
from tests.faults.house import LAYOUT, House, until
from tests.faults.pressure import press, store
from tests.faults.puppet import Puppet
from tests.faults.raw import RawClient
from tierd.adopt import adopt
from tierd.client import Client
from tierd.errors import Busy

BLOCKS = 200
"""More than one of the two segments has."""


def memory_bytes(pids: list[int]) -> int:
    """Bytes of all memory segments that these processes map, each counted once."""
    segments: dict[str, int] = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/map_files").iterdir():
            with suppress(FileNotFoundError):  # unmapped just now
                target, stat = os.readlink(link), os.stat(link)
                if target.startswith("/memfd:tierd-"):
                    segments[f"{target} {stat.st_ino}"] = stat.st_size
    return sum(segments.values())


@pytest.mark.parametrize("when", ["before", "after"])
def test_memory_that_a_client_maps_is_not_given_away(house: House, when: str) -> None:
    """Another namespace waits for it, whether the client was attached by this life of the daemon or an earlier one."""
    with Puppet(house.socket, ("hello",)) as puppet:
        slots = puppet.do("store", "mapped", BLOCKS)
        puppet.do("fill", 0, BLOCKS)
        puppet.do("commit")
        assert max(slots) >= 127
        house.sync()
        if when == "after":
            house.kill()
            house.wait_ready()
        other = RawClient(house.socket, model="other")
        other.hello()
        with pytest.raises(Busy):
            other.ask("store", hashes=chain("other", 8), deadline_ms=300)
        assert memory_bytes([house.child(), puppet.process.pid]) <= 8 << 20
        puppet.kill()
        until(lambda: can_store(other), "the memory of a dead client does not change hands")
        press(other, "other", 64)
        assert memory_bytes([house.child()]) <= 8 << 20


def can_store(client: RawClient) -> bool:
    """Whether there is memory for the client's namespace."""
    try:
        return store(client, chain("other", 8)) == 0
    except Busy:
        return False


def test_half_a_segment_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that died while it gave a segment up leaves one descriptor with the holder: its memory is given back."""
    removed: list[str] = []
    monkeypatch.setattr("tierd.systemd.remove", removed.append)
    half = os.memfd_create("half")
    adopt([], {"cpu.0.half.s": [half]}, lambda namespace: pytest.fail("nothing can be adopted"), 0)
    assert removed == ["cpu.0.half.s"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(half)


def test_a_stopped_engine_does_not_cost_its_namespace_all_blocks(short_path: Path) -> None:
    """Another namespace waits in vain for memory that only stopped processes map: two segments of six go, whatever it asks."""
    with House(short_path, cpu__bytes="24MiB", nvme__bytes="0") as house, Puppet(house.socket, model="stopped") as puppet:

        def is_full() -> bool:
            """It maps all six: on a busy machine the last one comes after the first work."""
            puppet.do("work", "mine", 7, 100, 0)
            return bool(house.slots()["ready"] > 5 * 127)

        until(is_full, "the tier is not full of its blocks", seconds=20.0)
        blocks = house.slots()["ready"]
        os.kill(puppet.process.pid, signal.SIGSTOP)
        other = RawClient(house.socket, model="other")
        other.hello()
        for _ in range(2):
            with pytest.raises(Busy):
                other.ask("store", hashes=chain("other", 8), deadline_ms=2500)
        assert blocks - house.slots()["ready"] <= 2 * 127
        os.kill(puppet.process.pid, signal.SIGCONT)
        until(lambda: can_store(other), "the memory of an engine that goes on does not change hands")


def test_a_client_that_gives_nothing_back_does_not_keep_others_from_memory(short_path: Path) -> None:
    """A stopped engine has the coldest segment: the next coldest one changes hands instead."""
    with House(short_path, cpu__bytes="12MiB", nvme__bytes="32MiB") as house:
        stopped = Puppet(house.socket, ("hello",), ("store", "cold", 8), ("fill", 0, 8), ("commit",), model="stopped")
        owner = Client(house.socket, model="owner", layout=LAYOUT)
        with stopped, owner:
            pool = np.zeros((BLOCKS, LAYOUT.block_bytes), np.uint8)
            assert owner.store(chain("owner", BLOCKS), pool, range(BLOCKS)).stored == BLOCKS
            other = RawClient(house.socket, model="other")
            other.hello()
            assert store(other, chain("other", 8)) == 0
            assert house.wait_ready()["tiers"]["cpu"]["used_bytes"] <= 12 << 20

"""A full disk: NVMe stops growing, what it has is read, memory goes on alone, and all is well when there is room again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.faults.content import chain
from tests.faults.house import House, until
from tests.faults.pressure import capacity_is_whole, press, store, verify
from tests.faults.raw import RawClient
from tierd.clock import monotonic_seconds
from tierd.errors import Busy

DISK_BYTES = 24 << 20
FILLER_BYTES = 14 << 20
"""What remains is room for two of the five segments that the tier may have."""
RECOVERY_SECONDS_MAX = 10.0

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")


@pytest.fixture
def disk(short_path: Path) -> Iterator[Path]:
    """A small file system of its own, most of it taken by somebody else's file."""
    folder = short_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tierd-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        with (folder / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, FILLER_BYTES)
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def used_bytes(house: House) -> int:
    """Of the nvme tier."""
    return int(house.wait_ready()["tiers"]["nvme"]["used_bytes"])


def test_a_full_disk_stops_growth_and_nothing_else(short_path: Path, disk: Path) -> None:
    """Stores are taken, blocks on NVMe are read, no byte is counted that is not there; space that comes back is used."""
    with House(short_path, cpu__bytes="4MiB", nvme__bytes="20MiB", nvme__path=str(disk / "nvme")) as house:
        client = RawClient(house.socket)
        client.hello()
        for number in range(8):
            chains = press(client, f"others {number}", 128)
            house.sync()
        assert "tier cannot grow" in house.log.read_text(), "the disk does not fill"
        until(lambda: used_bytes(house) == 8 << 20, "bytes are counted that are not there")
        press(client, "in memory", 96)
        assert verify(client, chains[-1]) == (32, 0)
        assert house.wait_ready()["evicted_blocks"]["nvme.drop"] > 0
        chains = press(client, "more", 254)
        assert verify(client, chains[-1]) == (32, 0)
        (disk / "filler").unlink()
        numbers = count()

        def grows() -> bool:
            press(client, f"late {next(numbers)}", 32)
            return used_bytes(house) > 8 << 20

        until(grows, "space that came back is not used", RECOVERY_SECONDS_MAX)
        house.sync()
        assert 8 << 20 < used_bytes(house) <= 20 << 20
        capacity_is_whole(house)
        assert not list((disk / "nvme").glob("*/*.new"))
        assert house.errors() == []


def test_room_that_comes_back_is_found_though_nobody_stores(short_path: Path, disk: Path) -> None:
    """The tier asks again by itself, and what new blocks had driven out of it is written once more while it is in memory."""
    with House(short_path, cpu__bytes="16MiB", nvme__bytes="20MiB", nvme__path=str(disk / "nvme")) as house:
        client = RawClient(house.socket)
        client.hello()
        chains = press(client, "others", 3 * 127)
        until(lambda: "tier cannot grow" in house.log.read_text(), "the disk does not fill")
        house.sync()
        assert used_bytes(house) == 8 << 20
        (disk / "filler").unlink()
        until(lambda: "tier grows again" in house.log.read_text(), "nobody asks for the room that came back")
        house.sync()
        house.crash()
        house.start()
        client = RawClient(house.socket)
        client.hello()
        assert [verify(client, one) for one in chains] == [(32, 0)] * len(chains)
        assert house.errors() == []


def test_new_blocks_reach_a_full_disk_at_the_cost_of_old_ones(short_path: Path, disk: Path) -> None:
    """The segments that are there go on to take blocks, `sync` answers, and the log says once that no more can be had."""
    with House(short_path, cpu__bytes="8MiB", nvme__bytes="20MiB", nvme__path=str(disk / "nvme")) as house:
        client = RawClient(house.socket)
        client.hello()
        press(client, "others", 4 * 254)
        until(lambda: "tier cannot grow" in house.log.read_text(), "the disk does not fill")
        for number in range(4):
            late = chain(f"late {number}", 64)
            assert store(client, late) == 0
            house.sync()
        assert house.wait_ready()["unwritten_runs"] == 0
        house.crash()
        house.start()
        client = RawClient(house.socket)
        client.hello()
        assert verify(client, late) == (64, 0)
        assert house.log.read_text().count("tier cannot grow") == 1
        assert house.errors() == []


def test_sync_says_at_once_that_a_full_disk_takes_nothing(short_path: Path, disk: Path) -> None:
    """No segment can be had at all: neither `sync` nor a stop waits for its deadline."""
    with (disk / "filler").open("r+b") as filler:
        os.posix_fallocate(filler.fileno(), 0, DISK_BYTES - (1 << 20))
    with House(short_path, held=False, cpu__bytes="8MiB", nvme__bytes="20MiB", nvme__path=str(disk / "nvme")) as house:
        client = RawClient(house.socket)
        client.hello()
        press(client, "others", 64)
        until(lambda: "tier cannot grow" in house.log.read_text(), "the disk does not fill")
        before = monotonic_seconds()
        with pytest.raises(Busy, match="wait for room"):
            house.sync()
        assert house.stop() == 0
        assert monotonic_seconds() - before < 3


def test_a_daemon_starts_on_a_full_disk(short_path: Path, disk: Path) -> None:
    """Not a byte can be had for NVMe: memory serves alone, and the next life finds nothing half made."""
    with (disk / "filler").open("r+b") as filler:
        os.posix_fallocate(filler.fileno(), 0, DISK_BYTES - (1 << 20))
    with House(short_path, cpu__bytes="8MiB", nvme__bytes="20MiB", nvme__path=str(disk / "nvme")) as house:
        client = RawClient(house.socket)
        client.hello()
        chains = press(client, "others", 2 * 254)
        assert verify(client, chains[-1]) == (32, 0)
        house.kill()
        house.wait_ready()
        client.connect()
        client.resume([])
        assert verify(client, chains[-1]) == (32, 0)
        assert used_bytes(house) == 0

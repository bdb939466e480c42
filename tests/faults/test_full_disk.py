"""A full disk: NVMe stops growing, what it has is read, memory goes on alone, and all is well when there is room again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.content import chain
from tests.faults.house import House, until
from tests.faults.pressure import capacity_is_whole, press, store, verify
from tests.faults.raw import RawClient

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
    with House(short_path, cpu__bytes="8MiB", nvme__bytes="20MiB", nvme__path=str(disk / "nvme")) as house:
        client = RawClient(house.socket)
        client.hello()
        early = chain("early", 64)
        store(client, early)
        house.sync()
        press(client, "others", 4 * 254)
        until(lambda: "tier cannot grow" in house.log.read_text(), "the disk does not fill")
        until(lambda: used_bytes(house) == 8 << 20, "bytes are counted that are not there")
        assert verify(client, early) == (64, 0)
        chains = press(client, "more", 254)
        assert verify(client, chains[-1]) == (32, 0)
        (disk / "filler").unlink()
        until(lambda: used_bytes(house) > 8 << 20, "space that came back is not used", RECOVERY_SECONDS_MAX)
        press(client, "late", 128)
        house.sync()
        assert 8 << 20 < used_bytes(house) <= 20 << 20
        capacity_is_whole(house)
        assert not list((disk / "nvme").glob("*/*.new"))
        assert house.errors() == []


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

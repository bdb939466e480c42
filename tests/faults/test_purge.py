"""What was purged does not come back: not by a crash at any moment, and not by a write that was under way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.content import chain, payload
from tests.faults.house import ROOT, House, until
from tests.faults.pressure import capacity_is_whole, store, verify
from tests.faults.raw import RawClient
from tierd.block import split
from tierd.cli.admin import ask
from tierd.errors import Busy, Gone, Invalid, TierdError
from tierd.tiers.io.posix import PosixEngine
from tierd.tiers.nvme import FileSegment

BLOCKS = 8
CALLS_MIN, CALLS_MAX = 4, 40
"""A purge of one segment of memory and one of files makes this many calls that change something."""
WRITE_SECONDS = 2
SLOW = [sys.executable, "-m", "tests.faults.slow", str(WRITE_SECONDS), "serve"]


def purge(house: House, client: RawClient, shred: bool = False) -> dict[str, Any]:
    """Ask the daemon to forget the client's namespace."""
    return ask(house.admin, "purge", 30.0, namespace=client.welcome["namespace"].hex(), shred=shred)


def greeted(house: House, model: str = "faults") -> RawClient:
    """A client with a session, whatever became of an earlier one."""
    house.wait_ready()
    client = RawClient(house.socket, model)
    client.hello()
    return client


def space(house: House, model: str = "faults") -> dict[str, Any]:
    """What the daemon says of a namespace."""
    return next(one for one in house.wait_ready()["namespaces"] if one["model"] == model)


def dying(house: House) -> int:
    """Segments of all namespaces that are on their way out."""
    return sum(one["dying_segments"] for one in house.wait_ready()["namespaces"])


def tierd(house: House, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command for the daemon of this house."""
    command = [sys.executable, "-m", "tierd", *arguments, "--runtime-dir", str(house.folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_a_purged_namespace_is_empty_in_every_later_life(house: House, client: RawClient) -> None:
    """In this life, after a kill with memory kept, and after a crash; its neighbour loses nothing."""
    hashes, neighbour = chain("purged", BLOCKS), greeted(house, "neighbour")
    for one in (client, neighbour):
        assert store(one, hashes) == 0
    house.sync()
    reply = purge(house, client)
    assert (reply["blocks"], reply["segments"]) == (BLOCKS, 2)
    assert verify(client, hashes) == (0, 0)
    assert verify(neighbour, hashes) == (BLOCKS, 0)
    house.kill()
    assert verify(greeted(house), hashes) == (0, 0)
    assert verify(greeted(house, "neighbour"), hashes) == (BLOCKS, 0)
    house.crash()
    house.start()
    assert verify(greeted(house), hashes) == (0, 0)
    assert verify(greeted(house, "neighbour"), hashes) == (BLOCKS, 0)


def test_files_that_a_daemon_without_nvme_cannot_reach_are_not_called_purged(short_path: Path) -> None:
    """A life with the tier would serve them again; the operator is told to remove them."""
    with House(short_path, cpu__bytes="8MiB") as house:
        client, hashes = greeted(house), chain("out of reach", BLOCKS)
        store(client, hashes)
        house.sync()
        assert house.stop() == 0
    with House(short_path, cpu__bytes="8MiB", nvme__bytes="0") as house:
        client = greeted(house)
        store(client, hashes)
        with pytest.raises(Invalid, match="cannot reach") as refused:
            purge(house, client)
        assert verify(client, hashes) == (BLOCKS, 0), "it was refused, and has purged"
        folder = next((house.state / "nvme").iterdir())
        assert str(folder) in str(refused.value)
        shutil.rmtree(folder)
        assert purge(house, client)["blocks"] == BLOCKS


def test_what_is_stored_again_is_the_new_block(house: House, client: RawClient) -> None:
    """Under the same hashes, with other bytes: no old copy is in its way or in its place, in this life and the next."""
    hashes = chain("again", BLOCKS)
    store(client, hashes)
    house.sync()
    purge(house, client)
    assert store(client, hashes, flavour=1) == 0
    assert verify(client, hashes, flavour=1) == (BLOCKS, 0)
    house.sync()
    house.crash()
    house.start()
    assert verify(greeted(house), hashes, flavour=1) == (BLOCKS, 0)
    capacity_is_whole(house)


@pytest.mark.parametrize("then", ["at once", "when all has ended"])
def test_a_write_back_in_flight_does_not_bring_it_back(short_path: Path, then: str) -> None:
    """The purge is answered while blocks are still being written; what they become on disk is of an older epoch."""
    with House(short_path, serve=SLOW, cpu__bytes="8MiB", nvme__bytes="32MiB") as house:
        client, hashes = greeted(house), chain("in flight", BLOCKS)
        store(client, hashes)
        until(lambda: space(house)["slots"]["nvme"]["filling"], "nothing is written")
        purge(house, client)
        filling = space(house)["slots"]["nvme"]["retired"]
        assert filling, "nothing was in flight any more, so nothing was shown"
        assert verify(client, hashes) == (0, 0)
        if then == "when all has ended":
            client.ask("bye")
            until(lambda: not dying(house), "segments stay", 20.0)
            assert verify(greeted(house), hashes) == (0, 0)
        house.crash()
        house.start()
        assert verify(greeted(house), hashes) == (0, 0)
        assert house.errors() == []


def test_a_load_that_waits_is_lost_and_what_was_told_is_whole(short_path: Path) -> None:
    """A lease on blocks below loses them; slots that a client was told keep their bytes until it lets go."""
    with House(short_path, cpu__bytes="8MiB", nvme__bytes="32MiB") as house:
        client, told, below = greeted(house), chain("told", BLOCKS), chain("below", BLOCKS)
        for hashes in (told, below):
            store(client, hashes)
        house.sync()
        house.crash()
        house.start()
        client = greeted(house)
        assert verify(client, told) == (BLOCKS, 0)
        _, blocks, slots = client.lookup(told)
        lease, found, early = client.lookup(below)
        assert (blocks, len(slots), found) == (BLOCKS, BLOCKS, BLOCKS)
        purge(house, client)
        with pytest.raises(Gone):
            client.ask("load", lease=lease, first=len(early), count=found - len(early))
        store(client, chain("new", BLOCKS))
        for block, slot in zip(split(told), slots, strict=True):
            assert np.array_equal(client.slot(slot), payload(block, client.layout.block_bytes))


def test_a_store_that_was_begun_before_does_not_end_after(house: House, client: RawClient) -> None:
    """Its commit is answered, and drops every block."""
    hashes = chain("begun", BLOCKS)
    lease, slots = client.store(hashes)
    assert min(slots) >= 0
    purge(house, client)
    reply = client.ask("commit", lease=lease)
    assert (reply["committed"], reply["dropped"]) == (0, BLOCKS)
    assert verify(client, hashes) == (0, 0)
    capacity_is_whole(house)


def test_a_purge_that_was_cut_off_is_finished_by_the_next_life(short_path: Path) -> None:
    """One header of two is of the next epoch: the blocks of both segments are gone, and the log says why."""
    with House(short_path, held=False, cpu__bytes="16MiB", nvme__bytes="32MiB") as house:
        client, hashes = greeted(house), chain("cut off", 160)
        assert store(client, hashes) == 0
        house.sync()
        house.crash()
        paths = sorted(house.state.glob("nvme/*/*.directory"))
        assert len(paths) == 2
        segment = FileSegment.open(paths[0], PosixEngine())
        segment.outdate(2)
        segment.close()
        house.start()
        assert verify(greeted(house), hashes) == (0, 0)
        assert "its namespace was purged and is at 2" in house.log.read_text()
        assert not paths[1].exists()
        client = greeted(house)
        assert store(client, hashes, flavour=1) == 0 and verify(client, hashes, flavour=1) == (160, 0)
        assert house.errors() == []


def test_a_daemon_that_stops_ends_the_purge_first(short_path: Path) -> None:
    """Its headers are written before the next life can read them. A pipe in the place of a file takes as long as we like."""
    with ThreadPoolExecutor(1) as pool, House(short_path, held=False, cpu__bytes="8MiB", nvme__bytes="8MiB") as house:
        client = greeted(house)
        store(client, chain("stop", BLOCKS))
        house.sync()
        (path,) = house.state.glob("nvme/*/*.directory")
        path.rename(path.with_suffix(".away"))
        os.mkfifo(path)
        asked = pool.submit(purge, house, client)
        until(lambda: not space(house)["blocks"], "the purge has not begun")
        assert house.process
        house.process.send_signal(signal.SIGTERM)
        until(lambda: not house.admin.exists(), "it does not stop")
        with pytest.raises(AssertionError, match="not yet"):
            until(lambda: "stopped" in house.log.read_text(), "not yet", 0.5)
        with path.open("rb"):
            assert house.process.wait(20.0) == 0
        log = house.log.read_text()
        assert log.index("purge is not safe yet") < log.index("stopped"), "a pipe cannot be synced, and that was not waited for"
        assert isinstance(asked.exception(), TierdError)


def die_at(folder: Path, call: int, how: str, shred: bool) -> bool:
    """One step of the sweep: the purge is killed at a call; returns False when it makes fewer."""
    marker = folder / "died"
    marker.with_suffix(".wait").touch()
    serve = [sys.executable, "-m", "tests.faults.deadly", str(marker), str(call), how, "serve"]
    hashes = chain("sweep", BLOCKS)
    with House(folder, serve=serve, cpu__bytes="8MiB", nvme__bytes="8MiB") as house:
        client = greeted(house)
        store(client, hashes)
        house.sync()
        client.ask("bye")
        marker.with_suffix(".wait").unlink()
        answered = False
        try:
            purge(house, client, shred)
            answered = True
            until(lambda: marker.exists() or not dying(house), "segments stay")
        except TierdError:
            assert marker.exists(), "the purge failed, and nobody was killed"
        if not marker.exists():
            return False
        for life in ("with its memory", "without"):
            house.wait_ready()
            had, wrong = verify(greeted(house), hashes)
            assert not wrong and (not had or not answered), f"call {call} {how}, {life}: {had} blocks, {wrong} wrong"
            house.crash()
            house.start()
        client = greeted(house)
        purge(house, client)
        assert verify(client, hashes) == (0, 0)
        assert store(client, hashes, flavour=2) == 0
        house.sync()
        assert verify(client, hashes, flavour=2) == (BLOCKS, 0)
        capacity_is_whole(house)
        assert house.errors() == []
    return True


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("how", "shred"), [("before", False), ("half", True)])
def test_dying_at_any_call_of_a_purge_brings_nothing_back_that_was_answered_for(
    short_path: Path, how: str, shred: bool
) -> None:
    """Every write, sync and unlink, of headers, of zeros, and of the files that go; a purge that is asked again succeeds."""
    for call in range(1, CALLS_MAX):
        folder = short_path / str(call)
        folder.mkdir()
        if not die_at(folder, call, how, shred):
            assert call > CALLS_MIN, f"only {call - 1} calls were swept"
            return
        shutil.rmtree(folder)
    pytest.fail(f"a purge makes more than {CALLS_MAX} calls: sweep them too")


def test_shred_leaves_no_byte_of_a_block_in_files_or_memory(house: House, client: RawClient) -> None:
    """Whoever keeps a descriptor sees zeros: of the files that were removed, and of memory once clients have let go."""
    hashes = chain("secret", BLOCKS)
    store(client, hashes)
    house.sync()
    files = [path.open("rb") for path in house.state.glob("nvme/*/*")]
    assert any(split_first(hashes) in file.read() for file in files), "the hash should be in the directory"
    (slots,) = client.slots.values()
    assert slots.any()
    client.ask("bye")
    done = tierd(house, "purge", client.welcome["namespace"].hex()[:16], "--shred", "--yes", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["blocks"] == BLOCKS
    for file in files:
        file.seek(0)
        assert not any(file.read()), f"{file.name} still has something"
        assert os.fstat(file.fileno()).st_nlink == 0
    assert not slots.any()


def split_first(hashes: bytes) -> bytes:
    """The first hash of a chain."""
    return next(iter(split(hashes)))


def test_shred_says_who_is_in_the_way(house: House, client: RawClient) -> None:
    """A client that reads keeps its segment; when it lets go, the rest follows without being asked again."""
    hashes = chain("read", BLOCKS)
    store(client, hashes)
    house.sync()
    lease, _, _ = client.lookup(hashes)
    name = client.welcome["namespace"].hex()[:16]
    done = tierd(house, "purge", name, "--shred", "--yes", "--timeout", "0.5")
    assert done.returncode == 1
    assert (
        f"1 segments are not overwritten after 0.5 s: they are when the clients that use them let go (by hand ({os.getpid()}))"
        in (done.stderr)
    )
    client.ask("release", lease=lease)
    client.ask("bye")
    until(lambda: not dying(house), "the segment stays")


def test_without_yes_nothing_is_purged(house: House, client: RawClient) -> None:
    """It says what would go, and ends with 2; a name that is not there or is not clear says so too."""
    store(client, chain("kept", BLOCKS))
    name = client.welcome["namespace"].hex()
    done = tierd(house, "purge", name[:16])
    assert done.returncode == 2 and f"{BLOCKS} blocks, 1 clients attached; say --yes" in done.stderr
    assert verify(client, chain("kept", BLOCKS)) == (BLOCKS, 0)
    nobody = "0000" if name[:4] != "0000" else "1111"
    done = tierd(house, "purge", nobody, "--yes")
    assert done.returncode == 1 and f"no namespace begins with '{nobody}'" in done.stderr
    with pytest.raises(Invalid, match="must be a string of length 4 to 64"):
        ask(house.admin, "purge", 5.0, namespace="")


def test_a_disk_that_does_not_take_the_headers_is_said(house: House, client: RawClient) -> None:
    """The answer is an error with what follows from it, not a promise."""
    store(client, chain("stuck", BLOCKS))
    house.sync()
    for path in house.state.glob("nvme/*/*.directory"):
        path.rename(path.with_suffix(".away"))
        path.mkdir()
    with pytest.raises(Busy, match="may be back in the next"):
        purge(house, client)
    assert verify(client, chain("stuck", BLOCKS)) == (0, 0)

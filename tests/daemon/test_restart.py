"""What outlives the daemon: blocks in nvme, blocks in memory under a holder, recency, sessions; and what rightly does not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import CAN_CONTAIN, LAYOUT, ROOT, SLOTS, Daemon, Wire, hashes_of, payload_of
from tierd.client import Client
from tierd.clock import monotonic_seconds, unix_milliseconds
from tierd.errors import Busy, Gone
from tierd.layout import Layout
from tierd.tiers.directory import Directory
from tierd.tiers.nvme import slots_path
from tierd.tiers.segment import Header

LARGE = Layout(layers=1, kv_heads=1, head_dim=8192, dtype="float16")
"""Blocks of 512 KiB."""


def store_all(daemon: Daemon, chains: dict[str, bytes]) -> None:
    """Store chains one after the other, each at a later millisecond, and bring them to nvme."""
    with daemon.peer() as wire:
        for hashes in chains.values():
            next_millisecond()
            assert wire.store(hashes) == len(hashes) // 32
            daemon.ask("sync", deadline_ms=10_000)


def next_millisecond() -> int:
    """Wait until the wall clock shows another millisecond."""
    now = unix_milliseconds()
    while unix_milliseconds() == now:
        pass
    return now + 1


def segment_files(daemon: Daemon) -> list[Path]:
    """The directories of the nvme tier's segments."""
    return sorted((daemon.state / "nvme").rglob("*.directory"))


def used_on_disk(daemon: Daemon, since: int) -> int:
    """Of how many blocks the files know that they were used since then (Unix milliseconds)."""
    used = 0
    for path in segment_files(daemon):
        data = bytearray(path.read_bytes())
        used += int((Directory(data, Header.unpack(data[:4096])).recency["last_use"] >= since).sum())
    return used


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_nvme_is_warm_after_a_restart_and_the_coldest_goes_first(start: Start, end: str) -> None:
    """All blocks are hits again; when room is needed, it is the one that was used longest ago that loses its tail."""
    daemon = start(nvme_bytes=4 * 262_144)
    chains = {name: hashes_of(seed, 60) for seed, name in enumerate("ABC", 1)}
    store_all(daemon, chains)
    since = next_millisecond()
    with daemon.peer() as wire:
        assert wire.load(chains["A"]) == 60
        assert wire.load(chains["C"]) == 60
    if end == "kill":
        daemon.wait_until(lambda _: used_on_disk(daemon, since) == 120)
    getattr(daemon, end)()
    daemon.start()
    assert daemon.slots("nvme")["ready"] == 180
    with daemon.peer() as wire:
        assert wire.store(hashes_of(9, 80)) == 80
        daemon.ask("sync", deadline_ms=10_000)
        found = {name: wire.lookup(hashes)["tiers"]["nvme"] for name, hashes in chains.items()}
        assert found["A"] == found["C"] == 60
        assert 0 < found["B"] < 60
        for name, hashes in chains.items():
            assert wire.load(hashes) == found[name]


def test_after_kill_9_under_the_holder_memory_is_warm(start: Start) -> None:
    """Blocks that never reached nvme are hits in memory again, within seconds, for new sessions and for old ones."""
    daemon = start(held=True, nvme_bytes=0)
    hashes = hashes_of(1, 150)
    old = daemon.peer()
    old.store(hashes)
    reading = old.lookup(hashes)
    writing = old.place(hashes_of(2, 20))[1]
    before = monotonic_seconds()
    daemon.kill()
    assert monotonic_seconds() - before < 5
    with daemon.peer() as new:
        assert new.load(hashes) == 150
    assert daemon.slots("cpu")["ready"] == 150
    assert old.read(hashes, 0, reading["slots"]) == 150
    again, lease = old.resume(old.held([int(writing[0])], 2))
    assert again.load(hashes) == 150
    assert again.lookup(hashes_of(2, 20))["tiers"]["miss"] == 20
    again.ask("release", lease=lease)
    assert again.store(hashes_of(2, 20)) == 20
    again.end()
    slots = daemon.slots("cpu")
    assert (slots["ready"], slots["filling"], slots["retired"]) == (170, 0, 0)
    assert daemon.stop() == 0


class Contained(Daemon):
    """A held daemon in a PID namespace of its own, which its clients are not in."""

    def command(self) -> list[str]:
        return ["unshare", "--pid", "--fork", "--mount-proc", *super().command()]


def child_of(pid: int) -> int:
    """The only child of a process."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@pytest.mark.skipif(not CAN_CONTAIN, reason="no PID namespace can be made here")
def test_an_engine_outside_the_daemons_container_keeps_what_it_writes(make: Start) -> None:
    """The daemon cannot number it (its pid there is 0), knows by its pidfd that it lives, and lets it resume."""
    plain = make(held=True, nvme_bytes=0)
    daemon = Contained(plain.folder, plain.flags, held=True).start()
    assert daemon.process is not None
    holder = child_of(daemon.pid)
    try:
        engine = daemon.peer()
        engine.store(hashes_of(1, 50))
        _, writing = engine.place(hashes_of(2, 20))
        (space,) = daemon.status()["namespaces"]
        assert space["sessions"] == [{"client": "test", "pid": 0}]
        engine, _ = engine.resume(engine.held(writing.tolist(), 2))
        life = daemon.status()["pid"]
        os.kill(child_of(holder), signal.SIGKILL)
        daemon.wait_ready(not_pid=life)
        with daemon.peer(client="other") as other:
            given = other.place(hashes_of(3, 4 * SLOTS))[1]
            assert not set(given[given >= 0].tolist()) & set(writing.tolist())
            assert engine.resume(engine.held(writing.tolist(), 2))[1]
    finally:
        os.kill(holder, signal.SIGTERM)
        assert daemon.process.wait(20) == 0


def test_a_client_that_is_closed_after_a_restart_leaves_no_session(start: Start) -> None:
    """It has not met the new daemon yet when it is closed, and its process goes on: its bit is free all the same."""
    daemon = start(held=True, nvme_bytes=0)
    client = Client(daemon.socket, model="closed", layout=LAYOUT)
    pool = np.zeros((8, LAYOUT.block_bytes), np.uint8)
    assert client.store(hashes_of(1, 8), pool, range(8)).stored == 8
    daemon.kill()
    client.close()
    daemon.wait_until(lambda status: status["sessions"] == 0)


def test_many_lives_under_the_holder_lose_no_slot(start: Start) -> None:
    """After each of several kills the slots by state still sum to the tier's, and the accounting of bytes is exact."""
    daemon = start(held=True)
    hashes = hashes_of(1, 100)
    store_all(daemon, {"A": hashes})
    used = {name: tier["used_bytes"] for name, tier in daemon.status()["tiers"].items()}
    for life in range(4):
        daemon.kill()
        status = daemon.status()
        assert {name: tier["used_bytes"] for name, tier in status["tiers"].items()} == used
        for tier in status["tiers"].values():
            assert sum(tier["slots"].values()) % SLOTS == 0
            assert tier["slots"]["ready"] == 100
        with daemon.peer() as wire:
            assert wire.load(hashes) == 100, f"life {life}"


def test_without_a_holder_memory_is_cold_and_nvme_is_warm(daemon: Daemon) -> None:
    """kill -9 costs what was not in nvme yet, and a session of that life is told to say hello."""
    hashes = hashes_of(1, 50)
    store_all(daemon, {"A": hashes})
    old = daemon.peer()
    daemon.kill()
    daemon.start()
    with pytest.raises(Gone, match="say hello"):
        old.resume()
    with daemon.peer() as wire:
        assert wire.lookup(hashes)["tiers"]["nvme"] == 50
        assert wire.load(hashes) == 50


def test_another_segment_size_is_a_cold_start_that_says_why(daemon: Daemon, make: Start) -> None:
    """Files of another geometry are given up with both values in the log; nothing of them is left, and all works."""
    hashes = hashes_of(1, 50)
    store_all(daemon, {"A": hashes})
    old = segment_files(daemon)
    daemon.stop()
    other = make(nvme_segment_bytes="128KiB").start()
    assert "segment given up" in other.log
    assert "is not the configured" in other.log
    assert other.status()["tiers"]["nvme"]["used_bytes"] == 0
    assert not set(old) & set(segment_files(other))
    with other.peer() as wire:
        assert wire.lookup(hashes)["tiers"]["miss"] == 50
    store_all(other, {"A": hashes})
    assert other.metrics()['tierd_slots{state="ready",tier="nvme"}'] == 50


def test_segments_too_small_for_an_old_block_are_a_cold_start(make: Start) -> None:
    """A namespace whose blocks fit into no segment any more does not keep the daemon from starting."""
    roomy = {"cpu_segment_bytes": "1MiB", "nvme_segment_bytes": "1MiB"}
    daemon = make(**roomy).start()
    with daemon.peer(layout=LARGE.to_map(), fingerprint=LARGE.fingerprint) as wire:
        lease = wire.ask("store", hashes=hashes_of(1, 1))["lease"]
        assert wire.ask("commit", lease=lease)["committed"] == 1
        daemon.ask("sync", deadline_ms=10_000)
    daemon.stop()
    other = make().start()
    assert "raise segment_bytes" in other.log
    assert (other.status()["namespaces"], segment_files(other)) == ([], [])


def test_a_smaller_limit_holds_from_the_start(daemon: Daemon, make: Start) -> None:
    """What is over the new limit is given up, the rest is served; the bytes on disk are within it."""
    chains = {str(seed): hashes_of(seed, 58) for seed in range(1, 5)}
    store_all(daemon, chains)
    daemon.stop()
    other = make(nvme_bytes=2 * 262_144).start()
    assert "limited to 524288 bytes" in other.log
    assert sum(path.stat().st_size for path in segment_files(other)) <= 2 * 262_144
    with other.peer() as wire:
        found = [wire.load(hashes) for hashes in chains.values()]
    assert 0 < sum(found) <= 2 * SLOTS


def test_garbage_in_the_state_directory_is_removed_and_said(daemon: Daemon) -> None:
    """Unfinished, foreign and damaged files are no reason not to start, and nothing of them is served."""
    hashes = hashes_of(1, 50)
    store_all(daemon, {"A": hashes})
    daemon.stop()
    folder = segment_files(daemon)[0].parent
    (folder / f"{'ab' * 16}.directory").write_bytes(os.urandom(262_144))
    (folder / f"{'cd' * 16}.new").write_bytes(b"")
    damaged = bytearray((path := segment_files(daemon)[-1]).read_bytes())
    damaged[40] ^= 1
    path.write_bytes(damaged)
    daemon.start()
    assert daemon.log.count("segment file removed") >= 2
    assert not list(folder.glob("*.new"))
    with daemon.peer() as wire:
        assert wire.load(hashes) in range(51)
        assert wire.store(hashes_of(2, 10)) == 10


def test_flipped_bits_in_payloads_are_misses_and_are_counted(daemon: Daemon) -> None:
    """A block whose bytes changed on disk is never served: the prefix ends there, and the counter says so."""
    hashes = hashes_of(1, 50)
    store_all(daemon, {"A": hashes})
    daemon.stop()
    for path in segment_files(daemon):
        header = Header.unpack(path.read_bytes()[:4096])
        with open(slots_path(path), "r+b") as file:
            for slot in range(header.geometry.slot_count):
                at = slot * header.geometry.slot_bytes
                file.seek(at)
                if file.read(32) == payload_of(hashes[20 * 32 : 21 * 32])[:32].tobytes():
                    file.seek(at + 100)
                    file.write(b"\xff\x00")
    daemon.start()
    with daemon.peer() as wire:
        assert wire.lookup(hashes)["tiers"]["nvme"] == 50
        assert load_what_can_be(wire, hashes) == 20
        assert daemon.metrics()["tierd_checksum_failures_total"] == 1
        assert daemon.slots("nvme")["quarantined"] == 1
        assert wire.store(hashes) >= 1
        assert wire.load(hashes) == 50


def load_what_can_be(wire: Wire, hashes: bytes) -> int:
    """Load a prefix that may end early; returns the blocks that had their bytes."""
    lease = wire.lookup(hashes, ROOT)
    at = wire.read(hashes, 0, lease["slots"])
    while at < lease["blocks"]:
        try:
            window = wire.ask("load", lease=lease["lease"], first=at, count=lease["blocks"] - at)
        except Gone:
            break
        at += wire.read(hashes, at, window["slots"])
    wire.ask("release", lease=lease["lease"])
    return at


def test_a_budget_of_writes_holds_over_lives(start: Start) -> None:
    """A mebibyte a day: however often the daemon is killed, nvme gets no more than that of what memory was offered."""
    most, offered = (1 << 20) // LAYOUT.block_bytes, 3 * SLOTS
    daemon = start(nvme_write_bytes_per_day="1MiB")
    for life in range(4):
        with daemon.peer() as wire:
            assert wire.store(hashes_of(life, offered)) == offered
        if (life + 1) * offered <= most:
            daemon.ask("sync", deadline_ms=10_000)
        else:
            with pytest.raises(Busy, match="tomorrow's writes"):
                daemon.ask("sync", deadline_ms=10_000)
        daemon.kill()
        daemon.start()
    with daemon.peer() as wire:
        found = sum(wire.lookup(hashes_of(life, offered))["blocks"] for life in range(4))
    assert 0.8 * most <= found <= most

"""Who asks is told which blocks tierd has no more, or that it may be all of them; nobody waits for who does not listen."""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import ANSWER_SECONDS_MAX, LAYOUT, POLL_SECONDS, SLOTS, Daemon, Wire, hashes_of, readable
from tierd.block import split
from tierd.client import Client
from tierd.clock import monotonic_seconds
from tierd.core.removed import BLOCKS_MAX
from tierd.layout import Layout

TIER = 4 * SLOTS
"""Blocks that the daemon's memory has room for."""

SMALL = Layout(layers=1, kv_heads=1, head_dim=8, dtype="float16")
SMALL_BLOCKS = {"layout": SMALL.to_map(), "fingerprint": SMALL.fingerprint}


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """Memory only, so that what is evicted is gone."""
    return start(nvme_bytes=0)


@pytest.fixture
def large(start: Start) -> Daemon:
    """One segment for more small blocks than a push names."""
    return start(nvme_bytes=0, cpu_bytes=192 << 20, cpu_segment_bytes=192 << 20)


@contextmanager
def channel_of(wire: Wire) -> Iterator[Wire]:
    """An event channel of its session."""
    channel = Wire(wire.path)
    channel.ask("events", **{name: wire.welcome[name] for name in ("session", "token")})
    yield channel
    channel.close()


def told(channel: Wire, blocks: int) -> tuple[list[bytes], bool]:
    """What the channel says until so many blocks were named, or that everything may be gone."""
    gone: list[bytes] = []
    while len(gone) < blocks:
        push = channel._frame()
        if push["push"] == "removed":  # not a detach
            if push["everything"]:
                assert not push["hashes"]
                return gone, True
            gone += split(push["hashes"])
    return gone, False


def known(wire: Wire, hashes: bytes) -> int:
    """How many leading blocks the daemon has."""
    reply = wire.lookup(hashes)
    if reply["lease"]:
        wire.ask("release", lease=reply["lease"])
    return int(reply["blocks"])


def test_evicted_blocks_are_named_once_and_are_gone(daemon: Daemon) -> None:
    """A tier's worth is stored over another: all that is named is a miss, all that is not is a hit."""
    old = hashes_of(1, TIER)
    with daemon.peer(removed=True) as wire, channel_of(wire) as channel, daemon.peer() as other:
        assert other.store(old) == TIER
        assert other.store(hashes_of(2, TIER // 2)) == TIER // 2
        kept = known(other, old)
        gone, everything = told(channel, TIER - kept)
        assert not everything and 0 < kept <= TIER // 2
        assert len(gone) == TIER - kept and set(gone) == set(split(old[kept * 32 :]))


def test_nobody_else_is_told(daemon: Daemon) -> None:
    """A session that did not ask hears nothing, whatever goes."""
    with daemon.peer(removed=True) as asks, channel_of(asks) as hears, daemon.peer() as wire, channel_of(wire) as channel:
        wire.store(hashes_of(1, TIER))
        wire.store(hashes_of(2, TIER // 2))
        told(hears, TIER // 2)
        assert not readable(channel.socket.fileno(), 0)


def enter(wire: Wire, seed: int, blocks: int) -> None:
    """Store blocks whose bytes do not matter."""
    lease = wire.ask("store", hashes=hashes_of(seed, blocks))["lease"]
    assert wire.ask("commit", lease=lease)["committed"] == blocks


def test_a_purge_of_much_says_that_everything_may_be_gone(large: Daemon) -> None:
    """More blocks than a push names: one bit says it."""
    with large.peer(removed=True, **SMALL_BLOCKS) as wire, channel_of(wire) as channel:
        for seed, blocks in enumerate((BLOCKS_MAX, 1)):
            enter(wire, seed, blocks)
        large.ask("purge", namespace=wire.welcome["namespace"].hex())
        assert told(channel, 1) == ([], True)


def test_what_went_without_a_channel_is_told_as_everything(daemon: Daemon) -> None:
    """Nothing is kept for a session that has no channel: when it has one, it is told that it has missed something."""
    with daemon.peer(removed=True) as wire, daemon.peer() as other:
        other.store(hashes_of(1, TIER))
        with channel_of(wire) as channel:
            other.store(hashes_of(2, TIER // 2))
            assert not told(channel, TIER // 2)[1]
        other.store(hashes_of(3, TIER))
        with channel_of(wire) as channel:
            assert told(channel, 1) == ([], True)


def test_who_does_not_read_costs_no_memory_and_is_told_at_last(large: Daemon) -> None:
    """Blocks come and go while it sleeps: the daemon keeps one bit for it, others are served and told meanwhile."""
    blocks, rounds = BLOCKS_MAX - 1, 8
    with (
        large.peer(removed=True, **SMALL_BLOCKS) as sleeps,
        channel_of(sleeps) as silent,
        large.peer(removed=True, **SMALL_BLOCKS) as wire,
        channel_of(wire) as channel,
    ):
        enter(wire, 0, blocks)
        enter(wire, 1, blocks)
        told(channel, 1)
        for seed in range(2, 2 + rounds):  # several times what its socket takes
            enter(wire, seed, blocks)
            assert told(channel, blocks)[1] is False
        heard, everything = 0, False
        while not everything:
            gone, everything = told(silent, 1)
            heard += len(gone)
        assert 0 < heard < rounds * blocks
        enter(wire, 2 + rounds, blocks)
        assert told(silent, blocks)[1] is False


def until_removed(client: Client, blocks: int) -> tuple[list[bytes], bool]:
    """What a client hears until that many blocks or everything."""
    deadline = monotonic_seconds() + ANSWER_SECONDS_MAX
    gone: list[bytes] = []
    everything = False
    while len(gone) < blocks and not everything:
        assert monotonic_seconds() < deadline, f"{len(gone)} of {blocks} blocks were named"
        hashes, everything = client.removed()
        gone += split(hashes)
        select.select([], [], [], POLL_SECONDS)
    return gone, everything


def test_a_client_hears_what_another_evicts(daemon: Daemon) -> None:
    """Idle or not: its thread reads the channel, and it takes what was told when it likes."""
    pool = np.zeros((TIER, LAYOUT.block_bytes), np.uint8)
    with (
        Client(daemon.socket, model="model", layout=LAYOUT, removals=True, deadline_seconds=10) as client,
        Client(daemon.socket, model="model", layout=LAYOUT, deadline_seconds=10) as other,
    ):
        until_removed(client, 0)
        client.removed()
        old = hashes_of(1, TIER)
        assert client.store(old, pool, range(TIER)).stored == TIER
        assert other.store(hashes_of(2, TIER), pool, range(TIER)).stored == TIER
        gone, everything = until_removed(client, TIER)
        assert everything or set(gone) == set(split(old))
        assert other.removed() == (b"", True), "who did not ask knows from its first hello only"


@pytest.mark.parametrize("held", [False, True])
def test_after_another_life_of_the_daemon_everything_may_be_gone(start: Start, held: bool) -> None:
    """Whether the session is a new one or goes on: nobody noted what went in between."""
    daemon = start(nvme_bytes=0, held=held)
    pool = np.zeros((SLOTS, LAYOUT.block_bytes), np.uint8)
    with Client(daemon.socket, model="model", layout=LAYOUT, removals=True, deadline_seconds=10) as client:
        client.removed()
        assert client.store(hashes_of(1, SLOTS), pool, range(SLOTS)).stored == SLOTS
        client.removed()
        daemon.kill()
        if not held:
            daemon.start()
        assert until_removed(client, 1) == ([], True)

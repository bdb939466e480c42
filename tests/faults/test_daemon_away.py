"""A daemon that is dead, restarting or stopped costs an engine a miss within its deadline, and nothing else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from tests.faults.content import chain, fill, wrong
from tests.faults.house import LAYOUT, House, until
from tierd.client import Client, Stored

BLOCKS = 32
DEADLINE_SECONDS = 0.3
SLACK_SECONDS = 0.5
"""What a loaded machine may add: a call does more than to wait."""
BACK_SECONDS_MAX = 5.0
HASHES = chain("away", BLOCKS)
PAGES = list(range(BLOCKS))


class Engine:
    """A client whose calls are timed."""

    def __init__(self, path: Path) -> None:
        self.client = Client(path, model="faults", layout=LAYOUT, deadline_seconds=DEADLINE_SECONDS)
        self.pool = np.zeros((BLOCKS, LAYOUT.block_bytes), np.uint8)
        self.seconds_max = 0.0

    def load(self) -> int:
        """Blocks loaded, all of them right."""
        self.pool[:] = 0
        started = time.monotonic()
        had = self.client.load(HASHES, self.pool, PAGES)
        self.seconds_max = max(self.seconds_max, time.monotonic() - started)
        assert wrong(self.pool, HASHES, had) == []
        return had

    def store(self, hashes: bytes = HASHES) -> Stored:
        """What became of a store."""
        fill(self.pool, hashes)
        started = time.monotonic()
        stored = self.client.store(hashes, self.pool, PAGES)
        self.seconds_max = max(self.seconds_max, time.monotonic() - started)
        return stored


@pytest.fixture
def engine(short_path: Path) -> Iterator[Engine]:
    """An engine in this process; its daemon would be in `short_path`."""
    engine = Engine(short_path / "t.sock")
    yield engine
    engine.client.close()
    assert engine.seconds_max < DEADLINE_SECONDS + SLACK_SECONDS


def test_without_a_daemon_every_call_is_a_miss(engine: Engine) -> None:
    """Nobody has ever listened there."""
    for _ in range(3):
        assert (engine.load(), engine.store()) == (0, Stored(refused=BLOCKS))
        assert not engine.client.lookup(HASHES)
        assert engine.client.prefetch(HASHES) == 0


def test_a_daemon_that_came_late_is_found(short_path: Path, engine: Engine) -> None:
    """The engine was first, and needs no restart."""
    assert engine.load() == 0
    with House(short_path):
        until(lambda: engine.store().stored, "the daemon is not found", BACK_SECONDS_MAX)
        assert engine.load() == BLOCKS


def test_a_stopped_daemon_costs_its_deadline_and_then_little(short_path: Path, engine: Engine) -> None:
    """A first call waits for the deadline, the next ones do not even ask; when it goes on, its blocks are hits again."""
    with House(short_path) as house:
        assert engine.store().stored == BLOCKS
        pid = house.child()
        os.kill(pid, signal.SIGSTOP)
        try:
            assert engine.load() == 0
            started = time.monotonic()
            assert [engine.load() for _ in range(5)] == [0] * 5
            assert time.monotonic() - started < 2 * (DEADLINE_SECONDS + SLACK_SECONDS)
            assert engine.store().refused == BLOCKS
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: engine.load() == BLOCKS, "the daemon that goes on is not used", BACK_SECONDS_MAX)


def test_a_daemon_killed_again_and_again_is_never_more_than_a_miss(short_path: Path, engine: Engine) -> None:
    """Every call ends in time, during each death and each recovery; after each the blocks are hits."""
    with House(short_path) as house:
        assert engine.store().stored == BLOCKS
        house.sync()
        numbers = count()
        for _ in range(5):
            house.kill()
            engine.load()
            engine.store(chain(f"away {next(numbers)}", BLOCKS))
            until(lambda: engine.load() == BLOCKS, "no hit after a restart", BACK_SECONDS_MAX)
        assert engine.client.statistics["reconnects"] >= 5


def test_a_daemon_that_starts_cold_is_used_by_engines_that_knew_its_earlier_life(short_path: Path, engine: Engine) -> None:
    """Without a holder memory is gone, sessions too; blocks come from NVMe and the engine says hello by itself."""
    with House(short_path, held=False) as house:
        assert engine.store().stored == BLOCKS
        house.sync()
        house.crash()
        assert engine.load() == 0
        house.start()
        until(lambda: engine.load() == BLOCKS, "no hit after a cold start", BACK_SECONDS_MAX)

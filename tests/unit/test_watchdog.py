"""The watchdog is fed by a loop that turns, and not while transfers hang."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_mover import PATIENCE_SECONDS, Memory
from tierd import watchdog
from tierd.core.plan import DEMAND, Transfer
from tierd.mover import Mover

FED = b"WATCHDOG=1"
WATCH_SECONDS = 0.4


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A manager that wants to hear from us every WATCH_SECONDS."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "n"))
        listener.settimeout(PATIENCE_SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCH_SECONDS * 1e6)))
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        yield listener


def drain(manager: socket.socket) -> None:
    """Forget what has come so far."""
    manager.setblocking(False)
    try:
        while manager.recv(64):
            pass
    except BlockingIOError:
        manager.settimeout(PATIENCE_SECONDS)


def test_an_idle_daemon_feeds_it(manager: socket.socket) -> None:
    """Nothing to move is no lack of progress."""

    async def story() -> list[bytes]:
        feeding = asyncio.create_task(watchdog.feed(Mover(1, lambda *_: None)))
        fed = [await asyncio.to_thread(manager.recv, 64) for _ in range(6)]
        feeding.cancel()
        return fed

    assert asyncio.run(story()) == [FED] * 6


def test_it_is_not_fed_while_no_transfer_ends_and_again_when_one_does(manager: socket.socket) -> None:
    """An io thread that hangs for half of the watchdog's time stops it, though the loop turns."""

    async def story() -> tuple[float, bool]:
        memory, ended = Memory(), asyncio.Event()
        mover = Mover(1, lambda *_: ended.set())
        feeding = asyncio.create_task(watchdog.feed(mover))
        slots = np.zeros(1, np.int32)
        mover.submit(memory, Transfer(1, DEMAND, "gpu", "cpu", slots, slots, bytes(32), bytes(32)))  # type: ignore[arg-type]
        while mover.stuck_seconds() <= WATCH_SECONDS:  # by now it is not fed any more
            await asyncio.sleep(WATCH_SECONDS / 8)
        drain(manager)
        stuck = mover.stuck_seconds()
        manager.settimeout(WATCH_SECONDS)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(manager.recv, 64)
        manager.settimeout(PATIENCE_SECONDS)
        memory.may_begin.set()
        await asyncio.wait_for(ended.wait(), PATIENCE_SECONDS)
        fed = await asyncio.to_thread(manager.recv, 64) == FED
        feeding.cancel()
        await mover.close()
        return stuck, fed and mover.stuck_seconds() == 0

    stuck, fed_again = asyncio.run(story())
    assert stuck > WATCH_SECONDS and fed_again


@pytest.mark.parametrize("whose", ["another process", "nobody"])
def test_who_is_not_watched_feeds_nobody(whose: str, manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """WATCHDOG_PID names another process, or there is no watchdog at all: the task ends at once."""
    if whose == "nobody":
        monkeypatch.delenv("WATCHDOG_USEC")
    else:
        monkeypatch.setenv("WATCHDOG_PID", "1")
    asyncio.run(asyncio.wait_for(watchdog.feed(Mover(1, lambda *_: None)), PATIENCE_SECONDS))
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(64)


def test_a_manager_that_does_not_read_cannot_hold_up_the_loop(manager: socket.socket) -> None:
    """With its queue full, the feeding loop goes on turning, and feeds again once there is room."""

    async def story() -> int:
        feeding = asyncio.create_task(watchdog.feed(Mover(1, lambda *_: None)))
        turns = 0
        full = False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as noise:
            noise.connect(os.environ["NOTIFY_SOCKET"])
            while not full:
                try:
                    noise.send(b"x")
                except BlockingIOError:
                    full = True
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began + 2 * WATCH_SECONDS:
            before = asyncio.get_running_loop().time()
            await asyncio.sleep(0.001)
            turns += asyncio.get_running_loop().time() - before < WATCH_SECONDS / 2
        drain(manager)
        assert await asyncio.to_thread(manager.recv, 64) == FED
        feeding.cancel()
        return turns

    assert asyncio.run(story()) > 10

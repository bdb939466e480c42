"""Servers and clients for the tests of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_daemon import LAYOUT, Daemon, Memory, make_segment
from tests.unit.peer import Scripted
from tierd.client import Client

Connect = Callable[..., Client]


@pytest.fixture
def handler() -> Scripted:
    """A handler that the test scripts."""
    return Scripted()


@pytest.fixture
def server(tmp_path: Path, handler: Scripted) -> Iterator[Daemon]:
    """A server with that handler."""
    running = Daemon(tmp_path / "s", handler)
    yield running
    running.close()


@pytest.fixture
def memory() -> Iterator[Memory]:
    """A cache of two segments with 100 slots each."""
    made = Memory([make_segment(100), make_segment(100)])
    assert made.per_segment == 100
    yield made
    for segment in made.segments:
        segment.close()


@pytest.fixture
def daemon(tmp_path: Path, memory: Memory) -> Iterator[Daemon]:
    """The cache behind a server."""
    running = Daemon(tmp_path / "s", memory)
    yield running
    running.close()


@pytest.fixture
def connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Makes clients, and closes them at the end; they store 32 of our small blocks at a time, not thousands."""
    monkeypatch.setattr("tierd.client.store.BATCH_BYTES", 32 * LAYOUT.block_bytes)
    clients: list[Client] = []

    def make(**options: Any) -> Client:
        given = {"model": "model", "layout": LAYOUT, "deadline_seconds": 5.0, **options}
        clients.append(Client(tmp_path / "s", **given))
        return clients[-1]

    yield make
    for client in clients:
        client.close()

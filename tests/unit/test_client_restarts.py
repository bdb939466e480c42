"""Daemons that are killed, on a segment that outlives them: the client goes on, and holds what it still copies."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from tests.unit.fake_daemon import Daemon, Memory, content, make_segment, names, until
from tierd.client import Client, Stored
from tierd.clock import monotonic_seconds
from tierd.errors import Gone
from tierd.tiers.host import HostSegment
from tierd.wire.messages import Request

MISS = Stored(0, 0, 1)
Connect = Callable[..., Client]


class Killable:
    """A daemon process on an inherited segment."""

    def __init__(self, path: Path, segment: HostSegment) -> None:
        self.path, self.segment = path, segment
        self.start()

    def start(self) -> None:
        """Start and wait until it listens."""
        fds = (self.segment.directory_fd, self.segment.slots_fd)
        command = [sys.executable, "-m", "tests.unit.fake_daemon", str(self.path), *map(str, fds)]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, pass_fds=fds, cwd=root)
        assert until(self.listens, 30)

    def listens(self) -> bool:
        """Whether somebody accepts."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.path)) == 0

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def killable(tmp_path: Path) -> Iterator[Killable]:
    """A daemon to kill."""
    segment = make_segment(100)
    daemon = Killable(tmp_path / "s", segment)
    yield daemon
    daemon.process.kill()
    daemon.process.wait(10)
    segment.close()


def test_after_a_kill_and_restart_the_blocks_are_hits_again(killable: Killable, connect: Connect) -> None:
    """Calls in between are misses at once; then the client resumes by itself and keeps its mapping."""
    client, hashes, pool = connect(), names(40), content(40)
    assert client.store(hashes, pool, range(40)).stored == 40
    killable.kill()
    started = monotonic_seconds()
    out = np.zeros_like(pool)
    assert client.load(hashes, out, range(40)) == 0
    assert client.store(names(1, 5), pool, [0]) == MISS
    assert monotonic_seconds() - started < 1
    mapping = client.session.segments._mappings[killable.segment.segment_id]
    killable.start()
    assert until(lambda: client.load(hashes, out, range(40)) == 40)
    assert (out == pool).all()
    assert client.session.segments._mappings[killable.segment.segment_id] is mapping
    assert client.statistics["reconnects"] >= 1


def test_the_log_says_once_that_tierd_is_away_and_once_that_it_is_back(
    killable: Killable, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """However many calls there are meanwhile; with the client's name, and what it does."""
    client, hashes, pool = connect(name="engine-7"), names(4), content(4)
    assert client.store(hashes, pool, range(4)).stored == 4
    for _ in range(2):
        killable.kill()
        for _ in range(100):
            client.load(hashes, pool, range(4))
        assert until(lambda: messages(caplog)[-1:] == [AWAY]), caplog.text
        killable.start()
        assert until(lambda: client.load(hashes, pool, range(4)) == 4)
    assert messages(caplog) == [AWAY, "tierd is back on PATH after N s: engine-7 uses it again"] * 2


AWAY = "tierd is away (REASON): engine-7 goes on without it until it is back"


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the client's log has said, without what differs from run to run."""
    said = [record.getMessage() for record in caplog.records if record.name == "tierd.client"]
    return [re.sub(r"\(.*\)", "(REASON)", re.sub(r"on \S+ after \S+ s", "on PATH after N s", one)) for one in said]


def test_an_idle_client_resumes_and_gives_back_what_it_does_not_hold(killable: Killable, connect: Connect) -> None:
    """A lease that was lost with the daemon does not block its slots, though nobody calls the client."""
    client, hashes, pool = connect(), names(10), content(10)
    client.store(hashes, pool, range(10))
    found = client.lookup(hashes)
    holders = killable.segment.directory.holders
    assert (holders != 0).sum() == 10
    killable.kill()
    assert (holders != 0).sum() == 10
    killable.start()
    assert until(lambda: not holders.any())
    assert found.copy_into(content(10, 3), range(10)) == 0  # its lease ended with the connection


def test_an_idle_client_notices_a_loss_after_its_first_look(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """A dying daemon's sockets close one by one: whose channel ends first looks at its connection too early, then again."""
    client, hashes, pool = connect(), names(10), content(10)
    client.store(hashes, pool, range(10))
    (session,) = memory.sessions.values()
    assert until(lambda: session.events)
    (connection,) = daemon.server.connections - {session.events}

    def next_life(request: Request) -> None:
        if request.verb == "events":
            connection.close("the last life's")

    memory.before = next_life
    daemon.call(lambda: session.events.close("the last life's"))
    assert until(lambda: client.session.connects == 2)
    assert client.load(hashes, np.zeros_like(pool), range(10)) == 10


@pytest.mark.parametrize("kind", [1, 2])
def test_a_copy_over_a_restart_keeps_its_slots_until_it_ends(killable: Killable, connect: Connect, kind: int) -> None:
    """Reading or writing, the bits of what is being copied stay; all others go at once."""
    client, pool = connect(), content(10)
    client.store(names(10), pool, range(10))
    holders = killable.segment.directory.holders
    with client.lookup(names(10)) as found:
        copying = client.session.segments.copying(client.session.connection(), found.slots[:4], kind)
        copying.__enter__()
        killable.kill()
        killable.start()
        assert until(lambda: (holders != 0).sum() == 4)
        copying.__exit__(None, None, None)
    assert until(lambda: not holders.any())


def test_a_store_cut_by_a_kill_is_refused_and_the_next_one_works(killable: Killable, connect: Connect) -> None:
    """What was written but not committed is nowhere; nothing stays held."""
    client, pool = connect(), content(60)
    hashes = names(60)
    client.store(hashes[: 10 * 32], pool, range(10))
    killable.process.send_signal(signal.SIGSTOP)
    cut: list[Stored] = []
    thread = Thread(target=lambda: cut.append(client.store(hashes, pool, range(60))))
    thread.start()
    killable.kill()
    thread.join(10)
    assert cut == [Stored(0, 0, 60)]
    killable.start()
    assert until(lambda: client.store(hashes, pool, range(60)) == Stored(50, 10, 0))
    out = np.zeros_like(pool)
    assert client.load(hashes, out, range(60)) == 60 and (out == pool).all()


def test_a_daemon_that_forgot_everything_is_greeted_afresh(tmp_path: Path, connect: Connect) -> None:
    """Another incarnation with other segments: old mappings are dropped, new ones used."""
    client, pool = connect(), content(20)
    out = np.zeros_like(pool)
    for life in range(3):
        memory = Memory([make_segment(50)])
        memory.resume = forget  # type: ignore[method-assign]
        daemon = Daemon(tmp_path / "s", memory)
        assert until(lambda: client.store(names(20, 1), pool, range(20)).stored == 20), life
        assert client.load(names(20, 1), out, range(20)) == 20
        assert (out == pool).all()
        assert set(client.session.segments._mappings) == {memory.segments[0].segment_id}
        daemon.close()


def forget(*_: Any, **__: Any) -> Any:
    """What a daemon without a memory says."""
    raise Gone("no such session")

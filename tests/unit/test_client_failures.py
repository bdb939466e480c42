"""Whatever goes wrong between client and daemon is a miss, soon, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path
from threading import active_count
from threading import enumerate as all_threads
from typing import Any

import numpy as np
import pytest

from tests.unit.fake_daemon import LAYOUT, Daemon, Memory, content, names, until
from tierd.client import Client, Stored
from tierd.clock import monotonic_seconds
from tierd.errors import Invalid
from tierd.wire.messages import Request

MISS = Stored(0, 0, 1)
Connect = Callable[..., Client]


def test_without_a_daemon_every_call_is_a_miss_at_once(connect: Connect) -> None:
    """A hundred calls cost one attempt to connect; nobody waits."""
    client, pool = connect(), content(1)
    started = monotonic_seconds()
    for _ in range(100):
        assert client.load(names(1), pool, [0]) == 0
        assert client.store(names(1), pool, [0]) == MISS
        assert client.prefetch(names(1)) == 0
    assert monotonic_seconds() - started < 1
    assert client.statistics["failures"] == {"closed": 300}
    assert client.statistics["tiers"] == {"miss": 100}


def test_a_client_that_came_first_connects_when_the_daemon_is_there(tmp_path: Path, memory: Memory, connect: Connect) -> None:
    """The order of starting does not matter."""
    client, pool = connect(), content(1)
    assert client.store(names(1), pool, [0]) == MISS
    daemon = Daemon(tmp_path / "s", memory)
    assert until(lambda: client.store(names(1), pool, [0]).stored)
    client.close()
    daemon.close()


def test_a_daemon_that_does_not_answer_costs_one_deadline_and_then_nothing(connect: Connect, tmp_path: Path) -> None:
    """Never a stall: after the first wait the client leaves it alone for a while."""
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "s"))
        mute.listen(8)
        client = connect(deadline_seconds=0.2)
        started = monotonic_seconds()
        for _ in range(50):
            assert client.load(names(1), content(1), [0]) == 0
        assert monotonic_seconds() - started < 2
        assert client.statistics["failures"]["late"] >= 1


def test_one_late_answer_is_no_absence_and_two_in_a_row_are(
    daemon: Daemon, memory: Memory, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """A daemon that stumbles is not reported; one that hangs is, and its return too."""
    client = connect(deadline_seconds=0.2, name="engine-7")
    assert client.store(names(1), content(1), [0]).stored == 1

    def hang(request: Request) -> Any:
        request.deadline_seconds = 20  # this daemon does not keep to the client's deadline
        return asyncio.Event().wait() if request.verb == "lookup" else None

    def late() -> int:
        client.lookup(names(1)).release()
        return int(client.statistics["failures"].get("late", 0))

    memory.before = hang
    assert until(lambda: late() == 1)
    memory.before = None
    assert until(lambda: client.load(names(1), content(1), [0]) == 1)
    memory.before = hang
    assert until(lambda: late() == 2)
    assert not caplog.records
    assert until(lambda: late() == 3)
    memory.before = None
    assert until(lambda: client.load(names(1), content(1), [0]) == 1)
    away, back = [record.getMessage() for record in caplog.records if record.name == "tierd.client"]
    assert re.fullmatch(r"tierd is away \(lookup: the daemon did not answer within \S+ s\): engine-7 goes on .*", away)
    assert back.startswith("tierd is back on ")


def test_a_moment_without_descriptors_does_not_end_the_event_thread(tmp_path: Path, memory: Memory, connect: Connect) -> None:
    """The daemon is away while the engine has no descriptor to spare; later an idle client is found again by itself."""
    daemon = Daemon(tmp_path / "s", memory)
    client = connect()
    assert client.store(names(1), content(1), [0]).stored == 1
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    daemon.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        time.sleep(1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert any(thread.name == "tierd-events" for thread in all_threads())
    daemon = Daemon(tmp_path / "s", memory)
    assert until(lambda: memory.log.count("hello") + memory.log.count("resume") > 1)
    client.close()
    daemon.close()


def test_a_daemon_that_stops_in_a_windowed_load_costs_one_deadline(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """The window that was asked for ahead is waited for once, and not asked for again."""
    client = connect(deadline_seconds=0.5)
    client.store(names(6), content(6), range(6))
    memory.told_max = memory.window = 2
    windows: list[str] = []

    def stop(request: Request) -> Any:
        if request.verb != "load":
            return None
        windows.append(request.verb)
        request.deadline_seconds = 20
        return asyncio.Event().wait() if len(windows) > 1 else None

    memory.before = stop
    started = monotonic_seconds()
    assert client.load(names(6), content(6), range(6)) < 6
    assert monotonic_seconds() - started < 0.8
    assert len(windows) == 2
    assert client.statistics["failures"]["late"] == 1


def test_a_late_lease_is_given_back(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """The reply that nobody waited for carried a lease; it does not leak."""
    client = connect(deadline_seconds=0.2)
    client.store(names(3), content(3), range(3))
    gates: list[asyncio.Event] = []

    def slow(request: Request) -> Any:
        if request.verb not in ("lookup", "store"):
            return None
        request.deadline_seconds = 5  # this daemon does not keep to the client's deadline
        gates.append(asyncio.Event())
        return gates[-1].wait()

    memory.before = slow
    assert client.load(names(3), content(3), range(3)) == 0
    assert until(lambda: client.store(names(3, 1), content(3), range(3)) == Stored(0, 0, 3) and len(gates) > 1)
    memory.before = None
    daemon.call(lambda: [gate.set() for gate in gates])
    assert until(lambda: client.prefetch(names(3)) == 3)
    assert until(lambda: daemon.call(memory.holders) == 0)
    assert daemon.call(lambda: memory.pending) == {}
    assert memory.log.count("release") == 1 and memory.log.count("abort") == 1


def test_what_the_daemon_refuses_is_logged_once_and_a_miss(
    daemon: Daemon, memory: Memory, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """A layout that does not fit, say; the engine goes on."""

    def refuse(request: Request) -> None:
        raise Invalid("wrong layout")

    memory.before = refuse
    client = connect()
    for _ in range(3):
        assert client.load(names(1), content(1), [0]) == 0
    assert client.statistics["failures"]["invalid"] == 1
    assert [record.getMessage() for record in caplog.records if record.name == "tierd.client"] == [
        "tierd lookup failed and counts as a miss: wrong layout"
    ]


@pytest.mark.parametrize(
    ("verb", "reply"),
    [
        ("lookup", {"lease": 1, "blocks": 2, "told": 2, "slots": bytes(4), "tiers": {}}),
        ("lookup", {"lease": 1, "blocks": 9, "told": 0, "slots": b"", "tiers": {}}),
        ("lookup", {"lease": 1, "blocks": 1, "told": 1, "slots": b"\xff\xff\xff\x7f", "tiers": {}}),
        ("lookup", {"lease": "1", "blocks": 1, "told": 0, "slots": b"", "tiers": {}}),
        ("lookup", {}),
        ("store", {"lease": 1, "slots": bytes(8)}),
        ("store", {"lease": 0, "slots": bytes(4)}),
        ("store", {"lease": 1, "slots": b"\xf0\xff\xff\xff"}),
        ("commit", {"committed": -1, "dropped": 0}),
    ],
)
def test_a_daemon_that_talks_nonsense_is_a_miss(
    daemon: Daemon, memory: Memory, connect: Connect, verb: str, reply: dict[str, Any]
) -> None:
    """Counts that do not fit, slots of nowhere, wrong types: no exception, no byte touched."""
    setattr(memory, verb, lambda connection, **_: reply)
    client, pool = connect(), content(1)
    out = pool.copy()
    assert client.store(names(1), pool, [0]).stored == 0 or verb == "lookup"
    assert client.load(names(1), out, [0]) == 0 or verb != "lookup"
    assert (out == pool).all()


def test_a_forked_child_is_refused_and_disturbs_nobody(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """The child's calls raise Invalid, its exit and close touch nothing; the parent goes on."""
    client, pool = connect(), content(5)
    client.store(names(5), pool, range(5))
    found = client.lookup(names(5))
    child = os.fork()
    if child == 0:
        refused = 0
        for call in (
            lambda: client.load(names(5), pool, range(5)),
            lambda: client.store(names(5), pool, range(5)),
            lambda: client.lookup(names(5)),
            lambda: client.prefetch(names(5)),
            lambda: found.copy_into(pool, range(5)),
            lambda: found.release(),
        ):
            try:
                call()
            except Invalid:
                refused += 1
        client.close()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
    out = np.zeros_like(pool)
    assert found.copy_into(out, range(5)) == 5 and (out == pool).all()
    found.release()
    assert memory.log.count("bye") == 0


def test_a_closed_client_misses(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """Close says bye, once, and ends the thread; later calls are misses."""
    client = connect()
    client.store(names(1), content(1), [0])
    client.close()
    client.close()
    assert memory.log.count("bye") == 1
    assert client.load(names(1), content(1), [0]) == 0


def test_nothing_is_left_open_after_many_clients(daemon: Daemon) -> None:
    """Descriptors and threads come back."""

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), active_count()

    gc.collect()
    before = count()
    for _ in range(5):
        with Client(daemon.path, model="model", layout=LAYOUT, copy_threads=2) as client:
            client.store(names(5), content(5), range(5))
    assert until(lambda: count() == before), f"{before} files and threads before, {count()} after"

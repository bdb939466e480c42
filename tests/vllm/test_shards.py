"""Look-ups in the namespaces of several workers, with clients as the connector has them and a small daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.unit.conftest import connect, daemon, memory  # noqa: F401
from tests.unit.fake_daemon import Daemon, Memory, content, names, until
from tierd.client import Client
from tierd.clock import monotonic_seconds
from tierd.wire.messages import Request
from tierd_engine.connectors.vllm.shards import Shards

WORKERS = 4
Connect = Callable[..., Client]


def looked_up(requests: list[Request], request: Request) -> bool:
    """Note it if it is a look-up."""
    if request.verb == "lookup":
        requests.append(request)
    return request.verb == "lookup"


def test_all_workers_are_asked_before_any_answer_is_waited_for(
    daemon: Daemon,  # noqa: F811
    memory: Memory,  # noqa: F811
    connect: Connect,  # noqa: F811
) -> None:
    """One way to the daemon and back, then: it gives no answer here before it has the questions of all."""
    assert connect().store(names(5), content(5), range(5)).stored == 5
    requests: list[Request] = []
    all_asked = asyncio.Event()

    def hold(request: Request) -> Any:
        if not looked_up(requests, request):
            return None
        if len(requests) == WORKERS:
            all_asked.set()
        return all_asked.wait()

    shards = Shards([connect() for _ in range(WORKERS)])
    memory.before = hold
    found = shards.lookup(names(9))
    assert (found.blocks, found.told, len(requests)) == (5, 5, WORKERS)
    assert [client.statistics["failures"] for client in shards.clients] == [{}] * WORKERS
    found.release()
    assert until(lambda: daemon.call(memory.holders) == 0)


def test_a_part_that_one_worker_lacks_ends_the_prefix_and_no_lease_stays(
    daemon: Daemon,  # noqa: F811
    memory: Memory,  # noqa: F811
    connect: Connect,  # noqa: F811
) -> None:
    """The others lease more than can be used, and give all of it back."""
    assert connect().store(names(5), content(5), range(5)).stored == 5
    requests: list[Request] = []

    def shorten(request: Request) -> None:
        if looked_up(requests, request) and len(requests) == 2:
            request["hashes"] = names(3)

    shards = Shards([connect() for _ in range(WORKERS)])
    memory.before = shorten
    found = shards.lookup(names(5))
    assert [part.blocks for part in found.parts] == [5, 3, 5, 5]
    assert found.blocks == 3
    found.release()
    assert until(lambda: daemon.call(memory.holders) == 0)


def test_a_daemon_that_hangs_costs_one_deadline_however_many_workers(
    daemon: Daemon,  # noqa: F811
    memory: Memory,  # noqa: F811
    connect: Connect,  # noqa: F811
) -> None:
    """The scheduler, whom everybody waits for, waits for all of them at the same time."""
    seconds = 1.0
    shards = Shards([connect(deadline_seconds=seconds) for _ in range(WORKERS)])
    shards.lookup(names(1)).release()
    requests: list[Request] = []

    def hang(request: Request) -> Any:
        request.deadline_seconds = 20  # this daemon does not keep to the client's deadline
        return asyncio.Event().wait() if looked_up(requests, request) else None

    memory.before = hang
    began = monotonic_seconds()
    assert shards.lookup(names(1)).blocks == 0
    assert monotonic_seconds() - began < 2 * seconds
    assert len(requests) == WORKERS
    assert [client.statistics["failures"] for client in shards.clients] == [{"late": 1}] * WORKERS

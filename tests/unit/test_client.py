"""The client against the real server with a small daemon behind it: blocks go in and out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest

from tests.unit.fake_daemon import BYTES, Daemon, Memory, content, make_segment, names, until
from tierd.block import ROOT
from tierd.client import Client, Stored
from tierd.client.client import default_socket
from tierd.errors import Busy, Gone, Invalid
from tierd.layout import Layout
from tierd.wire.messages import Request

MISS = Stored(0, 0, 1)
Connect = Callable[..., Client]


def test_what_was_stored_is_loaded_byte_for_byte(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """Over two segments and several batches, to other pages, by another client; nothing stays held."""
    pool, hashes = content(150), names(150)
    pages = np.random.default_rng(1).permutation(150)
    with connect() as writer:
        assert writer.store(hashes, pool, pages) == Stored(150, 0, 0)
        assert writer.store(hashes, pool, pages) == Stored(0, 150, 0)
    with connect() as reader:
        out = np.zeros_like(pool)
        assert reader.load(hashes + names(3, seed=9), out, [*range(150), 0, 0, 0]) == 150
        assert (out == pool[pages]).all()
        statistics = reader.statistics
    assert statistics["blocks_loaded"] == 150 and statistics["bytes_loaded"] == 150 * BYTES
    assert statistics["tiers"] == {"cpu": 150, "nvme": 0, "miss": 3} and statistics["failures"] == {}
    assert daemon.call(memory.holders) == 0


def test_several_clients_ask_before_any_answer_is_waited_for(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """A daemon that answers nobody before it has the questions of all does not stop who asks by `lookup_nowait`."""
    hashes, everybody = names(5), 4
    assert connect().store(hashes, content(5), range(5)).stored == 5
    asked: list[Request] = []
    all_asked = asyncio.Event()

    def hold(request: Request) -> Any:
        if request.verb != "lookup":
            return None
        asked.append(request)
        if len(asked) == everybody:
            all_asked.set()
        return all_asked.wait()

    memory.before = hold
    clients = [connect() for _ in range(everybody)]
    found = [under_way.wait() for under_way in [client.lookup_nowait(hashes) for client in clients]]
    assert [one.blocks for one in found] == [5] * everybody
    assert [client.statistics["failures"] for client in clients] == [{}] * everybody
    for one in found:
        one.release()
    assert until(lambda: daemon.call(memory.holders) == 0)


def test_a_gap_ends_the_prefix(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """Blocks behind a missing one are no hit."""
    hashes, pool = names(10), content(10)
    client = connect()
    assert client.store(hashes, pool, range(10)).stored == 10
    daemon.call(lambda: memory.where.pop(hashes[4 * 32 : 5 * 32]))
    assert client.load(hashes, content(10, 5), range(10)) == 4
    assert client.statistics["tiers"] == {"cpu": 4, "nvme": 0, "miss": 6}


def test_a_chain_goes_on_behind_its_parent(daemon: Daemon, connect: Connect) -> None:
    """Storing and loading in the middle of a chain; an unknown parent is refused, not an error."""
    hashes, pool, client = names(80), content(80), connect()
    assert client.store(hashes[: 32 * 32], pool, range(32)).stored == 32
    assert client.store(hashes[32 * 32 :], pool, range(32, 80), parent=hashes[31 * 32 : 32 * 32]).stored == 48
    out = np.zeros_like(pool)
    assert client.load(hashes, out, range(80)) == 80
    assert (out == pool).all()
    assert client.store(names(1, 5), pool, [0], parent=names(1, 6)) == Stored(0, 0, 1, parent_unknown=True)
    assert client.statistics["failures"] == {"gone": 1}
    assert client.store(names(80, 7), pool, range(80), parent=names(1, 6)) == Stored(0, 0, 80, parent_unknown=True)
    assert client.store(names(80, 8), pool, range(80)).stored == 80, "what was asked for in vain holds no slots"


def test_no_room_stores_the_head_and_refuses_the_rest(daemon: Daemon, connect: Connect) -> None:
    """Counts add up, and the head can be loaded."""
    hashes, pool, client = names(300), content(300), connect()
    assert client.store(hashes, pool, range(300)) == Stored(200, 0, 100)
    out = np.zeros_like(pool)
    assert client.load(hashes, out, range(300)) == 200
    assert (out[:200] == pool[:200]).all()
    assert client.store(hashes, pool, range(300)) == Stored(0, 200, 100)


def test_what_comes_in_windows_is_loaded_whole(tmp_path: Path, connect: Connect) -> None:
    """Told blocks first, then windows, each asked for while the last is copied and given back when it is."""
    memory = Memory([make_segment(100)], told_max=10, window=7)
    daemon = Daemon(tmp_path / "s", memory)
    hashes, pool, client = names(60), content(60), connect()
    assert client.store(hashes, pool, range(60)).stored == 60
    out = np.zeros_like(pool)
    assert client.load(hashes, out, range(60)) == 60
    assert (out == pool).all()
    assert client.statistics["tiers"] == {"cpu": 10, "nvme": 50, "miss": 0}
    client.close()
    assert memory.log.count("load") == 8 and memory.log.count("release") == 10
    assert daemon.call(memory.holders) == 0
    daemon.close()


@pytest.mark.parametrize("error", [Busy("later"), Gone("lost")])
def test_a_window_that_is_refused_ends_the_load(tmp_path: Path, connect: Connect, error: Exception) -> None:
    """What came before it counts. Busy is asked again once, without what we held."""
    memory = Memory([make_segment(100)], told_max=10, window=10)
    daemon = Daemon(tmp_path / "s", memory)
    hashes, pool, client = names(60), content(60), connect()
    assert client.store(hashes, pool, range(60)).stored == 60

    def refuse(request: Request) -> None:
        if request.verb == "load" and request["first"] == 30:
            raise error

    memory.before = refuse
    out = np.zeros_like(pool)
    assert client.load(hashes, out, range(60)) == 30
    assert (out[:30] == pool[:30]).all()
    client.close()
    assert memory.log.count("load") == (4 if isinstance(error, Busy) else 3)
    assert daemon.call(memory.holders) == 0
    daemon.close()


def test_a_lookup_can_be_copied_in_parts_and_by_layers(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """The lease lasts until release; ranges beyond it are misuse."""
    hashes, pool, client = names(20), content(20), connect()
    client.store(hashes, pool, range(20))
    with client.lookup(hashes + names(5, 3)) as found:
        assert (found.blocks, found.told, len(found.slots)) == (20, 20, 20) and found
        assert sum(found.tiers.values()) == 25
        out = np.zeros_like(pool)
        assert found.copy_into(out, range(5), first=10, count=5) == 5
        assert found.copy_into(out, range(10, 20)) == 10
        assert (out[:5] == pool[10:15]).all() and (out[10:] == pool[:10]).all()
        assert daemon.call(memory.holders) == 20
        for first, count in ((18, 3), (-1, 2), (0, 21), (21, None)):
            with pytest.raises(Invalid, match="found were 20"):
                found.copy_into(out, range(20), first, count)
    assert not found and found.copy_into(out, []) == 0
    client.close()
    assert daemon.call(memory.holders) == 0


def test_empty_calls_ask_nobody(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """No hashes, no request."""
    client = connect()
    empty = np.zeros((0, BYTES), np.uint8)
    assert client.load(b"", empty, []) == 0
    assert client.store(b"", empty, []) == Stored()
    assert client.prefetch(b"") == 0 and not client.lookup(b"")
    assert memory.log == []


def test_prefetch_says_how_many_blocks_are_or_will_be_there(daemon: Daemon, connect: Connect) -> None:
    """And stats need no lease."""
    client = connect()
    client.store(names(5), content(5), range(5))
    assert client.prefetch(names(9)) == 5


def test_misuse_raises_and_asks_nobody(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """The only exceptions that reach an engine, and before anything was sent."""
    client, pool = connect(), content(4)
    wrong: list[tuple[Any, ...]] = [
        (names(1)[:-1], pool, [0]),
        (bytearray(names(1)), pool, [0]),
        (names(2), pool, [0]),
        (names(1), pool, [4]),
        (names(1), pool[:, 1:], [0]),
        (names(1), pool, [0], b"short"),
    ]
    for arguments in wrong:
        for method in (client.load, client.store):
            with pytest.raises(Invalid):
                method(*arguments)
    for turn in ((names(1)[:-1], "stop"), (names(1), "bored"), (names(1), "stop", "x" * 129)):
        with pytest.raises(Invalid):
            client.ended(*turn)
    for options in ({"deadline_seconds": 0}, {"copy_threads": 0}, {"copy_threads": 65}):
        with pytest.raises(Invalid):
            connect(**options)
    assert memory.log == []


def test_many_threads_share_a_client(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """Eight threads, each with chains of its own and one that all share; every byte right, nothing held at the end."""
    client = connect(copy_threads=2)
    wrong: list[str] = []
    barrier = Barrier(8)

    def work(number: int) -> None:
        hashes, pool = names(16, number), content(16, number)
        barrier.wait(10)
        for turn in range(20):
            counts = client.store(hashes, pool, range(16))
            if counts.stored + counts.present != 16:
                wrong.append(f"thread {number} turn {turn}: {counts}")
            out = np.zeros_like(pool)
            if client.load(hashes, out, range(16)) != 16 or not (out == pool).all():
                wrong.append(f"thread {number} turn {turn}: bytes")
            client.store(names(8, 99), content(8, 99), range(8))
            shared = np.zeros((8, BYTES), np.uint8)
            count = client.load(names(8, 99), shared, range(8))
            if not (shared[:count] == content(8, 99)[:count]).all():
                wrong.append(f"thread {number} turn {turn}: shared bytes")

    threads = [Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert client.statistics["failures"] == {}
    client.close()
    assert daemon.call(memory.holders) == 0


def test_a_detached_segment_is_given_back_after_the_last_copy(daemon: Daemon, memory: Memory, connect: Connect) -> None:
    """The answer comes when nothing uses it, and the mapping is gone then; other segments go on."""
    hashes, pool, client = names(150), content(150), connect()
    assert client.store(hashes, pool, range(150)).stored == 150
    assert until(lambda: daemon.call(lambda: memory.sessions[1].events is not None))
    segment = memory.segments[1].segment_id.hex()
    with client.lookup(hashes) as found:
        copying = client.session.segments.copying(client.session.connection(), found.slots, 1)
        parts = copying.__enter__()
        daemon.call(lambda: memory.detach(1))
        assert client.prefetch(hashes) == 150
        assert f"detached {segment}" not in memory.log
        assert parts[1].mapping.state[0] != 0  # still mapped
        copying.__exit__(None, None, None)
    assert until(lambda: f"detached {segment}" in memory.log)
    assert client.load(hashes[: 100 * 32], pool.copy(), range(100)) == 100


def test_the_default_socket_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """$TIERD_SOCKET first; root has the system's."""
    monkeypatch.setenv("TIERD_SOCKET", "/x/y.sock")
    assert default_socket() == Path("/x/y.sock")
    monkeypatch.delenv("TIERD_SOCKET")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_socket() == Path("/run/tierd/tierd.sock" if os.getuid() == 0 else "/run/user/7/tierd/tierd.sock")


def test_another_layout_is_another_world(daemon: Daemon, connect: Connect) -> None:
    """A client whose blocks have another size refuses the daemon's welcome and misses."""
    other = Layout(4, 2, 16, "float32")
    client = connect(layout=other)
    assert client.load(names(1), np.zeros((1, other.block_bytes), np.uint8), [0], ROOT) == 0
    assert client.statistics["failures"] == {"invalid": 1}

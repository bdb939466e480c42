"""The real server on a real socket: requests, replies, limits, and peers that are wrong, slow and hostile."""

from __future__ import annotations

import asyncio
import os
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.unit.fake_daemon import LIMITS, Daemon
from tests.unit.peer import BYE, HELLO, STATS, Peer, Scripted, wait_until
from tierd.errors import Busy, Gone, Invalid
from tierd.server import FRAMES_PER_TURN, REQUESTS_WAITING_MAX
from tierd.wire.framing import LENGTH, encode
from tierd.wire.messages import Answering


def test_a_reply_carries_the_requests_id_and_the_handlers_fields(server: Daemon, handler: Scripted) -> None:
    """A dictionary is a reply, None one without fields; no id, no reply."""
    handler.answers["stats"] = {"blocks": 3}
    with Peer(server.path) as peer:
        assert peer.ask({**STATS, "id": 77}) == {"id": 77, "ok": True, "blocks": 3}
        peer.socket.sendall(encode({"verb": "stats"}))
        assert peer.ask({**BYE, "id": 78}) == {"id": 78, "ok": True}


def test_each_error_is_replied_by_name_and_the_connection_goes_on(server: Daemon, handler: Scripted) -> None:
    """What the handler raises on purpose is an answer like others."""
    with Peer(server.path) as peer:
        for error in (Invalid("a"), Busy("b"), Gone("c")):
            handler.answers["stats"] = error
            assert peer.ask(STATS) == {"id": 1, "ok": False, "error": error.code, "message": str(error)}
        assert peer.ask({"verb": "nonsense"})["error"] == "invalid"
        assert peer.ask({"verb": "lookup", "hashes": bytes(33)})["error"] == "invalid"
        assert peer.ask({**BYE, "id": "x"}) == {
            "id": 0,
            "ok": False,
            "error": "invalid",
            "message": "request: 'id' must be int, not str",
        }
        assert peer.ask(BYE)["ok"]


def test_a_bug_ends_one_connection_and_not_the_daemon(server: Daemon, handler: Scripted) -> None:
    """The peer is told that, not what; others go on."""
    handler.answers["stats"] = ZeroDivisionError("secret")
    with Peer(server.path) as other, Peer(server.path) as peer:
        reply = peer.ask(STATS)
        assert reply["error"] == "closed" and "secret" not in reply["message"]
        assert peer.next() == {}
        assert other.ask(BYE)["ok"]


def test_what_waits_answers_when_it_can_and_others_meanwhile(server: Daemon, handler: Scripted) -> None:
    """Replies may come in another order than requests."""
    done: list[asyncio.Event] = []

    async def wait(event: asyncio.Event) -> dict[str, Any]:
        await event.wait()
        return {"late": True}

    def answer(*_: object) -> Answering:
        done.append(asyncio.Event())
        return partial(wait, done[-1])

    handler.answers["stats"] = answer
    with Peer(server.path) as peer:
        peer.socket.sendall(encode({**STATS, "id": 5}))
        assert peer.ask({**BYE, "id": 6})["id"] == 6
        server.call(done[0].set)
        assert peer.next() == {"id": 5, "ok": True, "late": True}


def test_a_wait_ends_busy_at_the_requests_deadline(server: Daemon, handler: Scripted) -> None:
    """`deadline_ms` bounds the wait; what the handler began is cancelled."""
    handler.answers["stats"] = lambda *_: asyncio.Event().wait
    with Peer(server.path) as peer:
        reply = peer.ask({**STATS, "deadline_ms": 20})
        assert reply["error"] == "busy" and "0.02 s" in reply["message"]
        wait_until(server, lambda: not handler.open[0].tasks)


def test_only_so_many_requests_of_a_connection_wait(server: Daemon, handler: Scripted) -> None:
    """One more is busy at once, and nothing of it was begun; closing cancels those that wait."""
    begun: list[asyncio.Event] = []

    async def wait() -> None:
        begun.append(asyncio.Event())
        await begun[-1].wait()

    handler.answers["stats"] = lambda *_: wait
    with Peer(server.path) as peer:
        peer.socket.sendall(b"".join(encode({**STATS, "id": n}) for n in range(1, REQUESTS_WAITING_MAX + 2)))
        reply = peer.next()
        assert reply["id"] == REQUESTS_WAITING_MAX + 1 and reply["error"] == "busy"
    wait_until(server, lambda: handler.ended)
    wait_until(server, lambda: not handler.ended[0].tasks)
    assert len(begun) <= REQUESTS_WAITING_MAX
    assert handler.refusals == [("stats", "busy")]


def test_many_requests_in_one_write_are_all_answered_in_order(server: Daemon) -> None:
    """More frames than one turn takes are not forgotten when nothing more arrives."""
    with Peer(server.path) as peer:
        count = 5 * FRAMES_PER_TURN + 1
        peer.socket.sendall(b"".join(encode({**BYE, "id": n}) for n in range(1, count + 1)))
        assert [peer.next()["id"] for _ in range(count)] == list(range(1, count + 1))


def test_nothing_is_answered_before_hello(server: Daemon) -> None:
    """Another verb first is invalid, and so is a second hello; a failed hello may be repeated."""
    with Peer(server.path, hello=False) as peer:
        assert "first request" in peer.ask(BYE)["message"]
        server.handler.answers["hello"] = Busy("full")
        assert peer.ask(HELLO)["error"] == "busy"
        assert "first request" in peer.ask(BYE)["message"]
        del server.handler.answers["hello"]
        assert peer.ask(HELLO)["ok"]
        assert "opened by 'hello'" in peer.ask(HELLO)["message"]
        assert peer.ask(BYE)["ok"]


def test_large_frames_are_welcome_only_after_hello(server: Daemon) -> None:
    """64 KiB before, 4 MiB after; the refusal comes before the bytes."""
    with Peer(server.path, hello=False) as peer:
        peer.socket.sendall(LENGTH.pack(LIMITS.hello_frame_bytes_max + 1))
        reply = peer.next()
        assert (reply["id"], reply["error"]) == (0, "invalid") and "65537 bytes is over" in reply["message"]
        assert peer.next() == {}
    server.handler.answers["lookup"] = lambda _, request: {"bytes": len(request["hashes"])}
    with Peer(server.path) as peer:
        assert peer.ask({"verb": "lookup", "hashes": bytes(3 << 20)})["bytes"] == 3 << 20
        peer.socket.sendall(LENGTH.pack(LIMITS.frame_bytes_max + 1))
        assert peer.next()["error"] == "invalid" and peer.next() == {}


def test_garbage_is_refused_and_ends_the_connection(server: Daemon) -> None:
    """An error with id 0, then the end; the server goes on. Sampled with a fixed seed."""
    chooser = random.Random(5)
    for length in (1, 2, 17, 300):
        payload = b"\xc1" + chooser.randbytes(length)
        with Peer(server.path) as peer:
            peer.socket.sendall(LENGTH.pack(len(payload)) + payload)
            reply = peer.next()
            assert (reply["id"], reply["ok"], reply["error"]) == (0, False, "invalid")
            assert peer.next() == {}
    with Peer(server.path) as peer:
        assert peer.ask(BYE)["ok"]


def test_a_truncated_frame_and_an_early_end_leave_nothing(server: Daemon, handler: Scripted) -> None:
    """A peer may vanish anywhere in a frame."""
    frame = encode(HELLO)
    for cut in (0, 1, 3, 4, 5, len(frame) - 1):
        with Peer(server.path, hello=False) as peer:
            peer.socket.sendall(frame[:cut])
    wait_until(server, lambda: len(handler.ended) == 6)
    assert server.call(lambda: len(server.server.connections)) == 0


def test_a_frame_sent_byte_by_byte_is_read(server: Daemon) -> None:
    """The stream has no record boundaries."""
    with Peer(server.path, hello=False) as peer:
        for byte in encode({"id": 9, **HELLO}):
            peer.socket.sendall(bytes([byte]))
        assert peer.next()["id"] == 9


def test_a_silent_peer_is_sent_away(tmp_path: Path) -> None:
    """Who says no hello within the wait limit is told why and disconnected."""
    limits = SimpleNamespace(**{**vars(LIMITS), "wait_seconds_max": 0.05})
    server = Daemon(tmp_path / "s", Scripted(), limits)
    with Peer(server.path) as greeted, Peer(server.path, hello=False) as silent:
        assert "no hello within 0.05 s" in silent.next()["message"]
        assert silent.next() == {}
        assert greeted.ask(BYE)["ok"]
    server.close()


def test_one_connection_too_many_is_busy(tmp_path: Path) -> None:
    """The limit is two a session; room comes back when one ends."""
    handler = Scripted()
    server = Daemon(tmp_path / "s", handler, SimpleNamespace(**{**vars(LIMITS), "sessions_max": 1}))
    with Peer(server.path), Peer(server.path) as second, Peer(server.path, hello=False) as third:
        assert third.next()["error"] == "busy" and third.next() == {}
        second.socket.close()
        wait_until(server, lambda: handler.ended)
        with Peer(server.path) as fourth:
            assert fourth.ask(BYE)["ok"]
    server.close()


def test_a_peer_that_does_not_read_is_disconnected(server: Daemon, handler: Scripted) -> None:
    """What is kept for it is bounded; nobody else waits."""
    handler.answers["stats"] = {"data": bytes(1 << 20)}
    with Peer(server.path) as deaf, Peer(server.path) as other:
        for number in range(1, 30):
            try:
                deaf.socket.sendall(encode({**STATS, "id": number}))
            except OSError:
                break
        wait_until(server, lambda: handler.ended)
        assert handler.ended[0] is handler.open[0]
        assert other.ask(BYE)["ok"]


def test_what_a_slow_peer_had_no_room_for_arrives_later_in_order(server: Daemon, handler: Scripted) -> None:
    """Kept frames and their descriptors come complete and in order."""
    handler.answers["stats"] = lambda connection, request: {"data": bytes(1 << 20)}
    read_end, write_end = os.pipe()
    with Peer(server.path) as slow:
        slow.socket.sendall(b"".join(encode({**STATS, "id": number}) for number in range(1, 6)))
        wait_until(server, lambda: "bytes unsent" in repr(handler.open[0]) and " 0 bytes" not in repr(handler.open[0]))
        server.call(lambda: handler.open[0].send({"id": 0, "push": "attach"}, [write_end]))
        os.close(write_end)
        assert [slow.next()["id"] for _ in range(5)] == [1, 2, 3, 4, 5]
        assert slow.next() == {"id": 0, "push": "attach"} and len(slow.fds) == 1
        os.write(slow.fds[0], b"here")
        assert os.read(read_end, 4) == b"here"
        assert slow.ask({**BYE})["ok"]
    os.close(read_end)


def test_closing_ends_connections_and_waits_for_their_requests(tmp_path: Path) -> None:
    """After close nothing of the server runs any more."""
    handler = Scripted()
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("request")

    handler.answers["stats"] = lambda *_: wait
    server = Daemon(tmp_path / "s", handler)
    with Peer(server.path) as peer:
        peer.socket.sendall(encode({**STATS, "id": 1}))
        assert peer.ask({**BYE, "id": 2})["ok"]
        server.close()
        assert peer.next() == {}
    assert ended == ["request"] and len(handler.ended) == 1

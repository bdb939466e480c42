"""A daemon small enough to read: the real server and real memory segments around a dictionary. Nothing is ever evicted.

    python -m tests.unit.fake_daemon SOCKET DIRECTORY_FD SLOTS_FD

runs one in a process of its own on an inherited segment, to be killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvloop

from tierd.block import HASH_BYTES, ROOT, split
from tierd.clock import monotonic_seconds
from tierd.errors import Gone, TierdError
from tierd.layout import Layout, Namespace
from tierd.server import Connection, Server
from tierd.tiers.host import HostSegment
from tierd.wire.messages import NO_ROOM, PENDING, STORED, Request, pack_slots, unpack_held

LAYOUT = Layout(2, 2, 16, "float32")
NAMESPACE = Namespace("test", "model", LAYOUT)
BYTES = LAYOUT.block_bytes
LIMITS = SimpleNamespace(frame_bytes_max=4 << 20, hello_frame_bytes_max=64 << 10, sessions_max=16, wait_seconds_max=5.0)


class Session:
    """What one client holds. `bit` is its holder bit; `known` are the ordinals it was attached to."""

    def __init__(self, bit: int) -> None:
        self.id = bit + 1
        self.bit = np.uint64(1 << bit)
        self.leases: dict[int, tuple[str, bytes, list[int]]] = {}
        self.known: set[int] = set()
        self.events: Connection | None = None

    @property
    def token(self) -> bytes:
        """The same after a restart, so that a resume is known."""
        return hashlib.sha256(b"token %d" % self.id).digest()[:16]


class Memory:
    """Handles requests. `told_max` blocks of a lookup are told, the rest comes in windows of `window` blocks."""

    def __init__(self, segments: list[HostSegment], told_max: int = 1 << 30, window: int = 1 << 30) -> None:
        self.segments = segments
        self.per_segment = segments[0].header.geometry.slot_count
        self.told_max, self.window = told_max, window
        self.incarnation = os.urandom(16)
        self.sessions: dict[int, Session] = {}
        self.where: dict[bytes, int] = {}
        self.pending: dict[bytes, int] = {}
        self.leases = 0
        self.log: list[str] = []
        self.before: Callable[[Request], Awaitable[None] | None] | None = None
        """Called before each request; an awaitable delays it."""
        self.free: list[int] = []
        for ordinal, segment in enumerate(segments):
            scan = segment.directory.scan()
            segment.directory.reset(scan.spare)
            first = ordinal * self.per_segment
            self.where.update(zip(split(scan.hashes), (first + scan.slots).tolist(), strict=True))
            held = set(scan.held.tolist())
            self.free += [first + slot for slot in scan.spare.tolist() if slot not in held]

    def connected(self, connection: Connection) -> None:
        """Everybody is welcome."""

    def refused(self, connection: Connection, request: Request, error: TierdError) -> None:
        """The peer is told; nobody counts."""

    def disconnected(self, connection: Connection) -> None:
        """Nothing is freed: what was told is held by the bits."""

    def request(self, connection: Connection, request: Request) -> Any:
        """Answer by the method of the verb's name."""
        self.log.append(request.verb)
        answer = getattr(self, request.verb)
        delay = self.before(request) if self.before else None
        if delay is None:
            return answer(connection, **request)

        async def late() -> Any:
            await delay
            return answer(connection, **request)

        return late

    def hello(self, connection: Connection, **_: Any) -> dict[str, Any]:
        """Open a session."""
        return self.welcome(connection, Session(len(self.sessions)))

    def resume(self, connection: Connection, session: int, token: bytes, held: bytes, **_: Any) -> dict[str, Any]:
        """Forget what the session held, but for what it says it still copies."""
        resumed = Session(session - 1)
        if token != resumed.token:
            raise Gone("no such session")
        slots = []
        for segment_id, index, _kind in unpack_held(held):
            ordinal = next(i for i, segment in enumerate(self.segments) if segment.segment_id == segment_id)
            slots.append(ordinal * self.per_segment + index)
        for at in set(range(len(self.segments) * self.per_segment)) - set(slots):
            segment, index = self.place(at)
            if segment.directory.holders[index] & resumed.bit:
                self.unhold(resumed, [at])
        lease = self.lease(resumed, "held", b"", slots) if slots else 0
        welcome = self.welcome(connection, resumed)
        for ordinal in range(len(self.segments)):
            self.attach(connection, ordinal)
        return {**welcome, "lease": lease}

    def welcome(self, connection: Connection, session: Session) -> dict[str, Any]:
        """The reply to hello and resume."""
        self.sessions[session.id] = connection.state = session
        limits = {"frame_bytes_max": LIMITS.frame_bytes_max, "blocks_per_request_max": 32768}
        return {
            "version": 1,
            "session": session.id,
            "token": session.token,
            "incarnation": self.incarnation,
            "namespace": NAMESPACE.id,
            "block_bytes": LAYOUT.block_bytes,
            "slot_bytes": LAYOUT.slot_bytes,
            "slots_per_segment": self.per_segment,
            "limits": limits,
        }

    def events(self, connection: Connection, session: int, token: bytes) -> None:
        """Remember the channel."""
        if session not in self.sessions or token != self.sessions[session].token:
            raise Gone("no such session")
        self.sessions[session].events = connection

    def detach(self, ordinal: int) -> None:
        """Ask everybody for a segment."""
        names = {"tier": "cpu", "ordinal": ordinal, "segment": self.segments[ordinal].segment_id}
        for session in self.sessions.values():
            if session.events:
                session.events.send({"id": 0, "push": "detach", "segments": [names]})

    def detached(self, connection: Connection, segments: list[bytes]) -> None:
        """Remember the answer."""
        self.log[-1] = f"detached {segments[0].hex()}"

    def lookup(self, connection: Connection, hashes: bytes, parent: bytes) -> dict[str, Any]:
        """Lease what is there, and tell the first of it."""
        session, slots = connection.state, []
        for name in split(hashes):
            if name not in self.where:
                break
            slots.append(self.where[name])
        asked = len(hashes) // HASH_BYTES
        told = slots[: self.told_max]
        tiers = {"cpu": len(told), "nvme": len(slots) - len(told), "miss": asked - len(slots)}
        self.name(connection, told)
        lease = self.lease(session, "read", hashes, slots) if slots else 0
        return {"lease": lease, "blocks": len(slots), "told": len(told), "slots": pack_slots(told), "tiers": tiers}

    def load(self, connection: Connection, lease: int, first: int, count: int) -> dict[str, Any]:
        """Tell the next window."""
        slots = connection.state.leases[lease][2][first : first + min(count, self.window)]
        if not slots:
            raise Gone(f"block {first} of lease {lease} is lost")
        self.name(connection, slots)
        return {"first": first, "count": len(slots), "slots": pack_slots(slots)}

    def release(self, connection: Connection, lease: int, first: int | None, count: int | None) -> None:
        """End a lease or a part of it."""
        if lease not in connection.state.leases:
            raise Gone(f"no lease {lease}")
        if count is None:
            self.unhold(connection.state, connection.state.leases.pop(lease)[2])

    def store(self, connection: Connection, hashes: bytes, parent: bytes) -> dict[str, Any]:
        """Hand out free slots, as the real core does: a parent must be there, or being written."""
        if parent != ROOT and parent not in self.where and parent not in self.pending:
            raise Gone("the parent is not known")
        codes, names, slots = [], [], []
        for name in split(hashes):
            if name in self.where:
                codes.append(STORED)
            elif name in self.pending:
                codes.append(PENDING)
            elif self.free:
                codes.append(self.free.pop(0))
                names.append(name)
                slots.append(codes[-1])
            else:
                codes.append(NO_ROOM)
        for name, slot in zip(names, slots, strict=True):
            segment, index = self.place(slot)
            segment.directory.begin([index], name, parent)
            self.pending[name] = slot
        self.name(connection, slots)
        lease = self.lease(connection.state, "write", b"".join(names), slots) if slots else 0
        return {"lease": lease, "slots": pack_slots(codes)}

    def commit(self, connection: Connection, lease: int, count: int | None, pin: bool) -> dict[str, Any]:
        """Publish; nothing is evicted here, so there is nothing to pin."""
        _, hashes, slots = connection.state.leases.pop(lease)
        for name, slot in zip(split(hashes), slots, strict=True):
            segment, index = self.place(slot)
            segment.directory.ready([index])
            self.where[name] = self.pending.pop(name)
        self.unhold(connection.state, slots)
        return {"committed": len(slots), "dropped": 0}

    def abort(self, connection: Connection, lease: int) -> None:
        """Take the slots back."""
        _, hashes, slots = connection.state.leases.pop(lease)
        for name in split(hashes):
            del self.pending[name]
        self.unhold(connection.state, slots)
        for slot in slots:
            segment, index = self.place(slot)
            segment.directory.free([index])
        self.free += slots

    def prefetch(self, connection: Connection, hashes: bytes, parent: bytes) -> dict[str, Any]:
        """Everything is in memory."""
        return {"blocks": sum(name in self.where for name in split(hashes))}

    def bye(self, connection: Connection) -> None:
        """Free what the session held."""
        session = connection.state
        for kind, hashes, slots in session.leases.values():
            self.unhold(session, slots)
            if kind == "write":
                for name in split(hashes):
                    self.free.append(self.pending.pop(name))
        session.leases.clear()

    def holders(self) -> int:
        """How many slots carry a holder bit."""
        return sum(int((segment.directory.holders != 0).sum()) for segment in self.segments)

    def lease(self, session: Session, kind: str, hashes: bytes, slots: list[int]) -> int:
        """A new lease on slots."""
        self.leases += 1
        session.leases[self.leases] = (kind, hashes, slots)
        return self.leases

    def name(self, connection: Connection, slots: list[int]) -> None:
        """Set the session's bits, and attach what it does not know, before slots are named to it."""
        session = connection.state
        for slot in slots:
            segment, index = self.place(slot)
            segment.directory.holders[index] |= session.bit
        for ordinal in sorted({slot // self.per_segment for slot in slots} - session.known):
            self.attach(connection, ordinal)

    def attach(self, connection: Connection, ordinal: int) -> None:
        """Push a segment with its descriptors."""
        connection.state.known.add(ordinal)
        segment = self.segments[ordinal]
        shape = segment.header.geometry
        names = {"tier": "cpu", "ordinal": ordinal, "segment": segment.segment_id, "slots": shape.slot_count}
        sizes = {name: getattr(shape, name) for name in ("slot_bytes", "directory_bytes", "slots_bytes")}
        directory = segment.readonly_directory_fd()
        push = {"id": 0, "push": "attach", "segments": [{**names, **sizes}]}
        connection.send(push, [directory, segment.slots_fd])
        os.close(directory)

    def unhold(self, session: Session, slots: list[int]) -> None:
        """Clear the session's bits, but for what another lease of it still names."""
        held = {slot for _, _, others in session.leases.values() for slot in others}
        for slot in set(slots) - held:
            segment, index = self.place(slot)
            segment.directory.holders[index] &= ~session.bit

    def place(self, slot: int) -> tuple[HostSegment, int]:
        """A slot number's segment and index."""
        return self.segments[slot // self.per_segment], slot % self.per_segment


class Daemon:
    """A server on a loop in a thread of its own; `call` runs a function there."""

    def __init__(self, path: Path, handler: Any, limits: Any = LIMITS, admin: bool = False) -> None:
        self.path, self.handler = path, handler
        self.loop = uvloop.new_event_loop()
        self._started, self._stop = Event(), asyncio.Event()
        self._thread = Thread(target=self.loop.run_until_complete, args=(self._serve(limits, admin),), daemon=True)
        self._thread.start()
        assert self._started.wait(10), "the server did not start"

    async def _serve(self, limits: Any, admin: bool) -> None:
        self.server = Server(self.path, 0o600, self.handler, limits, admin)
        await self.server.start()
        self._started.set()
        await self._stop.wait()
        await self.server.close()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run on the loop; returns what it returns."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def close(self) -> None:
        """Stop and wait."""
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the server did not stop"
        self.loop.close()


def make_segment(blocks: int) -> HostSegment:
    """A segment with room for about that many blocks."""
    return HostSegment.create(NAMESPACE, 4096 * 5 + blocks * (LAYOUT.slot_bytes + 160), 0, huge_pages="off")


def names(count: int, seed: int = 0) -> bytes:
    """Packed hashes."""
    return b"".join(hashlib.sha256(b"%d %d" % (seed, at)).digest() for at in range(count))


def content(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A pool of blocks with bytes of their own."""
    return np.random.default_rng(seed).integers(0, 256, (count, BYTES), np.uint8)


def until(condition: Callable[[], Any], seconds: float = 10.0) -> bool:
    """Try again until it holds, for things that another thread or process does; the calls themselves take the time."""
    end = monotonic_seconds() + seconds
    while monotonic_seconds() < end:
        if condition():
            return True
        os.sched_yield()
    return False


def main() -> None:
    """Serve one inherited segment until killed."""
    path, directory_fd, slots_fd = sys.argv[1:]
    memory = Memory([HostSegment.adopt(int(directory_fd), int(slots_fd))])

    async def serve() -> None:
        server = Server(Path(path), 0o600, memory, LIMITS)
        await server.start()
        await asyncio.Event().wait()

    uvloop.run(serve())


if __name__ == "__main__":
    main()

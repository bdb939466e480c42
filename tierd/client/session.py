"""A client's life with the daemon: hello, attached segments, copies in progress, and what to say after a lost connection.

The rule that everything here serves: a slot that this process is copying from or to is never given back before the copy has ended,
and a slot that was leased on a lost connection is never touched again. So a copy starts only on the newest connection, is
registered while it runs, is named in `held` when the session resumes, and nothing is unmapped under it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.client.connection import Connection, NoAnswer
from tierd.client.events import Events
from tierd.client.mapping import Mapping
from tierd.client.transfer import Part, locate
from tierd.clock import monotonic_seconds
from tierd.errors import Closed, Gone, Invalid, TierdError
from tierd.layout import Layout
from tierd.wire.messages import ATTACHED, PROTOCOL_VERSION, PUSHES, SEGMENT, check_values, pack_held

PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.2, 2.0
MAPPED_TIER = "cpu"
BLOCKS_PER_REQUEST = 32_768
FRAME_BYTES = 4 << 20
DETACHED_REMEMBERED = 1024


class Copy:
    """A copy in progress: its parts, and whether it reads (1) or writes (2) the slots."""

    def __init__(self, parts: list[Part], kind: int) -> None:
        self.parts = parts
        self.kind = kind

    def held(self) -> Iterator[tuple[bytes, int, int]]:
        """Its slots as held records."""
        for part in self.parts:
            for index in part.indexes.tolist():
                yield part.mapping.segment, index, self.kind


class Session:
    """Connects when asked to, at most so often, and remembers what must outlive a connection. Used by several threads."""

    def __init__(self, path: Path, hello: dict[str, Any], layout: Layout, deadline_seconds: float) -> None:
        self.path = path
        self.deadline_seconds = deadline_seconds
        self.connects = 0
        self.blocks_max = BLOCKS_PER_REQUEST
        """Blocks that one request may name."""
        self._hello = hello
        self._layout = layout
        self._pid = os.getpid()
        self._connecting = Lock()
        self._changed = Condition(Lock())
        """Guards what follows; notified when a copy has ended."""
        self._closed = False
        self._connection: Connection | None = None
        self._newest: Connection | None = None
        self._welcome: dict[str, Any] | None = None
        self._segments: dict[bytes, Mapping] = {}
        self._ordinals: dict[int, Mapping] = {}
        self._detached: deque[bytes] = deque(maxlen=DETACHED_REMEMBERED)
        self._copies: set[Copy] = set()
        self._owed: tuple[int, set[Copy]] = (0, set())
        """The lease that a resume gave, and the copies that must end before it does."""
        self._events: Events | None = None
        self._pause_seconds = 0.0
        self._pause_ends = 0.0

    def __repr__(self) -> str:
        return f"<Session {self.path}: {len(self._segments)} segments, {len(self._copies)} copies, {self._connection}>"

    # Connecting.

    def connection(self) -> Connection:
        """A live connection, made now if it is time to; raises at once when it is not, after the deadline at the latest."""
        current = self._connection
        if current is not None and current.alive and not self._pause_ends:
            return current
        if not self._connecting.acquire(timeout=self.deadline_seconds):
            raise NoAnswer("another thread is still connecting")
        try:
            return self._connect()
        finally:
            self._connecting.release()

    def answered(self) -> None:
        """The daemon answered in time: no pause is due."""
        self._pause_seconds = self._pause_ends = 0.0

    def failed(self) -> None:
        """The daemon is away or does not answer in time: leave it alone for a while, twice as long each time."""
        self._pause_seconds = min(max(2 * self._pause_seconds, PAUSE_SECONDS_MIN), PAUSE_SECONDS_MAX)
        self._pause_ends = monotonic_seconds() + self._pause_seconds

    def pause_seconds_left(self) -> float:
        """How long `connection` refuses at once."""
        return max(0.0, self._pause_ends - monotonic_seconds()) if self._pause_ends else 0.0

    def _connect(self) -> Connection:
        if self._closed:
            raise Closed("this client was closed")
        if left := self.pause_seconds_left():
            raise Closed(f"the daemon was away or late; it is tried again in {left:.1f} s")
        current = self._connection
        if current is not None and current.alive:
            return current
        try:
            connection = self._open()
        except TierdError:
            self.failed()
            raise
        self.answered()
        return connection

    def _open(self) -> Connection:
        with self._changed:
            self._connection = None  # from here on no copy starts, so what is in `_copies` is all there is
        connection = Connection.open(self.path, self._pushed, self.deadline_seconds)
        try:
            with self._changed:
                self._newest = connection
                self._ordinals.clear()
                self._detached.clear()
            try:
                self._resume(connection)
            except Gone:
                self._begin(connection)
        except TierdError as error:
            connection.close(str(error))
            raise
        self.connects += 1
        if self._events is None:
            self._events = Events(self)
            self._events.start()
        else:
            self._events.reconnect()
        return connection

    def _resume(self, connection: Connection) -> None:
        """Take the session up again, holding on to what is being copied; raises Gone when there is none any more."""
        if self._welcome is None:
            raise Gone("there is no session to resume")
        with self._changed:
            copies = set(self._copies)
            held = [record for copy in copies for record in copy.held()]
        names = {name: self._welcome[name] for name in ("session", "token", "namespace")}
        arguments = {**self._hello, **names, "held": pack_held(held)}
        welcome = connection.request("resume", arguments, self.deadline_seconds)
        with self._changed:
            copies &= self._copies
            self._owed = (welcome["lease"], copies) if copies else (0, set())
        if welcome["lease"] and not copies:
            connection.tell("release", {"lease": welcome["lease"]})
        self._welcomed(connection, welcome)

    def _begin(self, connection: Connection) -> None:
        """Say hello; what an earlier session mapped is given up."""
        with self._changed:
            if self._copies:
                raise Closed("a copy of the session that is gone has not ended yet")
            self._welcome, self._owed = None, (0, set())
            for mapping in self._segments.values():
                mapping.close()
            self._segments.clear()
        welcome = connection.request("hello", self._hello, self.deadline_seconds)
        self._welcomed(connection, welcome)

    def _welcomed(self, connection: Connection, welcome: dict[str, Any]) -> None:
        for what, expected in (
            ("version", PROTOCOL_VERSION),
            ("block_bytes", self._layout.block_bytes),
            ("slot_bytes", self._layout.slot_bytes),
        ):
            if welcome[what] != expected:
                raise Invalid(f"the daemon has {what} {welcome[what]}, this client {expected}: use the same release")
        limits = welcome["limits"]
        blocks, frame_bytes = limits.get("blocks_per_request_max"), limits.get("frame_bytes_max")
        room = ((frame_bytes if isinstance(frame_bytes, int) else FRAME_BYTES) - 1024) // 32
        self.blocks_max = max(1, min(blocks if isinstance(blocks, int) else BLOCKS_PER_REQUEST, room))
        with self._changed:
            self._welcome = welcome
            for mapping in self._segments.values():
                self._check_namespace(mapping)
            if self._closed:
                raise Closed("this client was closed")
            self._connection = connection

    # Segments.

    def _pushed(self, connection: Connection, message: dict[str, Any], descriptors: deque[int]) -> None:
        """Map what is attached, before the reply that names it is looked at."""
        if message["push"] != "attach":
            raise Invalid(f"push {message['push']!r} is unknown on this connection")
        for segment in check_values("attach", message, PUSHES["attach"])["segments"]:
            if len(descriptors) < 2:
                raise Invalid(f"attach came with {len(descriptors)} descriptors for a segment, not 2")
            directory, slots = descriptors.popleft(), descriptors.popleft()
            try:
                self._attach(connection, check_values("attach", segment, ATTACHED), directory, slots)
            finally:
                os.close(directory)
                os.close(slots)

    def _attach(self, connection: Connection, attached: dict[str, Any], directory: int, slots: int) -> None:
        if attached["tier"] != MAPPED_TIER:
            raise Invalid(f"attach: this client maps tier {MAPPED_TIER!r}, not {attached['tier']!r}")
        with self._changed:
            if connection is not self._newest or attached["segment"] in self._detached:
                return
            mapping = self._segments.get(attached["segment"])
            if mapping is None:
                mapping = Mapping(attached, directory, slots, self._layout)
                self._segments[mapping.segment] = mapping
                self._check_namespace(mapping)
            replaced = self._ordinals.get(attached["ordinal"])
            self._ordinals[attached["ordinal"]] = mapping
            if replaced is not None and replaced is not mapping:
                self._give_up(replaced)

    def _check_namespace(self, mapping: Mapping) -> None:
        """Nothing of another namespace is ever used. (An attach may overtake hello's reply; it is checked then.)"""
        if self._welcome is not None and mapping.namespace != self._welcome["namespace"]:
            ours = self._welcome["namespace"].hex()[:16]
            raise Invalid(
                f"segment {mapping.segment.hex()} is of namespace {mapping.namespace.hex()[:16]}, ours is {ours}"
            )

    def _give_up(self, mapping: Mapping) -> None:
        """Forget a mapping; it is unmapped now or when its last copy has ended."""
        mapping.wanted = False
        self._segments.pop(mapping.segment, None)
        if not mapping.users:
            mapping.close()

    def detach(self, segments: list[Any]) -> list[bytes]:
        """Give segments back to the daemon; returns their ids once no copy uses them. Unknown ones are back already."""
        names = [check_values("detach", segment, SEGMENT)["segment"] for segment in segments]
        with self._changed:
            self._detached.extend(names)
            mappings = [self._segments[name] for name in names if name in self._segments]
            self._ordinals = {at: mapping for at, mapping in self._ordinals.items() if mapping not in mappings}
            for mapping in mappings:
                self._give_up(mapping)
            self._changed.wait_for(lambda: self._closed or not any(mapping.users for mapping in mappings))
        return names

    # Copies.

    @contextmanager
    def copying(self, connection: Connection, slots: NDArray[np.int32], kind: int) -> Iterator[list[Part]]:
        """Where `slots`, leased on `connection`, are, for the time of one copy; raises Closed when that lease is gone."""
        with self._changed:
            if connection is not self._connection:
                raise Closed("the connection was lost, and what was leased on it")
            copy = Copy(locate(slots, self.slots_per_segment, self._ordinals), kind)
            self._copies.add(copy)
            for part in copy.parts:
                part.mapping.users += 1
        try:
            yield copy.parts
        finally:
            self._copied(copy)

    def _copied(self, copy: Copy) -> None:
        release = 0
        with self._changed:
            self._copies.discard(copy)
            for part in copy.parts:
                part.mapping.users -= 1
                if not part.mapping.users and not part.mapping.wanted:
                    part.mapping.close()
            lease, waited_for = self._owed
            waited_for.discard(copy)
            if lease and not waited_for:
                release, self._owed = lease, (0, set())
            connection = self._newest
            self._changed.notify_all()
        if release and connection is not None:
            connection.tell("release", {"lease": release})

    @property
    def slots_per_segment(self) -> int:
        """What slot numbers are divided by."""
        assert self._welcome is not None
        return int(self._welcome["slots_per_segment"])

    # For the event channel.

    def open_events(self) -> Connection:
        """A new event channel of the present session."""
        with self._changed:
            welcome = self._welcome
        if welcome is None:
            raise Closed("there is no session yet")
        channel = Connection.open(self.path, self._detach_pushed, self.deadline_seconds)
        try:
            names = {name: welcome[name] for name in ("session", "token")}
            channel.request("events", names, self.deadline_seconds)
        except TierdError as error:
            channel.close(str(error))
            raise
        return channel

    def _detach_pushed(self, channel: Connection, message: dict[str, Any], _: deque[int]) -> None:
        if message["push"] != "detach":
            raise Invalid(f"push {message['push']!r} is unknown on an event channel")
        segments = check_values("detach", message, PUSHES["detach"])["segments"]
        channel.tell("detached", {"segments": self.detach(segments)})

    def look(self) -> None:
        """Notice a lost connection that no request has met yet."""
        connection = self._connection
        if connection is not None:
            connection.listen(0)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Say goodbye once the copies have ended (or the deadline is over, then without), and unmap."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            connection, self._connection = self._connection, None
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: not self._copies, self.deadline_seconds)
        if connection is not None and connection.alive and ended:
            try:
                connection.request("bye", {}, self.deadline_seconds)
            except TierdError:
                pass  # then the daemon learns it from the connection's end, and at last from the end of this process
        if self._events is not None:
            self._events.stop()
        with self._connecting, self._changed:
            for open_connection in (connection, self._newest):
                if open_connection is not None:
                    open_connection.close()
            self._ordinals.clear()
            for mapping in list(self._segments.values()):
                self._give_up(mapping)

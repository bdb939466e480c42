"""A client's life with the daemon: connect, hello or resume, event channel, goodbye."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from tierd.client.absence import Absence
from tierd.client.connection import Connection, NoAnswer
from tierd.client.events import Events
from tierd.client.removals import Removals
from tierd.client.segments import Segments
from tierd.errors import Closed, Gone, Invalid, TierdError
from tierd.layout import Layout
from tierd.wire.messages import PROTOCOL_VERSION, PUSHES, check_values

BLOCKS_PER_REQUEST = 32_768
FRAME_BYTES = 4 << 20
FRAME_BYTES_BESIDES_HASHES = 1024


class Session:
    """Connects when asked to, and not too often; what outlives a connection is in `segments`. Used by several threads.

    `connects` counts successful greetings, `blocks_max` is how many blocks one request may name.
    """

    def __init__(self, path: Path, hello: dict[str, Any], layout: Layout, deadline_seconds: float) -> None:
        self.path = path
        self.deadline_seconds = deadline_seconds
        self.segments = Segments(layout)
        self.removals = Removals()
        self.connects = 0
        self.blocks_max = BLOCKS_PER_REQUEST
        self.closed = False
        self._hello = hello
        self._layout = layout
        self._connecting = Lock()
        """Held by the one thread that changes what follows."""
        self._connection: Connection | None = None
        self._names: dict[str, Any] | None = None
        """What names the session to the daemon: session, token and namespace."""
        self._events: Events | None = None
        self.absence = Absence(hello["client"], path)

    def __repr__(self) -> str:
        return f"<Session {self.path}: {self._connection}, {self.segments}>"

    def connection(self) -> Connection:
        """A live connection, made now if it is time to; raises at once when it is not, else after the deadline."""
        current = self._connection
        if current is not None and current.alive and not self.absence:
            return current
        if not self._connecting.acquire(timeout=self.deadline_seconds):
            raise NoAnswer("another thread is still connecting")
        try:
            return self._connect()
        finally:
            self._connecting.release()

    def _connect(self) -> Connection:
        if self.closed:
            raise Closed("this client was closed")
        if left := self.absence.pause_seconds_left():
            raise Closed(f"the daemon was away or late; it is tried again in {left:.1f} s")
        current = self._connection
        if current is not None and current.alive:
            return current
        try:
            connection = self._open()
        except TierdError as error:
            self.absence.failed(error)
            raise
        self.absence.answered()
        return connection

    def _open(self) -> Connection:
        connection = Connection.open(self.path, self.segments.pushed, self.deadline_seconds)
        try:
            copies, held = self.segments.renew(connection)
            try:
                welcome = self._resume(connection, held)
            except Gone:
                self._names, copies = None, set()
                self.segments.forget()
                self.removals.note(b"", everything=True)
                welcome = connection.request("hello", self._hello, self.deadline_seconds)
            self._check_welcome(welcome)
            self.segments.accept(welcome, copies)
        except TierdError as error:
            connection.close(str(error))
            raise
        self._names = {name: welcome[name] for name in ("session", "token", "namespace")}
        self._connection = connection
        self.connects += 1
        if self._events is None:
            self._events = Events(self)
            self._events.start()
        else:
            self._events.reconnect()
        return connection

    def _resume(self, connection: Connection, held: bytes) -> dict[str, Any]:
        """Take the session up again, holding on to what is being copied; raises Gone when there is none any more."""
        if self._names is None:
            raise Gone("there is no session to resume")
        arguments = {**self._hello, **self._names, "held": held}
        return connection.request("resume", arguments, self.deadline_seconds)

    def _check_welcome(self, welcome: dict[str, Any]) -> None:
        for what, expected in (
            ("version", PROTOCOL_VERSION),
            ("block_bytes", self._layout.block_bytes),
            ("slot_bytes", self._layout.slot_bytes),
        ):
            if welcome[what] != expected:
                raise Invalid(f"the daemon has {what} {welcome[what]}, this client {expected}: use the same release")
        blocks = welcome["limits"].get("blocks_per_request_max", BLOCKS_PER_REQUEST)
        frame_bytes = welcome["limits"].get("frame_bytes_max", FRAME_BYTES)
        if type(blocks) is not int or type(frame_bytes) is not int:
            raise Invalid(f"the daemon's limits {welcome['limits']} are not integers")
        self.blocks_max = max(1, min(blocks, (frame_bytes - FRAME_BYTES_BESIDES_HASHES) // 32))

    # For the event channel.

    def open_events(self) -> Connection:
        """A new event channel of the present session."""
        names = self._names
        if names is None:
            raise Closed("there is no session yet")
        channel = Connection.open(self.path, self._pushed, self.deadline_seconds)
        try:
            proof = {name: names[name] for name in ("session", "token")}
            channel.request("events", proof, self.deadline_seconds)
        except TierdError as error:
            channel.close(str(error))
            raise
        return channel

    def _pushed(self, channel: Connection, message: dict[str, Any], _: deque[int]) -> None:
        match push := message["push"]:
            case "detach":
                segments = check_values(push, message, PUSHES[push])["segments"]
                channel.tell("detached", {"segments": self.segments.detach(segments)})
            case "removed":
                told = check_values(push, message, PUSHES[push])
                self.removals.note(told["hashes"], told["everything"])
            case _:
                raise Invalid(f"push {push!r} is unknown on an event channel")

    def look(self) -> None:
        """Notice a lost connection that no request has met yet."""
        if self._connection is not None:
            self._connection.listen(0)

    def close(self) -> None:
        """Say goodbye once the copies have ended (or without, when the deadline is over), and unmap."""
        with self._connecting:
            if self.closed:
                return
            self.closed = True
        ended = self.segments.close(self.deadline_seconds)
        if self._events is not None:
            self._events.stop()
        if self._connection is not None:
            if ended:
                with suppress(TierdError):  # then it learns at last from this process's end
                    self._say_bye(self._connection)
            self._connection.close()

    def _say_bye(self, connection: Connection) -> None:
        """End the session, on a connection of its own where the old one is lost: the daemon keeps its bit till then."""
        if connection.alive:
            connection.request("bye", {}, self.deadline_seconds)
            return
        connection = Connection.open(self.path, _refuse_push, self.deadline_seconds)
        try:
            self._resume(connection, held=b"")
            connection.request("bye", {}, self.deadline_seconds)
        finally:
            connection.close()


def _refuse_push(_: Connection, __: dict[str, Any], descriptors: deque[int]) -> None:
    """Take nothing of what a session is given that is about to end."""
    while descriptors:
        os.close(descriptors.popleft())

"""A connection that never blocks: it is made, greeted, kept and made again by `poll`.

`Session` does the same for clients that may wait; an engine between two steps may not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tierd.client.absence import Absence
from tierd.client.connection import Connection, OnPush, Ticket
from tierd.clock import monotonic_seconds
from tierd.errors import Closed, Gone, Invalid, TierdError
from tierd.wire.messages import PUSHES, check_values

CONNECT_SECONDS = 0.05
READS_MAX = 64


class Link:
    """The way to the daemon. `alive` while requests can be sent; `life` grows with each connection that was greeted.

    `held` gives the records of what a resumed session holds. `greeted(resumed)` is called when the daemon has answered,
    `lost()` when the connection is gone, and `detach(segments)` when the daemon wants them back.
    """

    def __init__(
        self,
        path: Path,
        hello: dict[str, Any],
        deadline_seconds: float,
        *,
        on_push: OnPush,
        held: Callable[[], bytes],
        greeted: Callable[[bool], None],
        lost: Callable[[], None],
        detach: Callable[[set[bytes]], None],
    ) -> None:
        self.path, self.deadline_seconds = path, deadline_seconds
        self.welcome: dict[str, Any] = {}
        self.alive = False
        self.trouble = ""
        """Why the connection was dropped the last time."""
        self.life = 0
        self.connection: Connection | None = None
        self._hello, self._on_push, self._held = hello, on_push, held
        self._greeted, self._lost, self._detach = greeted, lost, detach
        self._greeting: Ticket | None = None
        self._asked_at = 0.0
        self._events: Connection | None = None
        self._absence = Absence(hello["client"], path)

    def poll(self) -> None:
        """Take what has arrived, or try to connect if it is time to."""
        try:
            if self.connection is None:
                if not self._absence.pause_seconds_left():
                    self._connect()
                return
            for _ in range(READS_MAX):  # what comes with descriptors ends a read, and what lies behind it is not late
                if not self.connection.listen(0):
                    break
            if self._greeting is not None:
                self._take_greeting(self.connection)
            elif self._events is not None and self.alive:
                self._events.listen(0)
        except TierdError as error:
            self.drop(str(error))

    def wait(self, seconds: float) -> None:
        """Sleep until something has arrived, or for so many seconds."""
        try:
            if self.connection is not None:
                self.connection.listen(seconds)
            else:
                time.sleep(seconds)
        except TierdError as error:
            self.drop(str(error))

    def drop(self, reason: str) -> None:
        """The connection is of no use any more; another one is tried after a while, twice as long each time."""
        self.trouble = reason
        for connection in (self.connection, self._events):
            if connection is not None:
                connection.close(reason)
        was_there = self.connection is not None
        self.connection = self._events = self._greeting = None
        self.alive = False
        self._absence.failed(Closed(reason))
        if was_there:
            self._lost()

    def close(self) -> None:
        """Say goodbye."""
        if self.connection is not None:
            self.connection.tell("bye", {}, CONNECT_SECONDS)
            self.connection.close()
        if self._events is not None:
            self._events.close()
        self.connection = self._events = None
        self.alive = False

    def _connect(self) -> None:
        self.connection = Connection.open(self.path, self._on_push, CONNECT_SECONDS)
        self._greet(resuming=bool(self.welcome))

    def _greet(self, resuming: bool) -> None:
        assert self.connection is not None
        arguments = dict(self._hello)
        if resuming:
            arguments |= {name: self.welcome[name] for name in ("session", "token", "namespace")} | {"held": self._held()}
        else:
            self.welcome = {}
        self._greeting = self.connection.ask("resume" if resuming else "hello", arguments, self.deadline_seconds)
        self._asked_at = monotonic_seconds()

    def _take_greeting(self, connection: Connection) -> None:
        assert self._greeting is not None
        resumed = self._greeting.verb == "resume"
        try:
            welcome = connection.answer(self._greeting)
        except (Gone, Invalid):  # a session that cannot be had again, whyever, would keep us away for good
            if not resumed:
                raise
            self._greet(resuming=False)
            return
        if welcome is None:
            if monotonic_seconds() > self._asked_at + self.deadline_seconds:
                raise Closed("the daemon did not answer the greeting in time")
            return
        self._greeting, self.welcome = None, welcome
        self._absence.answered()
        self.alive, self.life = True, self.life + 1
        self._greeted(resumed)
        with suppress(TierdError):  # without it segments cannot be taken back, which is the daemon's loss
            self._events = Connection.open(self.path, self._detach_pushed, CONNECT_SECONDS)
            proof = {name: welcome[name] for name in ("session", "token")}
            self._events.ask("events", proof, self.deadline_seconds)

    def _detach_pushed(self, channel: Connection, message: dict[str, Any], _: deque[int]) -> None:
        if message["push"] != "detach":
            raise Invalid(f"push {message['push']!r} is unknown on an event channel")
        entries = check_values("detach", message, PUSHES["detach"])["segments"]
        segments = {entry["segment"] for entry in entries}
        self._detach(segments)
        channel.tell("detached", {"segments": sorted(segments)}, CONNECT_SECONDS)

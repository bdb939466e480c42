"""A scripted handler for the real server, and a raw client that can misbehave."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from tests.unit.fake_daemon import Daemon
from tierd.errors import TierdError
from tierd.server import Connection
from tierd.wire.framing import FrameReader, decode, encode
from tierd.wire.messages import Answer, Request

HELLO = {"verb": "hello", "version": 1, "model": "m", "layout": {}, "fingerprint": bytes(16), "client": "test"}
BYE, STATS = {"verb": "bye"}, {"verb": "stats"}


class Scripted:
    """Answers by verb: a dictionary is the reply, an exception is raised, a callable decides."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.open: list[Connection] = []
        self.ended: list[Connection] = []
        self.refusals: list[tuple[str, str]] = []

    def connected(self, connection: Connection) -> None:
        """Remember it."""
        answer = self.answers.get("connected")
        if answer:
            raise answer
        self.open.append(connection)

    def refused(self, connection: Connection, request: Request, error: TierdError) -> None:
        """Remember it."""
        self.refusals.append((request.verb, error.code))

    def disconnected(self, connection: Connection) -> None:
        """Remember it."""
        self.ended.append(connection)

    def request(self, connection: Connection, request: Request) -> Answer:
        """Answer by the script."""
        answer = self.answers.get(request.verb)
        if isinstance(answer, Exception):
            raise answer
        said: Answer = answer(connection, request) if callable(answer) else answer
        return said


class Peer:
    """A raw client: sends any bytes, reads frames with a deadline."""

    def __init__(self, path: Path, hello: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.reader = FrameReader(16 << 20)
        self.fds: list[int] = []
        self.messages: list[dict[str, Any]] = []
        if hello:
            assert self.ask(HELLO)["ok"]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """One request and its reply."""
        self.socket.sendall(encode({"id": 1, **message}))
        return self.next()

    def next(self) -> dict[str, Any]:
        """The next message; {} at the end of the stream."""
        while not self.messages:
            try:
                data, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, 253)
            except ConnectionResetError:
                return {}
            if not data:
                return {}
            self.fds += fds
            while data:
                room = self.reader.buffer()
                taken = min(len(room), len(data))
                room[:taken] = data[:taken]
                self.reader.feed(taken)
                data = data[taken:]
                self.messages += [decode(payload) for payload in self.reader]
        return self.messages.pop(0)


def wait_until(server: Daemon, condition: Any) -> None:
    """Let the loop turn until something is so; its work is what we wait for, not time."""
    for _ in range(100_000):
        if server.call(condition):
            return
    raise AssertionError("it never became true")

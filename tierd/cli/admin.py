"""Questions to a daemon's admin socket and their answers, each with a deadline."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tierd.clock import monotonic_seconds
from tierd.errors import ERRORS, Busy, Closed, TierdError
from tierd.wire.framing import decode, encode
from tierd.wire.peer import peer_of

REPLY_BYTES_MAX = 4 << 20
REQUEST_ID = 1


class AdminSocket:
    """A connection that asks one thing after the other. Closed when nobody answers in time, else the error that was named."""

    def __init__(self, path: Path, seconds_max: float) -> None:
        self._path, self._seconds_max = path, seconds_max
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> AdminSocket:
        try:
            with self._explained():
                self._socket.settimeout(self._seconds_max)
                self._socket.connect(str(self._path))
        except Closed:
            self._socket.close()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._socket.close()

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """The reply to one request."""
        until = monotonic_seconds() + self._seconds_max
        with self._explained():
            self._socket.sendall(encode({"id": REQUEST_ID, "verb": verb, **arguments}))
            while True:
                length = int.from_bytes(receive(self._socket, 4, until), "little")
                if length > REPLY_BYTES_MAX:
                    raise Closed(f"{self._path} answers with a frame of {length} bytes: it is not a tierd admin socket")
                reply = decode(receive(self._socket, length, until))
                if reply.get("id") == REQUEST_ID or reply.get("ok") is False:
                    break
        if reply.get("ok") is not True:
            kind: type[TierdError] = ERRORS.get(str(reply.get("error")), Busy)
            raise kind(str(reply.get("message")))
        return {key: value for key, value in reply.items() if key not in ("id", "ok")}

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._socket.fileno()

    def listener(self) -> int:
        """A pidfd of the process that listens, the caller's to close; raises Invalid and Closed where it cannot be told."""
        return peer_of(self._socket).pidfd

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong with the socket, as what to do about it."""
        try:
            yield
        except TimeoutError as error:
            raise Closed(f"the daemon at {self._path} did not answer within {self._seconds_max:g} s: see its log") from error
        except PermissionError as error:
            raise Closed(f"{self._path} lets in only root and the daemon's own user: use sudo") from error
        except OSError as error:
            raise Closed(f"no daemon at {self._path} ({error.strerror}): start one with `tierd serve`") from error


def ask(path: Path, verb: str, seconds_max: float, **arguments: Any) -> dict[str, Any]:
    """The reply to one request of a connection of its own."""
    with AdminSocket(path, seconds_max) as admin:
        return admin.ask(verb, **arguments)


def receive(connection: socket.socket, count: int, until: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        remaining = until - monotonic_seconds()
        if remaining <= 0:
            raise TimeoutError
        connection.settimeout(remaining)
        chunk = connection.recv(min(count - len(data), 1 << 16))
        if not chunk:
            raise ConnectionResetError(104, "it closed the connection")
        data += chunk
    return bytes(data)

"""One question to a daemon's admin socket and its answer, with a deadline."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from tierd.clock import monotonic_seconds
from tierd.errors import ERRORS, Busy, Closed, TierdError
from tierd.wire.framing import decode, encode

REPLY_BYTES_MAX = 4 << 20
REQUEST_ID = 1


def ask(path: Path, verb: str, seconds_max: float, **arguments: Any) -> dict[str, Any]:
    """The reply to one admin request; Closed when nobody answers in time, else the error that the daemon named."""
    until = monotonic_seconds() + seconds_max
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(seconds_max)
            connection.connect(str(path))
            connection.sendall(encode({"id": REQUEST_ID, "verb": verb, **arguments}))
            while True:
                length = int.from_bytes(receive(connection, 4, until), "little")
                if length > REPLY_BYTES_MAX:
                    raise Closed(f"{path} answers with a frame of {length} bytes: it is not a tierd admin socket")
                reply = decode(receive(connection, length, until))
                if reply.get("id") == REQUEST_ID or reply.get("ok") is False:
                    break
        except TimeoutError as error:
            raise Closed(f"the daemon at {path} did not answer within {seconds_max:g} s: see its log") from error
        except PermissionError as error:
            raise Closed(f"{path} lets in only root and the daemon's own user: use sudo") from error
        except OSError as error:
            raise Closed(f"no daemon at {path} ({error.strerror}): start one with `tierd serve`") from error
    if reply.get("ok") is not True:
        kind: type[TierdError] = ERRORS.get(str(reply.get("error")), Busy)
        raise kind(str(reply.get("message")))
    return {key: value for key, value in reply.items() if key not in ("id", "ok")}


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

"""The ceiling of a round trip: as many bytes there and back between two processes, and nothing done with them.

The other process runs this module. Both sides block in one system call at a time: Python can do no faster.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from types import TracebackType

from tierd.clock import monotonic_seconds

SIZES = struct.Struct("<II")
"""Sent first: bytes of the request after this, bytes of the reply."""
SOCKET_BUFFER_BYTES = 1 << 20
BYTES_MAX = 4 << 20
SECONDS_MAX = 10.0


class Echo:
    """A child process at the other end of a Unix socket; a context manager."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        for end in (self._socket, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        self._socket.settimeout(SECONDS_MAX)
        self._buffer = memoryview(bytearray(BYTES_MAX))
        with theirs:
            command = [sys.executable, "-m", "tierd.bench.echo", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()
        try:
            self._process.wait(SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def round_trip(self, request: bytes, reply_bytes: int) -> float:
        """Seconds from sending `request` to the last byte of a reply of that size."""
        started = monotonic_seconds()
        self._socket.sendall(SIZES.pack(len(request), reply_bytes) + request)
        receive(self._socket, self._buffer[:reply_bytes])
        return monotonic_seconds() - started


def receive(connection: socket.socket, target: memoryview) -> bool:
    """Fill `target`; False when the other side has closed instead."""
    while len(target):
        received = connection.recv_into(target)
        if not received:
            return False
        target = target[received:]
    return True


def serve(connection: socket.socket) -> None:
    """Answer until the other side closes."""
    sizes = memoryview(bytearray(SIZES.size))
    buffer = memoryview(bytearray(BYTES_MAX))
    while receive(connection, sizes):
        request_bytes, reply_bytes = SIZES.unpack(sizes)
        if not receive(connection, buffer[:request_bytes]):
            return
        connection.sendall(buffer[:reply_bytes])


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        serve(inherited)

"""Frames: a little-endian u32 length, then that many bytes of one MessagePack map with string keys.

Rules of this file: a length is judged before anything is allocated for it, memory follows what was received and not
what was announced, and whatever arrives either is a map or raises Invalid.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Any

import msgpack

from tierd.errors import Invalid

LENGTH = Struct("<I")
BUFFER_BYTES = 64 << 10
BUFFER_BYTES_KEPT = 1 << 20
"""A reader that had to grow beyond this gives the memory back when it is empty."""
ITEMS_MAX = 4096
"""Entries of one array or map. Whatever there is one of per block travels packed, so none is larger."""


def frame(message: dict[str, Any]) -> tuple[bytes, bytes]:
    """Header and body of one message, for `sendmsg`; the body's bytes are copied twice (into the packer, out of it)."""
    body = msgpack.packb(message)
    return LENGTH.pack(len(body)), body


def encode(message: dict[str, Any]) -> bytes:
    """One message as a frame in one piece."""
    return b"".join(frame(message))


def decode(payload: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Read a frame's payload; raises Invalid for everything that is not one MessagePack map with string keys.

    Nothing in it can claim more bytes than the payload has; `bin` values are copied out of it once.
    """
    try:
        message = msgpack.unpackb(payload, max_array_len=ITEMS_MAX, max_map_len=ITEMS_MAX, max_ext_len=0)
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise Invalid(f"a frame of {len(payload)} bytes is not MessagePack as tierd uses it: {reason}") from error
    if type(message) is not dict:
        raise Invalid(f"a frame must hold a MessagePack map, not {type(message).__name__}")
    for key in message:
        if type(key) is not str:
            raise Invalid(f"a frame's keys must be strings, not {type(key).__name__}")
    return message


class FrameReader:
    """Cuts a stream into frames: `recv_into(reader.buffer())`, `feed(received)`, then iterate over what is complete.

    A payload is a view into the reader's buffer and ends with the next `buffer()`. Iterating raises Invalid as soon
    as a length over `frame_bytes_max` has arrived; the stream cannot be read any further then.
    """

    def __init__(self, frame_bytes_max: int) -> None:
        self.frame_bytes_max = frame_bytes_max
        self._memory = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._end = 0

    def __repr__(self) -> str:
        return f"<FrameReader: {self._end - self._start} of {len(self._memory)} bytes wait>"

    def buffer(self) -> memoryview:
        """Where to receive to; never empty."""
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._memory) > BUFFER_BYTES_KEPT:
                self._memory = memoryview(bytearray(BUFFER_BYTES))
        elif self._end == len(self._memory):
            self._make_room()
        return self._memory[self._end :]

    def feed(self, received: int) -> None:
        """`received` bytes were written to the start of `buffer()`."""
        assert 0 <= received <= len(self._memory) - self._end
        self._end += received

    def __iter__(self) -> Iterator[memoryview]:
        while self._end - self._start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._memory, self._start)
            if length > self.frame_bytes_max:
                raise Invalid(f"a frame of {length} bytes is over the maximum of {self.frame_bytes_max} bytes")
            first, last = self._start + LENGTH.size, self._start + LENGTH.size + length
            if last > self._end:
                return
            self._start = last
            yield self._memory[first:last]

    def _make_room(self) -> None:
        """Move what waits to the front; double the buffer when it is more than half full."""
        waiting = self._memory[self._start : self._end]
        if len(waiting) > len(self._memory) // 2:
            self._memory = memoryview(bytearray(2 * len(self._memory)))
        self._memory[: len(waiting)] = waiting
        self._start, self._end = 0, len(waiting)


def after(parts: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of `parts` behind the first `sent` bytes."""
    left = []
    for part in parts:
        if sent < len(part):
            left.append(part[sent:])
        sent = max(0, sent - len(part))
    return left

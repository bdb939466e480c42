"""A trace that grows: what engines ask for, written as `trace` reads it, without anything that says what was asked.

A block's id is a keyed hash of its hash, under a key that is drawn for the file and never written: ids of two files have
nothing in common, and who has the file cannot try whether some text is in it. Times begin at the first request.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b
from typing import IO

from tierd.block import HASH_BYTES

ID_BYTES = 8
OPEN_MS_MAX, OPEN_BLOCKS_MAX = 600_000, 1 << 22
"""A request waits for the end of its turn no longer, and in no longer a line of others, before it is written."""


@dataclass
class Line:
    """One request, and what is known of its turn's end; `ids` as ID_BYTES each."""

    now: int
    ids: bytes
    stop: str | None = None
    session: str | None = None


class TraceWriter:
    """Writes to `out` with `key` (16 to 64 secret bytes); blocks have `block_tokens`."""

    def __init__(self, out: IO[bytes], key: bytes, block_tokens: int) -> None:
        self.requests = self.blocks = 0
        """Of the lines that were written."""
        self._out, self._key, self._block_tokens = out, key, block_tokens
        self._began: int | None = None
        self._latest = 0
        self._open: deque[Line] = deque()
        self._open_blocks = 0
        self._last: dict[bytes, Line] = {}
        """Requests whose turn has not ended, by their last block."""

    def asked(self, now: int, hashes: bytes) -> None:
        """A request asks for a whole chain of packed hashes; `now` is in milliseconds."""
        if self._began is None:
            self._began = now
        self._latest = max(self._latest, now - self._began)  # the wall clock may be set back
        line = Line(self._latest, self._ids(hashes))
        self._open.append(line)
        self._open_blocks += len(line.ids) // ID_BYTES
        self._last[line.ids[-ID_BYTES:]] = line
        while self._open and (self._open[0].stop or self._is_over(self._open[0])):
            self._write()

    def ended(self, hashes: bytes, turn: str, conversation: str | None) -> None:
        """A turn has ended whose whole chain this is: it is that of the request that went furthest along it."""
        ids = self._ids(hashes)
        for end in range(len(ids), 0, -ID_BYTES):
            if line := self._last.pop(ids[end - ID_BYTES : end], None):
                line.stop = turn
                line.session = conversation and self._name(conversation.encode()).hex()
                return

    def close(self) -> None:
        """Write all that was still open."""
        while self._open:
            self._write()

    def _is_over(self, line: Line) -> bool:
        return self._latest - line.now > OPEN_MS_MAX or self._open_blocks > OPEN_BLOCKS_MAX

    def _write(self) -> None:
        line = self._open.popleft()
        count = len(line.ids) // ID_BYTES
        self._open_blocks -= count
        if self._last.get(line.ids[-ID_BYTES:]) is line:
            del self._last[line.ids[-ID_BYTES:]]
        ids = [int.from_bytes(line.ids[at : at + ID_BYTES]) for at in range(0, len(line.ids), ID_BYTES)]
        tokens = count * self._block_tokens
        fields = {"timestamp": line.now, "input_length": tokens, "output_length": 0, "hash_ids": ids}
        fields |= {name: value for name, value in (("stop", line.stop), ("session_id", line.session)) if value}
        self._out.write(json.dumps(fields).encode() + b"\n")
        self.requests, self.blocks = self.requests + 1, self.blocks + count

    def _ids(self, hashes: bytes) -> bytes:
        """An id for each hash; 63 bits, so that every reader of JSON has a number for it."""
        names = [self._name(hashes[at : at + HASH_BYTES]) for at in range(0, len(hashes), HASH_BYTES)]
        return b"".join(bytes([name[0] & 0x7F]) + name[1:] for name in names)

    def _name(self, data: bytes) -> bytes:
        return blake2b(data, key=self._key, digest_size=ID_BYTES).digest()

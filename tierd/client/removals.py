"""What the event channel has told of blocks that tierd has no more, until somebody wants to know."""

from __future__ import annotations

from threading import Lock
from typing import NamedTuple

from tierd.block import HASH_BYTES

BLOCKS_MAX = 65_536
"""Of more than these it is only remembered that everything may be gone."""


class Removed(NamedTuple):
    """Packed hashes of blocks, in the order of their going. `everything`: before them, all that tierd had may have gone."""

    hashes: bytes
    everything: bool


class Removals:
    """Written by the thread that reads the channel, taken by any other."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._hashes = bytearray()
        self._everything = False

    def note(self, hashes: bytes, everything: bool) -> None:
        """A push; or, with `everything`, that pushes may have been missed."""
        with self._lock:
            self._hashes += hashes
            if everything or len(self._hashes) > BLOCKS_MAX * HASH_BYTES:
                self._hashes, self._everything = bytearray(), True

    def take(self) -> Removed:
        """All of it, once."""
        with self._lock:
            taken = Removed(bytes(self._hashes), self._everything)
            self._hashes, self._everything = bytearray(), False
        return taken

"""Which blocks live nowhere any more, noted as their last copies go, for whoever wants to be told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES
from tierd.core.plan import Slots, any_of

BLOCKS_MAX = 32_768
"""Of more than a request may name, it is only known that there were too many to name."""


class Removed:
    """What has gone since the last `take`. `wake` is called when there is something to take."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._hashes = bytearray()
        self._too_many = False

    def note(self, hashes: bytes, slots: Slots, where: NDArray[np.intp] | slice) -> None:
        """Of a run (packed hashes, int32[tiers, n]) some blocks have just lost a copy: those that have no other are gone."""
        if self._too_many:
            return
        gone = np.frombuffer(hashes, f"V{HASH_BYTES}")[where][~any_of(slots[:, where])]
        if not len(gone):
            return
        if not self._hashes:
            self._wake()
        self._hashes += gone.tobytes()
        if len(self._hashes) > BLOCKS_MAX * HASH_BYTES:
            self._hashes, self._too_many = bytearray(), True

    def take(self) -> tuple[bytes, bool]:
        """Packed hashes of at most BLOCKS_MAX blocks, in the order of their going; or none, and that there were more."""
        taken = bytes(self._hashes), self._too_many
        self._hashes, self._too_many = bytearray(), False
        return taken

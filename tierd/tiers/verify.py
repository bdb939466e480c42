"""Reading blocks only to see whether they are still what was written."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from tierd.tiers.directory import Slots
from tierd.tiers.nvme import FileSegment

BATCH_BYTES = 8 << 20


class Verifier:
    """Page-aligned memory for a batch of blocks of one slot size; for one thread at a time."""

    def __init__(self, slot_bytes: int) -> None:
        self.batch = max(1, BATCH_BYTES // slot_bytes)
        """The most slots of one call."""
        memory = mmap.mmap(-1, self.batch * slot_bytes)
        self._buffers = list(np.frombuffer(memory, np.uint8).reshape(self.batch, slot_bytes))

    def verify(self, segment: FileSegment, slots: Slots) -> NDArray[np.uint8]:
        """READ_OK, READ_FAILED or READ_DAMAGED for each of some ready slots. Blocks, with the GIL released."""
        assert len(slots) <= self.batch, f"{len(slots)} slots in a batch of {self.batch}"
        return segment.read(slots, self._buffers[: len(slots)])

"""What the core decides: leases and transfers, and the answers that verbs give."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES

Slots = NDArray[np.int32]

STORED, PENDING, NO_ROOM = -1, -2, -3
"""Instead of a slot number in the answer to `store`."""

OK, IO_ERROR, MISMATCH = 0, 1, 2
"""Outcome of one block of a transfer."""

DEMAND, PREFETCH, WRITE_BACK = "demand", "prefetch", "write_back"
REASONS = (DEMAND, PREFETCH, WRITE_BACK)
"""Why a transfer is made, most urgent first."""


@dataclass(slots=True, eq=False)
class Lease:
    """A session's claim on n consecutive blocks.

    Reading: `upper` are slots of the mapped tier (-1: only below, or released), `lower` those of nvme that it holds instead.
    Writing: `upper` are the slots to fill and `positions` says which blocks of `hashes` they are for.
    """

    id: int
    session: int
    parent: bytes
    hashes: bytes
    upper: Slots
    lower: Slots
    blocks: int
    told: NDArray[np.bool_]
    positions: NDArray[np.intp] | None = None

    @property
    def writing(self) -> bool:
        """Whether the lease's slots are being filled by the session."""
        return self.positions is not None


@dataclass(slots=True, eq=False)
class Transfer:
    """Blocks that go from slots of one tier to slots of another. Their hashes follow each other in one chain, with gaps."""

    id: int
    reason: str
    source: str
    target: str
    source_slots: Slots
    target_slots: Slots
    hashes: bytes
    parents: bytes
    leases: list[Lease] = field(default_factory=list)
    parked: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Write-backs whose parents are in this one."""

    def __len__(self) -> int:
        return len(self.hashes) // HASH_BYTES


@dataclass(slots=True)
class Found:
    """Answer to `lookup`."""

    lease: int
    blocks: int
    told: int
    slots: Slots
    tiers: dict[str, int]


@dataclass(slots=True)
class Wait:
    """Not yet: ask again when one of these transfers has ended."""

    transfers: list[int]


@dataclass(slots=True)
class Placed:
    """Answer to `store`: one slot number or code per block."""

    lease: int
    slots: Slots


@dataclass(slots=True)
class Committed:
    """Answer to `commit`."""

    committed: int
    dropped: int

"""What the core decides: leases and transfers, and the answers that verbs give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES

Slots = NDArray[np.int32]

STORED, PENDING, NO_ROOM = -1, -2, -3
"""Instead of a slot number in the answer to `store`."""

NAMED, UNNAMED = -1, -2
"""Instead of a slot number in the answer to `commit_pages`: the page is that block now, or stays reserved."""

OK, IO_ERROR, MISMATCH = 0, 1, 2
"""Outcome of one block of a transfer."""

"""Why a turn can have ended when an engine lets go of its pages."""

DEMAND, PREFETCH, WRITE_BACK = "demand", "prefetch", "write_back"
REASONS = (DEMAND, PREFETCH, WRITE_BACK)
"""Why a transfer is made, most urgent first."""


@dataclass(slots=True, eq=False)
class Lease:
    """A session's claim on n consecutive blocks.

    `slots` (int32[tiers, n]) are the copies that it holds, at most one of each block: in the session's `tier`, or in
    another one until it has come (-1 everywhere: released). Writing: the slots of `tier` are to be filled, and
    `positions` says which blocks of `hashes` they are for.
    """

    id: int
    session: int
    tier: int
    parent: bytes
    hashes: bytes
    slots: Slots
    blocks: int
    told: NDArray[np.bool_]
    positions: NDArray[np.intp] | None = None
    started: int = 0
    """Promotion has seen to every block before this one."""

    @property
    def here(self) -> Slots:
        """Its slots of the session's tier (a view)."""
        row: Slots = self.slots[self.tier]
        return row

    @property
    def writing(self) -> bool:
        """Whether the lease's slots are being filled by the session."""
        return self.positions is not None

    def last_hash(self, count: int | None) -> bytes:
        """The last of the first `count` blocks that are being filled (None: of all), or nothing."""
        at = [] if self.positions is None else self.positions[:count].tolist()
        return self.hashes[at[-1] * HASH_BYTES : (at[-1] + 1) * HASH_BYTES] if at else b""

    def filled(self) -> bytes:
        """The hashes of the blocks that are being filled."""
        return pick(self.hashes, self.positions) if self.positions is not None else b""


@dataclass(slots=True, eq=False)
class Transfer:
    """Blocks that go from slots of one tier to slots of another. Their hashes follow each other in one chain, with
    gaps.
    """

    id: int
    reason: str
    source: str
    target: str
    source_slots: Slots
    target_slots: Slots
    hashes: bytes
    parents: bytes
    waiting: dict[Lease, NDArray[np.intp]] = field(default_factory=dict)
    """Who waits for the blocks: which block of the lease each one is, or -1."""
    behind: int = 0
    """The transfer that writes the parent of the first block, and has to be entered before; 0: the parent is there."""
    number: int = 0
    """Of a write-back: the lowest number of the runs whose blocks it carries (see `WriteBack.mark`)."""
    held_up: list[tuple[Transfer, NDArray[np.uint8]]] = field(default_factory=list)
    """Transfers behind this one that ended before it did, with their outcomes."""

    def __len__(self) -> int:
        return len(self.hashes) // HASH_BYTES


@dataclass(slots=True)
class Found:
    """Answer to `lookup`: `slots` (int32[told]) of the leading blocks, and how many blocks are in which of `tiers`."""

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
    """Answer to `store`: one slot number or code per block (int32[n])."""

    lease: int
    slots: Slots


@dataclass(slots=True)
class Committed:
    """Answer to `commit`: how many blocks are visible now, and how many could not be placed."""

    committed: int
    dropped: int


class Hint(NamedTuple):
    """What an engine said when a turn had ended: why, and whose it was."""

    turn: str
    conversation: str | None


def nothing(blocks: int) -> Slots:
    """No slot, for each of n blocks (int32[n] of -1)."""
    slots = np.empty(blocks, np.int32)
    slots.fill(-1)
    return slots


def names(hashes: bytes) -> list[bytes]:
    """The single hashes of a packed run."""
    blocks: list[bytes] = np.frombuffer(hashes, "V32").tolist()
    return blocks


def pick(hashes: bytes, positions: NDArray[np.intp]) -> bytes:
    """The hashes at some rising positions of a packed run."""
    if len(positions) == len(hashes) // HASH_BYTES:
        return hashes
    return np.frombuffer(hashes, "V32")[positions].tobytes()


def any_true(mask: NDArray[np.bool_]) -> bool:
    """Whether any is true: `mask.any()` in a tenth of its time, which matters where masks are short."""
    return mask.tobytes().find(1) >= 0


def all_true(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> bool:
    """Whether all are true, or not 0, likewise."""
    return bool(np.count_nonzero(mask) == len(mask))


def any_of(rows: Slots | list[Slots]) -> NDArray[np.bool_]:
    """Which blocks are in any of these tiers (int32[n] each, at least one): cheaper than a maximum over so few rows."""
    there: NDArray[np.bool_] = rows[0] >= 0
    for row in rows[1:]:
        there = there | (row >= 0)
    return there


def leading(good: NDArray[np.bool_]) -> int:
    """How many leading elements are true."""
    return len(good) if good.all() else int(good.argmin())


def keep_one(slots: Slots, tier: int, told: int) -> None:
    """Of the copies of each block (int32[tiers, n]) keep the one in `tier` for the first `told`, else the lowest of those
    elsewhere.
    """
    there = slots[:, told:] >= 0
    there[tier] &= np.count_nonzero(there, axis=0) == 1
    kept = np.full(slots.shape[1], tier)
    kept[told:] = len(slots) - 1 - there[::-1].argmax(0)
    slots[np.arange(len(slots))[:, None] != kept] = -1

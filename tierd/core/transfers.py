"""Transfers that were decided and have not ended: each uses its source slots and owns its target slots till then."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tierd.core.plan import TIERS, UPPER, Lease, Slots, Transfer
from tierd.core.pool import Pool

ID_MAX = (1 << 31) - 1


class Transfers:
    """Single flight: a slot is the source of at most one transfer at a time."""

    def __init__(self, pools: list[Pool]) -> None:
        self.planned: list[Transfer] = []
        """Decided, not yet taken by the mover."""
        self.running: dict[int, Transfer] = {}
        """Not ended yet, planned ones included; by id."""
        self._pools = pools
        self._latest = 0
        self._readers: list[NDArray[np.int32]] = [np.zeros(0, np.int32) for _ in pools]

    def readers(self, tier: int, slots: Slots) -> NDArray[np.int32]:
        """The transfer that reads each slot (int32[n]); 0: none."""
        if len(self._readers[tier]) < len(self._pools[tier].users):
            grown = np.zeros(len(self._pools[tier].users), np.int32)
            grown[: len(self._readers[tier])] = self._readers[tier]
            self._readers[tier] = grown
        return self._readers[tier][slots]

    def plan(self, reason: str, source: int, slots: Slots, targets: Slots, hashes: bytes, parents: bytes) -> Transfer:
        """Decide to move blocks from slots of tier `source` to slots of the other tier, which were taken for it."""
        names = TIERS if source == UPPER else TIERS[::-1]
        transfer = Transfer(self._next_id(), reason, *names, slots, targets, hashes, parents)
        assert not self.readers(source, slots).any(), "a block is moved twice at a time"
        self._readers[source][slots] = transfer.id
        self._pools[source].use(slots)
        self.running[transfer.id] = transfer
        self.planned.append(transfer)
        return transfer

    def _next_id(self) -> int:
        """An id that no running transfer has, and none had for long."""
        self._latest = self._latest % ID_MAX + 1
        while self._latest in self.running:
            self._latest = self._latest % ID_MAX + 1
        return self._latest

    def join(self, transfer: int, lease: Lease) -> None:
        """Let a lease have the blocks of a running transfer when it ends."""
        if lease not in self.running[transfer].leases:
            self.running[transfer].leases.append(lease)

    def end(self, transfer: Transfer) -> None:
        """Forget an ended transfer and let its source go."""
        source = TIERS.index(transfer.source)
        del self.running[transfer.id]
        self._readers[source][transfer.source_slots] = 0
        self._pools[source].unuse(transfer.source_slots)

"""Transfers that were decided and have not ended: each uses its source slots and owns its target slots till then."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from tierd.core.ahead import Ahead
from tierd.core.ladder import Ladder
from tierd.core.plan import PREFETCH, Lease, Slots, Transfer

ID_MAX = (1 << 31) - 1


class Transfers:
    """Single flight: a slot is the source of at most one transfer to each tier at a time."""

    def __init__(self, ladder: Ladder, counters: Counter[tuple[str, ...]]) -> None:
        self.planned: list[Transfer] = []
        """Decided, not yet taken by the mover."""
        self.hastened: list[Transfer] = []
        """Prefetches under way that somebody waits for now; not yet told to the mover."""
        self.running: dict[int, Transfer] = {}
        """Not ended yet, planned ones included; by id."""
        self._ladder = ladder
        for pool in ladder.pools:
            pool.ahead = Ahead(counters)
        self._latest = 0
        self._readers: dict[tuple[int, int], NDArray[np.int32]] = {}
        """By source and target: the transfer that reads each slot of the source; 0: none."""

    def arriving(self, target: int, copies: Slots) -> NDArray[np.int32]:
        """The transfer that brings each block to a tier (int32[n]), 0: none; `copies` (int32[tiers, n]) says where they are."""
        found: list[NDArray[np.int32]] = []
        for source in range(len(copies)):
            if (source, target) in self._readers:
                slots = copies[source]
                found.append(np.where(slots >= 0, self._read(source, target)[slots], 0))
        match found:
            case []:
                return np.zeros(copies.shape[1], np.int32)
            case [only]:
                return only
        latest: NDArray[np.int32] = np.maximum.reduce(found)
        return latest

    def plan(
        self, reason: str, source: int, target: int, slots: Slots, targets: Slots, hashes: bytes, parents: bytes
    ) -> Transfer:
        """Decide to move blocks from slots of tier `source` to slots of tier `target`, which were taken for it."""
        names = self._ladder.names
        transfer = Transfer(self._next_id(), reason, names[source], names[target], slots, targets, hashes, parents)
        readers = self._read(source, target)
        assert not readers[slots].any(), "a block is moved twice at a time"
        readers[slots] = transfer.id
        self._ladder.pools[source].use(slots)
        self.running[transfer.id] = transfer
        self.planned.append(transfer)
        return transfer

    def join(self, transfer: Transfer, lease: Lease, blocks: NDArray[np.intp], slots: Slots) -> None:
        """Let some blocks of a lease, which the transfer reads at `slots`, be the lease's when it ends."""
        order = np.argsort(transfer.source_slots)
        wanted = transfer.waiting.setdefault(lease, np.full(len(transfer), -1, np.intp))
        wanted[order[np.searchsorted(transfer.source_slots, slots, sorter=order)]] = blocks
        if transfer.reason == PREFETCH and len(transfer.waiting) == 1:
            self.hastened.append(transfer)

    def end(self, transfer: Transfer) -> None:
        """Forget an ended transfer and let its source go."""
        source, target = self._ladder.place(transfer.source), self._ladder.place(transfer.target)
        del self.running[transfer.id]
        self._readers[source, target][transfer.source_slots] = 0
        self._ladder.pools[source].unuse(transfer.source_slots)

    def _read(self, source: int, target: int) -> NDArray[np.int32]:
        readers, size = self._readers.get((source, target)), len(self._ladder.pools[source].users)
        if readers is None or len(readers) < size:
            grown = np.zeros(size, np.int32)
            if readers is not None:
                grown[: len(readers)] = readers
            readers = self._readers[source, target] = grown
        return readers

    def _next_id(self) -> int:
        """An id that no running transfer has, and none had for long."""
        self._latest = self._latest % ID_MAX + 1
        while self._latest in self.running:
            self._latest = self._latest % ID_MAX + 1
        return self._latest

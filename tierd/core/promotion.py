"""Promotion: copying up what leases wait for, window by window, so that a prefix may be longer than the tier above.

A window is bounded by a share of the upper tier, and moved in transfers of `TRANSFER_BLOCKS_MAX` blocks, head first, so
that the first blocks can be loaded while the others are on their way. A block that is on its way already is waited for,
not moved again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES
from tierd.core.index import Index
from tierd.core.plan import LOWER, UPPER, Lease, Slots, Transfer, leading, pick
from tierd.core.pool import FILLING, READY, Pool
from tierd.core.room import Room
from tierd.core.transfers import Transfers

TRANSFER_BLOCKS_MAX = 64
WINDOW_BLOCKS_MAX = 1024
"""What keeps every medium busy until the next load; planning more at once would keep everybody else waiting."""


class Promotion:
    """Moves blocks from the lower to the upper tier; `window_share` bounds a window to a share of the upper tier."""

    def __init__(self, index: Index, pools: list[Pool], room: Room, transfers: Transfers, window_share: float) -> None:
        self._index, self._pools, self._room, self._transfers = index, pools, room, transfers
        self._window_share = window_share

    @property
    def window(self) -> int:
        """Blocks that one lease may have on their way up."""
        return max(1, min(WINDOW_BLOCKS_MAX, int(self._pools[UPPER].slots * self._window_share)))

    def start(self, lease: Lease, first: int, reason: str, now: int) -> None:
        """Bring the window of a lease from block `first` up, as far as there is room.

        A block that was lost below meanwhile ends the lease's blocks. A lease without an id is only planned for: prefetch.
        """
        end = min(first + self.window, lease.blocks)
        missing = first + np.flatnonzero((self._above(lease, first, end) < 0) & (lease.lower[first:end] >= 0))
        if not len(missing):  # as always where there is no lower tier
            return
        lost = missing[self._pools[LOWER].state[lease.lower[missing]] != READY]
        if len(lost):
            lease.blocks = int(lost[0])
            missing = missing[missing < lost[0]]
        readers = self._transfers.readers(LOWER, lease.lower[missing])
        coming = np.unique(readers[readers > 0]).tolist() + self._plan(lease, missing[readers == 0], reason, now)
        for transfer in coming if lease.id else ():
            self._transfers.join(transfer, lease)

    def catch_up(self, lease: Lease, first: int, end: int) -> None:
        """Take over the leading blocks of [first, end) that have come up since the lease was made.

        No more than these: what a lease does not hold can make room for what it waits for.
        """
        above = self._above(lease, first, end)
        above = above[: leading(above >= 0)]
        end = first + len(above)
        risen = np.flatnonzero((lease.upper[first:end] < 0) & (lease.lower[first:end] >= 0))
        if len(risen):
            self._hand_over(lease, first + risen, above[risen])

    def coming(self, lease: Lease, block: int) -> int:
        """The transfer that brings a block up that is only below; 0: none."""
        return int(self._transfers.readers(LOWER, lease.lower[block : block + 1])[0])

    def finish(self, transfer: Transfer, good: NDArray[np.bool_]) -> None:
        """Blocks have come up (bool per block): into the tree, and to the leases that wait for them."""
        upper, source, target = self._pools[UPPER], transfer.source_slots, transfer.target_slots
        entered = np.zeros(len(good), np.bool_)
        alive = good & (upper.state[target] == FILLING)
        for at, piece in self._index.runs(transfer.hashes):
            here = piece.node.slots[UPPER, piece.start : piece.start + piece.blocks]
            part = alive[at : at + piece.blocks] & (here < 0)
            if part.any():
                entered[at : at + piece.blocks] = part
                self._index.assign(UPPER, piece, np.where(part, target[at : at + piece.blocks], here))
        upper.ready(target[entered])
        order = np.argsort(source)
        for lease in transfer.leases:
            held = np.flatnonzero(lease.lower >= 0)
            spots = order[np.minimum(np.searchsorted(source, lease.lower[held], sorter=order), len(order) - 1)]
            mine = (source[spots] == lease.lower[held]) & entered[spots]
            self._hand_over(lease, held[mine], target[spots[mine]])
        upper.give(target[~entered])

    def distrust(self, transfer: Transfer, bad: Slots) -> None:
        """What could not be read as it was written is not there any more; its slots are not used again in this life."""
        trimmed = []
        for _, piece in self._index.runs(transfer.hashes):
            offsets = np.flatnonzero(np.isin(piece.node.slots[LOWER], bad))
            if len(offsets):
                self._index.clear(LOWER, piece.node, offsets)
                trimmed.append(piece.node)
        self._pools[LOWER].quarantine(bad)
        self._index.trim(trimmed)
        for lease in transfer.leases:
            lost = np.flatnonzero(np.isin(lease.lower, bad))
            if len(lost):
                lease.blocks = min(lease.blocks, int(lost[0]))

    def _plan(self, lease: Lease, blocks: NDArray[np.intp], reason: str, now: int) -> list[int]:
        """Plan transfers for as many of these blocks as find room."""
        targets = self._room.take(UPPER, len(blocks))
        blocks = blocks[: len(targets)]
        if not len(blocks):
            return []
        hashes, parents = pick(lease.hashes, blocks), pick(lease.parent + lease.hashes[:-HASH_BYTES], blocks)
        self._pools[UPPER].begin(targets, hashes, parents)
        self._pools[UPPER].touched(targets, now)
        ids = []
        for at in range(0, len(blocks), TRANSFER_BLOCKS_MAX):
            part, run = (
                slice(at, at + TRANSFER_BLOCKS_MAX),
                slice(at * HASH_BYTES, (at + TRANSFER_BLOCKS_MAX) * HASH_BYTES),
            )
            sources = lease.lower[blocks[part]]
            ids.append(self._transfers.plan(reason, LOWER, sources, targets[part], hashes[run], parents[run]).id)
        return ids

    def _above(self, lease: Lease, first: int, end: int) -> Slots:
        """Where blocks [first, end) of a lease are in the upper tier, whether it holds them there or not."""
        above: Slots = lease.upper[first:end].copy()
        if len(above) and above.min() < 0:
            for at, (node, start, blocks) in self._index.runs(lease.hashes[first * HASH_BYTES : end * HASH_BYTES]):
                part = above[at : at + blocks]
                np.copyto(part, node.slots[UPPER, start : start + blocks], where=part < 0)
        return above

    def _hand_over(self, lease: Lease, blocks: NDArray[np.intp], slots: Slots) -> None:
        """Let a lease hold upper slots instead of lower ones."""
        self._pools[UPPER].use(slots)
        self._pools[LOWER].unuse(lease.lower[blocks])
        lease.upper[blocks], lease.lower[blocks] = slots, -1

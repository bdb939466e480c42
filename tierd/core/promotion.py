"""Promotion: copying to a session's tier what its leases wait for, window by window, so that a prefix may be longer than
the tier.

A window is bounded by a share of the tier, and moved in transfers of `transfer_blocks` blocks, head first, so that
the first blocks can be loaded while the others are on their way; the last ones of a lease are smaller, so that little is
left to load once all are there. Each block is read from the closest copy that there is; one that is on its way already is
waited for, not moved again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES
from tierd.core.distrust import distrust
from tierd.core.index import Index
from tierd.core.ladder import Ladder
from tierd.core.plan import PREFETCH, Lease, Slots, Transfer, leading, pick
from tierd.core.pool import FILLING
from tierd.core.room import Room
from tierd.core.transfers import Transfers

WINDOW_BLOCKS_MAX = 1024
"""What keeps every medium busy until the next load; planning more at once would keep everybody else waiting."""


class Promotion:
    """Moves blocks into mapped tiers; `window_share` bounds a window to a share of the tier, `transfer_blocks` what
    has come before anybody is told.
    """

    def __init__(
        self, index: Index, ladder: Ladder, room: Room, transfers: Transfers, window_share: float, transfer_blocks: int
    ) -> None:
        self._index, self._ladder, self._pools = index, ladder, ladder.pools
        self._room, self._transfers = room, transfers
        self._window_share, self._transfer_blocks = window_share, transfer_blocks

    def window(self, tier: int) -> int:
        """Blocks that one lease may have on their way to a tier."""
        return max(1, min(WINDOW_BLOCKS_MAX, int(self._pools[tier].slots * self._window_share)))

    def start(self, lease: Lease, first: int, reason: str, now: int) -> None:
        """Bring the window of a lease from block `first` to its tier, as far as there is room.

        What was seen to before is not looked at again, unless the first block is not on its way any more.
        A block that is nowhere any more ends the lease's blocks. A lease without an id is only planned for: prefetch.
        """
        end = min(first + self.window(lease.tier), lease.blocks)
        if first < lease.started and self.coming(lease, first):
            first = lease.started
        if first >= end:
            return
        lease.started = end
        copies, held = self._copies(lease, first, end), lease.slots[:, first:end]
        missing = (copies[lease.tier] < 0) & (held[lease.tier] < 0) & (held.max(0, initial=-1) >= 0)
        if not missing.any():  # as always where there is one tier only
            return
        lost = missing & (copies.max(0) < 0)
        if lost.any():
            lease.blocks = lease.started = first + int(lost.argmax())
            missing[int(lost.argmax()) :] = False
        coming = np.where(missing, self._transfers.arriving(lease.tier, copies), 0)
        self._plan(lease, first, copies, np.flatnonzero(missing & (coming == 0)), reason, now)
        for number in np.unique(coming[coming > 0]).tolist() if lease.id else ():
            transfer = self._transfers.running[number]
            blocks = np.flatnonzero(coming == number)
            source = self._ladder.place(transfer.source)
            self._transfers.join(transfer, lease, first + blocks, copies[source, blocks])

    def catch_up(self, lease: Lease, first: int, end: int) -> None:
        """Take over the leading blocks of [first, end) that have come since the lease was made.

        No more than these: what a lease does not hold can make room for what it waits for.
        """
        here = lease.here[first:end]
        if len(here) and here.min() < 0:
            there = self._copies(lease, first, end)[lease.tier]
            there = there[: leading((there >= 0) | (here >= 0))]
            held = lease.slots[:, first : first + len(there)].max(0, initial=-1) >= 0
            risen = np.flatnonzero((here[: len(there)] < 0) & held)
            self._hand_over(lease, first + risen, there[risen])

    def coming(self, lease: Lease, block: int) -> int:
        """The transfer that brings a block that is not in the lease's tier; 0: none."""
        return int(self._transfers.arriving(lease.tier, self._copies(lease, block, block + 1))[0])

    def finish(self, transfer: Transfer, good: NDArray[np.bool_]) -> None:
        """Blocks have come to a mapped tier (bool per block): into the tree, and to the leases that wait for them."""
        tier, target = self._ladder.place(transfer.target), transfer.target_slots
        pool = self._pools[tier]
        entered = np.zeros(len(good), np.bool_)
        alive = good & (pool.state[target] == FILLING)
        for at, piece in self._index.runs(transfer.hashes):
            here = piece.node.slots[tier, piece.start : piece.start + piece.blocks]
            part = alive[at : at + piece.blocks] & (here < 0)
            if part.any():
                entered[at : at + piece.blocks] = part
                self._index.assign(tier, piece, np.where(part, target[at : at + piece.blocks], here))
        pool.ready(target[entered])
        awaited = np.zeros(len(good), np.bool_)
        for lease, blocks in transfer.waiting.items():
            awaited |= blocks >= 0
            mine = np.flatnonzero(entered & (blocks >= 0))
            held = lease.slots[:, blocks[mine]].max(0, initial=-1) >= 0
            mine = mine[held & (lease.here[blocks[mine]] < 0)]
            self._hand_over(lease, blocks[mine], target[mine])
        if transfer.reason == PREFETCH:
            pool.ahead.came(target, good, entered, awaited)
        pool.give(target[~entered])

    def distrust(self, transfer: Transfer, bad: NDArray[np.bool_]) -> None:
        """What could not be read as it was written is not there any more; its slots are not used again in this life."""
        source, slots = self._ladder.place(transfer.source), transfer.source_slots[bad]
        distrust(self._index, source, self._pools[source], transfer.hashes, slots)
        for lease, blocks in transfer.waiting.items():
            lost = blocks[bad & (blocks >= 0)]
            lost = lost[np.isin(lease.slots[source, lost], slots)]
            if len(lost):
                lease.blocks = min(lease.blocks, int(lost.min()))

    def _plan(self, lease: Lease, first: int, copies: Slots, blocks: NDArray[np.intp], reason: str, now: int) -> None:
        """Plan transfers for as many of these blocks (counted from `first`) as find room, and let the lease have them."""
        tier = lease.tier
        targets = self._room.take(tier, len(blocks))
        if len(targets) < len(blocks):
            lease.started = first + int(blocks[len(targets)])
        blocks = blocks[: len(targets)]
        if not len(blocks):
            return
        hashes, parents = pick(lease.hashes, first + blocks), pick(lease.parent + lease.hashes[:-HASH_BYTES], first + blocks)
        self._pools[tier].begin(targets, hashes, parents)
        self._pools[tier].touched(targets, now)
        near = self._ladder.near[tier]
        sources = near[(copies[near[:, None], blocks] >= 0).argmax(0)]  # the closest: its own tier has none of them
        cuts = np.flatnonzero(np.diff(sources)) + 1
        for run_first, run_end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(blocks)], strict=True):
            source = int(sources[run_first])
            ends = run_end == len(blocks) and first + int(blocks[-1]) + 1 == lease.blocks
            for at, end in pieces(run_first, run_end, self._transfer_blocks, ends):
                run, slots = slice(at * HASH_BYTES, end * HASH_BYTES), copies[source, blocks[at:end]]
                transfer = self._transfers.plan(reason, source, tier, slots, targets[at:end], hashes[run], parents[run])
                if lease.id:
                    transfer.waiting[lease] = first + blocks[at:end]

    def _copies(self, lease: Lease, first: int, end: int) -> Slots:
        """Where blocks [first, end) of a lease are (int32[tiers, n]), whether it holds them there or not."""
        copies = np.full((len(self._pools), max(end - first, 0)), -1, np.int32)
        for at, (node, start, blocks) in self._index.runs(lease.hashes[first * HASH_BYTES : end * HASH_BYTES]):
            copies[:, at : at + blocks] = node.slots[:, start : start + blocks]
        return copies

    def _hand_over(self, lease: Lease, blocks: NDArray[np.intp], slots: Slots) -> None:
        """Let a lease hold slots of its tier instead of copies elsewhere."""
        self._pools[lease.tier].use(slots)
        for tier, pool in enumerate(self._pools):
            held = lease.slots[tier, blocks]
            pool.unuse(held[held >= 0])
        lease.slots[:, blocks] = -1
        lease.here[blocks] = slots


def pieces(first: int, end: int, most: int, tapers: bool) -> Iterator[tuple[int, int]]:
    """The blocks from `first` to `end` in pieces of `most`, whose last, where it `tapers`, is halved down to a quarter."""
    while (left := end - first) > 0:
        size = min(left, most) if left > most or not tapers else min(left, max(-(-most // 4), left // 2))
        yield first, first + size
        first += size

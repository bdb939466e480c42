"""Making room in a tier: which blocks go when slots are wanted, and all that go with a segment.

- Coldest leaf first and from its tail, never a block in use.
- A prefix-closed tier stays so: a block goes only when no block behind it is there.
- For new blocks their ancestors are spared, unless another tier has them too: a chain may be longer than its tier.
"""

from __future__ import annotations

from collections import Counter
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.core.ages import IDLE, LIVED, note_ages
from tierd.core.index import Index, Node
from tierd.core.ladder import Ladder
from tierd.core.plan import Slots, any_true

QUANTUM, QUANTUM_SHARE = 2048, 256
"""Evict at least this many at a time (or a 256th of the tier), so that the cost per block is an array operation's, and so few
that a tier of any size holds nearly all that it could."""


class Room:
    """Takes slots of any tier for new blocks, and counts what had to go: clean (another tier has it) or drop."""

    def __init__(self, index: Index, ladder: Ladder, counters: Counter[tuple[str, ...]], quantum: int = QUANTUM) -> None:
        self._quantum = quantum
        self._index, self._ladder, self._pools, self._counters = index, ladder, ladder.pools, counters

    def take(self, tier: int, count: int, behind: Node | None = None, new: bytes = b"", price: float = 1.0) -> Slots:
        """Up to `count` slots to fill (int32), evicting if need be; fewer only when nothing more may go.

        `behind` is the node that the new blocks will follow: it and its ancestors are spared. With the hashes of what is
        `new`, nothing goes that times `price` its tier's policy finds worth more.
        """
        pool = self._pools[tier]
        if pool.free < count:
            self._evict(tier, max(count - pool.free, min(self._quantum, pool.slots // QUANTUM_SHARE)), behind, new, price)
        return pool.take(count)

    def vacate(self, tier: int, ordinal: int) -> None:
        """Take every block of a segment out of the index, in use or not, and use none of its slots any more."""
        pool = self._pools[tier]
        pool.close_segment(ordinal)
        stack = []
        for node in self._index.orders[tier].coldest():
            inside = np.flatnonzero(node.slots[tier] // pool.slots_per_segment == ordinal)
            if len(inside):
                stack.append((node, inside))
        gone: dict[Node, None] = {}
        while stack:
            node, offsets = stack.pop()
            if tier == self._ladder.closed:  # what is behind would not survive alone
                offsets = np.arange(offsets[0], len(node))
                stack += [(child, np.arange(len(child))) for child in (node.children or {}).values()]
            offsets = offsets[node.slots[tier, offsets] >= 0]
            if len(offsets):
                gone[node] = None
                self._count(tier, len(offsets), int(np.count_nonzero(_elsewhere(node, tier)[offsets])))
                pool.retire(self._index.clear(tier, node, offsets))
        self._index.trim(gone)

    def _evict(self, tier: int, count: int, behind: Node | None, new: bytes, price: float) -> None:
        """Free at least `count` slots, if that many may go."""
        order, latest = self._index.orders[tier], self._index.latest
        path: set[Node] | None = None
        gone: list[Slots] = []
        emptied: list[Node] = []
        trimmed: list[Node] = []
        idle: list[tuple[int, int]] = []
        lived: list[tuple[int, int]] = []
        taken = clean = 0
        for node in order.coldest(new, price):
            if path is None and behind is not None and node.last_use >= behind.last_use:  # as all above `behind` are
                path = set(self._index.path(behind))
            row = node.slots[tier]
            where = self._victims(node, tier, path is not None and node in path)
            slots = row[where]
            if (spare := len(slots) - (count - taken)) > 0:
                where, slots = slice(spare, None) if where is WHOLE else where[spare:], slots[spare:]
            if not len(slots):
                continue
            gone.append(slots.copy())
            idle.append((latest - node.last_use, len(slots)))
            lived.append((latest - node.born, len(slots)))
            kept = int(np.count_nonzero(_elsewhere(node, tier)[where]))
            row[where] = -1
            if kept < len(slots):
                trimmed.append(node)
                if self._index.removed is not None:
                    self._index.removed.note(node.hashes, node.slots, where)
            clean += kept
            taken += len(slots)
            if where is WHOLE or not any_true(row >= 0):
                emptied.append(node)
            if taken >= count:
                break
        for node in emptied:
            order.remove(node)
        self._index.trim(trimmed)
        if gone:
            self._pools[tier].retire(np.concatenate(gone))
            self._count(tier, taken, clean)
            note_ages(self._counters, IDLE, self._ladder.names[tier], idle)
            note_ages(self._counters, LIVED, self._ladder.names[tier], lived)

    def _victims(self, node: Node, tier: int, is_ancestor: bool) -> Any:
        """Which of the node's blocks may go, to index with: their offsets, head first, or mostly just WHOLE."""
        row, users = node.slots[tier], self._pools[tier].users
        is_closed = tier == self._ladder.closed
        if is_closed and (is_ancestor or any(child.slots[tier, 0] >= 0 for child in (node.children or {}).values())):
            return NOTHING
        if not is_ancestor and not any_true(row < 0) and not np.count_nonzero(users.take(row)):
            return WHOLE
        offsets: NDArray[np.intp] = (row >= 0).nonzero()[0]
        busy = users.take(row.take(offsets)) > 0
        if is_closed:
            return offsets[int(np.flatnonzero(busy)[-1]) + 1 :] if any_true(busy) else offsets
        if is_ancestor:
            busy |= ~_elsewhere(node, tier)[offsets]
        return offsets[~busy] if any_true(busy) else offsets

    def _count(self, tier: int, taken: int, clean: int) -> None:
        name = self._ladder.names[tier]
        self._counters["evicted", name, "clean"] += clean
        self._counters["evicted", name, "drop"] += taken - clean


def _elsewhere(node: Node, tier: int) -> NDArray[np.bool_]:
    """Which of a node's blocks have a copy in another tier."""
    others = [row >= 0 for at, row in enumerate(node.slots) if at != tier]
    return reduce(np.logical_or, others) if others else np.zeros(len(node), np.bool_)


WHOLE = slice(None)
NOTHING: NDArray[np.intp] = np.empty(0, np.intp)

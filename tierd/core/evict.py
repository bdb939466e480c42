"""Making room: which blocks of a tier go, coldest leaf first and from its tail."""

from __future__ import annotations

import numpy as np

from tierd.core.index import Index, Node
from tierd.core.pool import Pool, Slots

QUANTUM = 256
"""Evict at least this many at a time (or a 64th of the tier), so that the cost per block is an array operation's."""


def evict(index: Index, pool: Pool, tier: int, count: int, keep: set[Node], closed: bool) -> tuple[int, int]:
    """Free at least `count` slots of a tier if possible, sparing blocks in use and the nodes in `keep`.

    With `closed`, the tier stays prefix-closed: a block goes only when no block behind it is in the tier. Returns how many
    went (clean: another tier still has the block, drop: nowhere now).
    """
    count = max(count, min(QUANTUM, pool.slots // 64))
    gone: list[Slots] = []
    trimmed: list[Node] = []
    taken = clean = 0
    for node in index.orders[tier].coldest():
        if node in keep:
            continue
        offsets = _victims(node, pool, tier, closed)[-(count - taken) :]
        if not len(offsets):
            continue
        gone.append(node.slots[tier, offsets])
        clean += int((node.slots[:, offsets] >= 0).any(0, where=_others(index.tiers, tier)).sum())
        taken += len(offsets)
        node.slots[tier, offsets] = -1
        trimmed.append(node)
        if taken >= count:
            break
    for node in trimmed:
        if node.slots[tier].max() < 0:
            index.orders[tier].remove(node)
    index.trim(trimmed)
    if gone:
        pool.retire(np.concatenate(gone))
    return clean, taken - clean


def evict_slots(index: Index, pool: Pool, tier: int, first: int, last: int) -> tuple[int, int]:
    """Take every block in slots [first, last) of a tier out of the index, in use or not; returns (clean, drop)."""
    trimmed = []
    clean = taken = 0
    for node in list(index.orders[tier].coldest()):
        row = node.slots[tier]
        offsets = np.flatnonzero((row >= first) & (row < last))
        if not len(offsets):
            continue
        slots = row[offsets]
        clean += int((node.slots[:, offsets] >= 0).any(0, where=_others(index.tiers, tier)).sum())
        taken += len(offsets)
        index.clear(tier, node, offsets)
        pool.retire(slots)
        trimmed.append(node)
    index.trim(trimmed)
    return clean, taken - clean


def _victims(node: Node, pool: Pool, tier: int, closed: bool) -> np.ndarray:  # type: ignore[type-arg]
    """Offsets of the node's blocks that may go, head first."""
    row = node.slots[tier]
    offsets = np.flatnonzero(row >= 0)
    busy = pool.users[row[offsets]] > 0
    if not closed:
        return offsets[~busy] if busy.any() else offsets
    if any(child.slots[tier, 0] >= 0 for child in (node.children or {}).values()):
        return offsets[:0]
    return offsets[int(np.flatnonzero(busy)[-1]) + 1 :] if busy.any() else offsets


def _others(tiers: int, tier: int) -> np.ndarray:  # type: ignore[type-arg]
    return (np.arange(tiers) != tier)[:, None]

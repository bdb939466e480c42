"""Rebuilding a namespace's tree from what the directories say.

Input is one row per good slot, per tier. A block is kept when its chain back to the root survives in some tier; of
several copies in one tier the highest generation stays. The work per block is array operations and two list steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES
from tierd.core.cache import Cache
from tierd.core.index import Index, Node
from tierd.core.pool import READY

FOREVER = (1 << 62) - 1
_NOT_HERE, _ROOT = -2, -1


@dataclass
class Rows:
    """READY slots of one tier: slot numbers (int32[n]), packed hashes and parents, generations, last use (ms), uses."""

    slots: NDArray[np.int32]
    hashes: bytes
    parents: bytes
    generations: NDArray[np.uint64]
    last_use: NDArray[np.uint64]
    uses: NDArray[np.uint32]


@dataclass
class Recovered:
    """How many copies were kept, and how many freed: duplicates of a higher generation, orphans of a broken chain."""

    kept: int = 0
    duplicates: int = 0
    orphans: int = 0


def recover(cache: Cache, tiers: list[Rows], now: int = FOREVER) -> Recovered:
    """Fill an empty cache whose pools have their segments (all free) from the rows of its tiers.

    What is in no tier below is queued for write-back again. Slots that are not kept are freed in the directories;
    those that carry holder bits must be restored to their sessions before anything else is asked of the cache. No use is
    later than `now` (ms): recency is outside the rows' crc.
    """
    assert not cache.index.blocks and len(tiers) == len(cache.pools), "recovery fills an empty cache"
    blocks = _Blocks(tiers, now)
    reached = _grow(cache.index, blocks)
    result = Recovered()
    for tier, rows in enumerate(tiers):
        pool = cache.pools[tier]
        chosen = blocks.slots[tier, reached]
        chosen = chosen[chosen >= 0]
        pool.claim(chosen, READY)
        lost = rows.slots[pool.state[rows.slots] != READY]
        for ordinal, local, _ in pool.by_segment(lost):
            pool.segments[ordinal].free(local)
        twice = len(rows.slots) - int((blocks.slots[tier] >= 0).sum())
        result.kept += len(chosen)
        result.duplicates += twice
        result.orphans += len(lost) - twice
    cache.write_back.push_all()
    return result


class _Blocks:
    """The distinct blocks of all tiers: arrays by block number, and the shape of their tree.

    `slots` is int32[tiers, n]; `parent` the number of the parent or a constant; the children of a block are
    `order[start[block + 1] : start[block + 2]]`, the root being block -1; `only_child` is one of them or -1.
    """

    def __init__(self, tiers: list[Rows], now: int) -> None:
        hashes = np.frombuffer(b"".join(rows.hashes for rows in tiers), np.uint64).reshape(-1, HASH_BYTES // 8)
        parents = np.frombuffer(b"".join(rows.parents for rows in tiers), np.uint64).reshape(-1, HASH_BYTES // 8)
        order, number = _ranked(hashes)
        self.count = int(number.max(initial=-1)) + 1
        first = np.empty(self.count, np.int64)
        first[number[order]] = order
        self.hashes = hashes[first]
        self.slots = np.full((len(tiers), self.count), -1, np.int32)
        self.last_use = np.zeros(self.count, np.int64)
        self.uses = np.zeros(self.count, np.int64)
        at = 0
        for tier, rows in enumerate(tiers):
            rising = np.argsort(rows.generations, kind="stable")  # the last write wins: the highest generation
            mine = number[at : at + len(rows.slots)]
            self.slots[tier, mine[rising]] = rows.slots[rising]
            last_use = np.minimum(rows.last_use, np.uint64(now)).astype(np.int64)
            np.maximum.at(self.last_use, mine, last_use)
            np.maximum.at(self.uses, mine, rows.uses.astype(np.int64))
            at += len(rows.slots)
        self.parent = self._find(parents[first])
        self.order = np.argsort(self.parent, kind="stable")
        self.start = np.searchsorted(self.parent[self.order], np.arange(_ROOT, self.count + 1))
        has_one = np.diff(self.start[1:]) == 1
        self.only_child = np.full(self.count, -1)
        self.only_child[has_one] = self.order[self.start[1:-1][has_one]]

    def _find(self, wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Block number of each hash, or a constant: the root, not here."""
        _, number = _ranked(np.concatenate((self.hashes, wanted)))
        block_of = np.full(int(number.max(initial=-1)) + 1, _NOT_HERE)
        block_of[number[: self.count]] = np.arange(self.count)
        found = block_of[number[self.count :]]
        found[(wanted == 0).all(1)] = _ROOT
        return found


def _ranked(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """An order that brings equal hashes (uint64[n, 4]) together, and a number for each that equal ones share."""
    order = np.argsort(hashes[:, 0], kind="stable")
    new = _differs(hashes[order])
    if (new & ~_differs(hashes[order, :1])).any():  # equal first words are no accident, but no reason to fail either
        order = np.lexsort(hashes.T)
        new = _differs(hashes[order])
    number = np.empty(len(order), np.int64)
    number[order] = np.cumsum(new) - 1
    return order, number


def _differs(ranked: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which rows differ from the one before."""
    new = np.ones(len(ranked), np.bool_)
    new[1:] = (ranked[1:] != ranked[:-1]).any(1)
    return new


def _grow(index: Index, blocks: _Blocks) -> NDArray[np.int64]:
    """Hang every reachable block into the tree, run by run; returns the numbers of those blocks.

    A block may not be hotter than its parent: the tree's order of eviction starts with the tails.
    """
    arrays = (blocks.order, blocks.start, blocks.only_child, blocks.last_use, blocks.uses)
    order, start, only_child, last_use, uses = (array.tolist() for array in arrays)
    index.table.enlarge(blocks.count)
    reached: list[int] = []
    nodes: list[Node] = []
    stack = [(index.root, block) for block in order[start[0] : start[1]]]
    while stack:
        above, block = stack.pop()
        used = min(last_use[block], above.last_use) if above is not index.root else last_use[block]
        run = [block]
        while (child := only_child[block]) >= 0 and last_use[child] >= used:
            run.append(child)
            block = child
        node = index.attach(above, blocks.hashes[run].tobytes(), blocks.slots[:, run], used, uses[run[0]])
        nodes.append(node)
        reached += run
        stack.extend((node, child) for child in order[start[block + 1] : start[block + 2]])
    nodes.reverse()  # descendants before their ancestors, also where they were used at the same time
    index.arrange(sorted(nodes, key=lambda node: node.last_use))
    return np.array(reached, np.int64)

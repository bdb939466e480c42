"""Rebuilding a namespace's tree from what the directories say.

Input is one row per good slot, per tier. A block is kept when its chain back to the root survives in some tier; of
several copies in one tier the highest generation stays. The work per block is array operations and one list step; a
million blocks take about two seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES
from tierd.core.cache import Cache
from tierd.core.index import Node
from tierd.core.pool import READY


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
    """How many copies were kept, and how many freed because another one had a higher generation or their chain is
    broken.
    """

    kept: int = 0
    duplicates: int = 0
    orphans: int = 0


def recover(cache: Cache, tiers: list[Rows]) -> Recovered:
    """Fill an empty cache whose pools have their segments (all free) from the rows of its tiers."""
    assert not cache.index.blocks, "recovery fills an empty cache"
    blocks = _Blocks(tiers)
    reached = _grow(cache, blocks)
    result = Recovered()
    for tier, rows in enumerate(tiers):
        pool = cache.pools[tier]
        chosen = blocks.slots[tier, reached]
        chosen = chosen[chosen >= 0]
        pool.claim(chosen, READY)
        lost = np.setdiff1d(rows.slots, chosen)
        for ordinal, local, _ in pool.by_segment(lost):
            pool.segments[ordinal].free(local)
        twice = len(rows.slots) - int((blocks.slots[tier] >= 0).sum())
        result.kept += len(chosen)
        result.duplicates += twice
        result.orphans += len(lost) - twice
    return result


class _Blocks:
    """The distinct blocks of all tiers: arrays by block number, and the shape of their tree."""

    def __init__(self, tiers: list[Rows]) -> None:
        hashes = np.frombuffer(b"".join(rows.hashes for rows in tiers), np.uint64).reshape(-1, 4)
        parents = np.frombuffer(b"".join(rows.parents for rows in tiers), np.uint64).reshape(-1, 4)
        generations = np.concatenate([rows.generations for rows in tiers])
        order = np.lexsort((generations, *hashes.T))
        same = np.zeros(len(order), bool)
        same[1:] = (hashes[order][1:] == hashes[order][:-1]).all(1)
        number = np.empty(len(order), np.int64)
        number[order] = np.cumsum(~same) - 1  # row -> block
        first = order[~same]
        self.count = len(first)
        self.hashes = hashes[first]
        self.slots = np.full((len(tiers), self.count), -1, np.int32)
        self.last_use = np.zeros(self.count, np.int64)
        self.uses = np.zeros(self.count, np.int64)
        at = 0
        for tier, rows in enumerate(tiers):
            mine = number[at : at + len(rows.slots)]
            rising = np.argsort(rows.generations, kind="stable")  # the last write wins: the highest generation
            self.slots[tier, mine[rising]] = rows.slots[rising]
            np.maximum.at(self.last_use, mine, rows.last_use.astype(np.int64))
            np.maximum.at(self.uses, mine, rows.uses.astype(np.int64))
            at += len(rows.slots)
        self.parent = self._find(parents[first])
        self.children = self._children()

    def _find(self, wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Block number of each hash: -1 the root, -2 not here."""
        order = np.argsort(self.hashes[:, 0], kind="stable")
        at = np.searchsorted(self.hashes[order, 0], wanted[:, 0]) if self.count else np.zeros(0, np.int64)
        found = np.full(len(wanted), -2, np.int64)
        for step in range(4):  # equal first words are all but impossible; a few steps cover them
            spot = order[np.minimum(at + step, self.count - 1)] if self.count else at
            match = (self.hashes[spot] == wanted).all(1)
            found[match] = spot[match]
        found[(wanted == 0).all(1)] = -1
        return found

    def _children(self) -> dict[int, list[int]]:
        order = np.argsort(self.parent, kind="stable")
        parents = self.parent[order]
        cuts = np.flatnonzero(np.diff(parents, prepend=-3))
        groups = np.split(order, cuts[1:]) if len(cuts) else []
        return {int(self.parent[group[0]]): group.tolist() for group in groups}


def _grow(cache: Cache, blocks: _Blocks) -> NDArray[np.int64]:
    """Hang every reachable block into the tree, run by run; returns the numbers of those blocks."""
    index, children = cache.index, blocks.children
    last_use, uses = blocks.last_use.tolist(), blocks.uses.tolist()
    reached: list[int] = []
    depth: dict[Node, int] = {}
    stack: list[tuple[Node, int]] = [(index.root, block) for block in children.get(-1, [])]
    while stack:
        above, block = stack.pop()
        run = [block]
        below = children.get(block, [])
        while len(below) == 1 and last_use[below[0]] == last_use[block]:
            block = below[0]
            run.append(block)
            below = children.get(block, [])
        used = min(last_use[block], above.last_use) if above.parent is not None else last_use[block]
        hashes = blocks.hashes[run].tobytes()
        node = index.extend(above, hashes, blocks.slots[:, run], used)
        if node is not above:
            node.uses = uses[run[0]]
        depth[node] = depth.get(above, 0) + len(hashes) // HASH_BYTES
        reached += run
        stack.extend((node, child) for child in below)
    for node in sorted(depth, key=lambda node: (node.last_use, -depth[node])):
        for order in index.orders:
            if node in order:
                order.touch(node)
    return np.array(reached, np.int64)

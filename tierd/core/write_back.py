"""Write-back: copying down what was committed, oldest first and head first.

The lower tier survives alone, so a block enters it only when its parent is there. A run that is queued is looked up
again when its turn comes: what is still in memory is written behind the last block that is below or on its way there,
and takes ancestors along that were never written. Transfers of one chain may be under way together, but they are
entered in the order of the chain.
"""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES, ROOT
from tierd.core.index import Index, Node, Piece
from tierd.core.plan import LOWER, UPPER, WRITE_BACK, Transfer
from tierd.core.pool import FILLING, Pool
from tierd.core.room import Room
from tierd.core.transfers import Transfers

TURNS = 4
"""The queue remembers as many blocks as fit into the upper tier this many times: older ones are hardly in memory still.
"""

RUN_BYTES_MAX = 1024 * HASH_BYTES
"""A run that long is not joined with more: it is matched again for each part of it that is planned."""


class WriteBack:
    """Queue of runs (parent, packed hashes) that go to the lower tier; does nothing unless `enabled`."""

    def __init__(
        self,
        index: Index,
        pools: list[Pool],
        room: Room,
        transfers: Transfers,
        counters: Counter[tuple[str, ...]],
        enabled: bool,
    ) -> None:
        self._index, self._pools, self._room, self._transfers = index, pools, room, transfers
        self._counters, self._enabled = counters, enabled
        self.queue: deque[tuple[bytes, bytes]] = deque()
        self.blocks = 0
        """Blocks of the runs in the queue."""

    def push(self, parent: bytes, hashes: bytes) -> None:
        """Queue a run, joined to the last one if it goes on there; the oldest ones go when the queue is full, and are
        counted.
        """
        if not self._enabled:
            return
        self.blocks += len(hashes) // HASH_BYTES
        if self.queue and self.queue[-1][1].endswith(parent) and len(self.queue[-1][1]) < RUN_BYTES_MAX:
            parent, head = self.queue.pop()
            hashes = head + hashes
        self.queue.append((parent, hashes))
        while self.blocks > TURNS * self._pools[UPPER].slots and len(self.queue) > 1:
            self._pop()
            self._counters["write_back_dropped",] += 1

    def push_all(self) -> None:
        """Queue all that is only above, coldest first (after recovery)."""
        for node in self._index.orders[UPPER].coldest() if self._enabled else ():
            if ((node.slots[UPPER] >= 0) & (node.slots[LOWER] < 0)).any():
                assert node.parent is not None
                self.push(node.parent.last_hash, node.hashes)

    def plan(self, blocks_max: int) -> bool:
        """Plan one transfer of at most `blocks_max` blocks; False when nothing can be planned now."""
        while self.queue and self._pools[LOWER].slots:
            if self._plan(*self._pop(), blocks_max):
                return True
        return False

    def finish(self, transfer: Transfer, good: NDArray[np.bool_], now: int) -> None:
        """Blocks have been written (bool per block): into the tree, up to the first that failed or lost its parent."""
        pool, target = self._pools[LOWER], transfer.target_slots
        entered = np.zeros(len(good), np.bool_)
        good = good & (pool.state[target] == FILLING)
        end = len(good) if good.all() else int(good.argmin())
        at = 0
        for node, start, count in self._places(transfer):
            here = node.slots[LOWER, start : start + min(count, end - at)]
            part = here < 0
            if part.any():
                entered[at : at + len(here)] = part
                rows = np.where(part, target[at : at + len(here)], here)
                self._index.assign(LOWER, Piece(node, start, len(here)), rows)
            at += len(here)
        pool.enter(target[entered])
        pool.touched(target[entered], now)
        pool.give(target[~entered])

    def _plan(self, parent: bytes, hashes: bytes, blocks_max: int) -> bool:
        """Plan the first part of a run that is neither below nor on its way there; the rest goes back to the queue."""
        pieces = self._index.match(hashes, parent)
        if not pieces:
            return False
        path = self._unsettled(pieces[-1].node)
        upper, lower = np.concatenate([node.slots for node in path], axis=1)[:, : sum(map(len, path[:-1])) + pieces[-1].end]
        writers = np.where(upper >= 0, self._transfers.readers(UPPER, upper), 0)
        todo = (lower < 0) & (writers == 0)
        if not todo.any():
            return False
        first = int(todo.argmax())
        writable = (todo & (upper >= 0))[first : first + blocks_max]
        count = len(writable) if writable.all() else int(writable.argmin())
        if not count:
            self._counters["write_back_orphans",] += int((todo & (upper >= 0)).sum())
            return False
        targets = self._room.take(LOWER, count, behind=path[-1])
        if not len(targets):
            self._counters["write_back_short",] += count
            return False
        end = first + len(targets)
        if todo[end:].any():
            self.queue.appendleft((parent, hashes))
            self.blocks += len(hashes) // HASH_BYTES
        chain = ROOT + b"".join([node.hashes for node in path])  # a path without a block below starts at the root
        run, parents = (
            chain[(first + 1) * HASH_BYTES : (end + 1) * HASH_BYTES],
            chain[first * HASH_BYTES : end * HASH_BYTES],
        )
        transfer = self._transfers.plan(WRITE_BACK, UPPER, upper[first:end], targets, run, parents)
        transfer.behind = int(writers[first - 1]) if first and lower[first - 1] < 0 else 0
        return True

    def _unsettled(self, node: Node) -> list[Node]:
        """The node and its ancestors, up to the nearest that starts below: with it all above are below."""
        path = []
        for member in self._index.path(node):
            path.append(member)
            if member.slots[LOWER, 0] >= 0:
                break
        return path[::-1]

    def _places(self, transfer: Transfer) -> list[Piece]:
        """Where the blocks of a transfer are in the tree; nowhere when the first one's parent is not below any more."""
        parent = transfer.parents[:HASH_BYTES]
        entry = self._index.find(parent) if parent != ROOT else None
        if parent != ROOT and (entry is None or entry[0].slots[LOWER, entry[1]] < 0):
            return []
        return self._index.match(transfer.hashes, parent) or []

    def _pop(self) -> tuple[bytes, bytes]:
        parent, hashes = self.queue.popleft()
        self.blocks -= len(hashes) // HASH_BYTES
        return parent, hashes

"""One tier under a trace: the daemon's own index, slots and eviction, without segments, sessions or bytes of blocks."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tierd.bench.churn import Nowhere
from tierd.block import HASH_BYTES
from tierd.core.index import Index
from tierd.core.ladder import Ladder
from tierd.core.policies import make_policy
from tierd.core.pool import Pool
from tierd.core.room import Room

CPU = 0


class Shelf:
    """A tier of `slots` slots under one policy. `quantum` is how many blocks go at least when some have to go.

    `written` counts blocks that entered the tier, `evicted` those that left it, `dead` those of them that nobody had
    read since they entered.
    """

    def __init__(self, slots: int, policy: str, quantum: int = 1) -> None:
        self.pool = Pool(slots)
        self.pool.add_segment(Nowhere(slots), 0)
        self.index = Index(1, orders=[make_policy(policy, lambda: slots)])
        self._room = Room(self.index, Ladder({"cpu": self.pool}), Counter(), quantum)
        self._unread = np.zeros(slots, np.bool_)
        self.written = self.dead = 0

    @property
    def evicted(self) -> int:
        """Blocks that entered the tier and are not there any more."""
        return self.written - (self.pool.slots - self.pool.free)

    def request(self, hashes: bytes, now: int) -> int:
        """A prompt comes: the blocks that are here are read, what is new is entered as far as the policy and the room
        allow; returns how many leading blocks were here.
        """
        index, total = self.index, len(hashes) // HASH_BYTES
        pieces = index.match(hashes) or []
        known = sum([piece.blocks for piece in pieces])
        pieces = index.touch(pieces, now, hashes[known * HASH_BYTES :])
        for node, start, blocks in pieces:
            self._unread[node.slots[CPU, start : start + blocks]] = False
        if known < total:
            node = pieces[-1].node if pieces else index.root
            rest = hashes[known * HASH_BYTES :]
            slots = self._room.take(CPU, total - known, node, rest)
            if count := len(slots):
                self.pool.enter(slots)
                self.dead += int(np.count_nonzero(self._unread[slots]))
                self._unread[slots] = True
                self.written += count
                index.extend(node, rest[: count * HASH_BYTES], slots[None], now)
        return known

    def turn_ended(self, hashes: bytes, stop: str | None) -> None:
        """The engine says why the turn ended that began with these blocks."""
        pieces = self.index.match(hashes) or []
        known = sum([piece.blocks for piece in pieces])
        path = self.index.path(pieces[-1].node) if pieces else []
        self.index.orders[CPU].hinted(path, hashes[known * HASH_BYTES :], stop)

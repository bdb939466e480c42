"""A trace's requests, asked of the daemon's own cache as an engine asks them: lookup, load, store, commit, then write-back.

Segments, sockets and bytes of blocks are left out, and every transfer ends well before the next request comes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tierd.bench.churn import Nowhere
from tierd.block import HASH_BYTES, ROOT
from tierd.core.cache import Cache
from tierd.core.ladder import CLOSED
from tierd.core.plan import Slots, Wait
from tierd.core.pool import Pool
from tierd.errors import Busy, Gone

SESSION = 1


class House:
    """A cache with tiers of so many `slots`, by name, and one engine in its cpu tier.

    All counters are by tier: `hits` (a promoted block counts where it was found), `written` blocks that came in, and `dead`
    those of them that left again before anybody had read them.
    """

    def __init__(self, slots: Mapping[str, int], policies: Mapping[str, str], admission: str = "everything") -> None:
        pools = {tier: Pool(number) for tier, number in slots.items()}
        for pool in pools.values():
            pool.add_segment(Nowhere(pool.slots_per_segment), 0)
        self.cache = Cache(pools, policies=policies, admission=admission)
        self.index = self.cache.index
        self._tier = self.cache.ladder.place("cpu")
        self.cache.open_session(SESSION, 0, self._tier)
        self._unread: list[NDArray[np.bool_]] = [np.zeros(pool.slots, np.bool_) for pool in self.cache.pools]
        self.hits: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.dead: Counter[str] = Counter()

    @property
    def operations(self) -> int:
        """Blocks that entered a tier, and that left one."""
        held = sum(pool.slots - pool.free for pool in self.cache.pools)
        return 2 * sum(self.written.values()) - held

    def request(self, hashes: bytes, now: int) -> int:
        """A prompt comes: what is in any tier is read, what is new is stored as far as the cache lets it in; returns how many
        leading blocks were read.
        """
        found = self.cache.lookup(SESSION, hashes, ROOT, now)
        at = self._read(found.lease, found.slots, found.blocks, now) if found.lease else 0
        left = at
        for tier in self.cache.ladder.names:  # what was found and could not be read was furthest down
            self.hits[tier] += (number := min(found.tiers[tier], left))
            left -= number
        if at * HASH_BYTES < len(hashes):
            self._store(hashes[at * HASH_BYTES :], hashes[(at - 1) * HASH_BYTES : at * HASH_BYTES] if at else ROOT, now)
        self.write_back(now)
        return at

    def write_back(self, now: int) -> None:
        """Write down all that waits for it."""
        for target in self.cache.write_back.queues:
            while self.cache.plan_write_back(target, self.cache.write_back.piece(target)):
                self._move(now)

    def turn_ended(self, hashes: bytes, stop: str | None) -> None:
        """The engine says why the turn ended that began with these blocks."""
        pieces = self.index.match(hashes) or []
        known = sum([piece.blocks for piece in pieces])
        path = list(self.index.path(pieces[-1].node)) if pieces else []
        for order in self.index.orders:
            order.hinted(path, hashes[known * HASH_BYTES :], stop)

    def _read(self, lease: int, told: Slots, blocks: int, now: int) -> int:
        """Read a lease from its beginning, letting go of each part; returns how many blocks could be had."""
        cache, at, slots = self.cache, 0, told
        while True:
            self._unread[self._tier][slots] = False
            at += len(slots)
            if at == blocks:
                break
            if len(slots):
                cache.release(SESSION, lease, at - len(slots), len(slots))
            try:
                while isinstance(answer := cache.load(SESSION, lease, at, blocks - at, now), Wait):
                    self._move(now)
            except (Busy, Gone):
                break
            slots = answer
        cache.release(SESSION, lease)
        self._move(now)
        return at

    def _store(self, hashes: bytes, parent: bytes, now: int) -> None:
        placed = self.cache.store(SESSION, hashes, parent, now)
        if placed.lease:
            self._enter(self._tier, placed.slots[placed.slots >= 0])
            self.cache.commit(SESSION, placed.lease, None, now)

    def _move(self, now: int) -> None:
        """Let every transfer end that was planned."""
        self.cache.hastened.clear()
        while self.cache.planned:
            transfer = self.cache.planned.pop(0)
            place = self.cache.ladder.place
            self._unread[place(transfer.source)][transfer.source_slots] &= transfer.target == CLOSED
            self._enter(place(transfer.target), transfer.target_slots)
            self.cache.finish(transfer, np.zeros(len(transfer), np.uint8), now)

    def _enter(self, tier: int, slots: Slots) -> None:
        """Blocks come to slots whose blocks before them are gone, read or not."""
        name, unread = self.cache.ladder.names[tier], self._unread[tier]
        self.dead[name] += int(np.count_nonzero(unread[slots]))
        unread[slots] = True
        self.written[name] += len(slots)

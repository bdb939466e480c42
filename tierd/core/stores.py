"""Stores: slots that sessions fill under writing leases, from the first asking to what the tree says in the end.

A block that is being written is pending: nobody else is given a slot for it, and nobody sees it. Its lease ends by a commit,
which publishes what was filled, or by an abort, which gives the slots back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from tierd.block import HASH_BYTES, ROOT
from tierd.core.index import Index, Piece
from tierd.core.ladder import Ladder
from tierd.core.plan import NO_ROOM, PENDING, STORED, Committed, Lease, Placed, names, nothing, pick
from tierd.core.pool import FILLING, Pool
from tierd.core.publish import parent_piece, positions, publish
from tierd.core.room import Room
from tierd.core.session import Session
from tierd.core.write_back import WriteBack
from tierd.errors import Gone, Invalid


class Stores:
    """What sessions of one namespace are writing. `ids` numbers leases, also those that are not made here."""

    def __init__(
        self,
        index: Index,
        ladder: Ladder,
        room: Room,
        write_back: WriteBack,
        counters: Counter[tuple[str, ...]],
        ids: Iterator[int],
    ) -> None:
        self._index, self._ladder, self._room, self._write_back = index, ladder, room, write_back
        self._counters, self._ids = counters, ids
        self.pending: dict[bytes, Lease] = {}
        """Blocks that are being written, with the leases under which they are."""

    def store(self, session: Session, hashes: bytes, parent: bytes, now: int) -> Placed:
        """Slots for the blocks that are new; raises Gone when the parent is unknown.

        A parent that is still being written will do; it has to be committed before them.
        """
        pieces = self._index.match(hashes, parent)
        if pieces is None:
            if parent not in self.pending:
                raise Gone("store: the parent of the first block is not known here; store the chain from its root")
            pieces = []
        codes = np.full(len(hashes) // HASH_BYTES, NO_ROOM, np.int32)
        for at, piece in positions(pieces):
            stored = (piece.node.slots[:, piece.start : piece.end] >= 0).any(0)
            codes[at : at + piece.blocks][stored] = STORED
        wanted = np.flatnonzero(codes == NO_ROOM)
        new = set(names(pick(hashes, wanted)))
        if len(new) < len(wanted) or ROOT in new:
            raise Invalid("store: a block hash is there twice, or is all zeros; hashes must be chained over their parents")
        if not self.pending.keys().isdisjoint(new):
            pending = np.array([block in self.pending for block in names(pick(hashes, wanted))], np.bool_)
            codes[wanted[pending]] = PENDING
            wanted = wanted[~pending]
        anchor = self._index.touch(pieces or self._parent_piece(parent), now)
        new_to_all = pick(hashes, wanted) if self._is_last(session.tier) else b""
        taken = self._room.take(session.tier, len(wanted), anchor[-1].node if anchor else None, new_to_all)
        if len(taken) < len(wanted):
            self._counters["store_short",] += 1
        if not len(taken):
            return Placed(0, codes)
        wanted = wanted[: len(taken)]
        codes[wanted] = taken
        run = pick(hashes, wanted)
        session.pool.begin(taken, run, pick(parent + hashes[:-HASH_BYTES], wanted))
        session.pool.touched(taken, now)
        rows = np.full((len(self._ladder), len(taken)), -1, np.int32)
        rows[session.tier] = taken
        everything = np.ones(len(taken), np.bool_)
        lease = Lease(next(self._ids), session.id, session.tier, parent, hashes, rows, len(taken), everything, wanted)
        session.leases[lease.id] = lease
        session.tell(taken)
        self.pending.update(dict.fromkeys(names(run), lease))
        return Placed(lease.id, codes)

    def commit(self, session: Session, lease_id: int, count: int | None, now: int) -> Committed:
        """Publish the first `count` blocks of a writing lease (default: all) and end it; the others are aborted."""
        lease = session.lease(lease_id, writing=True)
        count = lease.blocks if count is None else count
        if not 0 <= count <= lease.blocks:
            raise Invalid(f"commit: {count} blocks of a lease of {lease.blocks}")
        self._end(session, lease)
        if count < lease.blocks:
            session.pool.give(lease.here[count:])
        dropped = self._publish(session.pool, lease, count, now)
        return Committed(count - dropped, dropped)

    def abort(self, session: Session, lease: Lease) -> None:
        """End a writing lease, and give all of its slots back."""
        self._end(session, lease)
        session.pool.give(lease.here)

    def leading(self, hashes: bytes, first: int) -> int:
        """How many blocks from `first` on are being written, one behind the other."""
        at = first * HASH_BYTES
        while self.pending and hashes[at : at + HASH_BYTES] in self.pending:
            at += HASH_BYTES
        return at // HASH_BYTES - first

    def check(self, leases: list[Lease]) -> None:
        """Raise AssertionError if what is pending is not what these leases, all that there are, fill."""
        filled = [block for lease in leases for block in names(lease.filled())]
        assert sorted(filled) == sorted(self.pending), "pending blocks are not those of the writing leases"

    def _publish(self, pool: Pool, lease: Lease, count: int, now: int) -> int:
        """Enter the first `count` filled slots of a lease into the tree; returns how many have no place there."""
        assert lease.positions is not None
        slots, at = lease.here[:count], lease.positions[:count]
        total = int(at[-1]) + 1 if count else 0
        hashes = lease.hashes[: total * HASH_BYTES]
        alive = pool.state[slots] == FILLING  # the others are in a segment that is being given up
        offered = nothing(total)
        offered[at[alive]] = slots[alive]
        placed = publish(self._index, lease.tier, lease.parent, hashes, offered, now) if count else None
        if placed is None:
            pool.give(slots)
            self._counters["commit_orphans",] += count
            return count
        entered = placed[at] == slots
        pool.ready(slots[entered])
        self._write_back.offer(lease.tier, lease.parent, hashes)
        if entered.all():
            return 0
        pool.give(slots[~entered])
        if dropped := int(((placed[at] < 0) | ~alive).sum()):
            self._counters["commit_misplaced",] += dropped
        return dropped

    def _end(self, session: Session, lease: Lease) -> None:
        del session.leases[lease.id]
        for block in names(lease.filled()):
            del self.pending[block]
        session.untell(lease.here)

    def _is_last(self, tier: int) -> bool:
        """Whether what this tier turns away is lost: of a tier that feeds one below, it is that one's to choose."""
        return self._ladder.below(tier) not in self._write_back.queues

    def _parent_piece(self, parent: bytes) -> list[Piece]:
        """The parent of a chain that is new here, as the end of a path to touch; of one that is being written, what is
        known of the way to it.
        """
        while lease := self.pending.get(parent):
            end = names(lease.hashes).index(parent) + 1  # what is behind it, the tree may know too
            if pieces := self._index.match(lease.hashes[: end * HASH_BYTES], lease.parent):
                return pieces
            parent = lease.parent
        return parent_piece(self._index, parent)

"""The cache of one namespace: every decision about its blocks, and nothing else.

Plain functions of the state, the request and the time: no await, no clock, no bytes of blocks. What has to be moved is
put on `planned` for the caller to execute; each transfer ends in `finish`. The two tiers are the mapped one (`upper`:
clients copy from and to its slots) and, optionally, nvme (`lower`).

- A lookup leases the longest prefix that is resident in any tier, and starts to promote the first window of what is
  only below.
- A store leases slots for what is new; nobody sees a block before its commit.
- A slot named to a session has the session's holder bit set first, and loses it by release, commit, abort, or the
  session's end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from itertools import count as counter

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES, ROOT
from tierd.core.audit import audit
from tierd.core.index import Index, Piece
from tierd.core.plan import (
    DEMAND,
    IO_ERROR,
    LOWER,
    MISMATCH,
    NO_ROOM,
    OK,
    PENDING,
    PREFETCH,
    STORED,
    UPPER,
    WRITE_BACK,
    Committed,
    Found,
    Lease,
    Placed,
    Slots,
    Transfer,
    Wait,
    leading,
    names,
    nothing,
    pick,
)
from tierd.core.pool import FILLING, Pool
from tierd.core.promotion import Promotion
from tierd.core.room import Room
from tierd.core.session import Session
from tierd.core.transfers import Transfers
from tierd.core.write_back import WriteBack
from tierd.errors import Busy, Gone, Invalid


class Cache:
    """One namespace. `lower` is None without an nvme tier; `window_share` bounds one promotion to a share of the upper
    tier; `seed` (secret, 64 bits) keeps clients from aiming at the index's hash table.
    """

    def __init__(
        self, upper: Pool, lower: Pool | None, *, window_share: float = 0.25, write_back: bool = True, seed: int = 0
    ) -> None:
        self.pools = [upper] if lower is None else [upper, lower]
        self.upper, self.lower = upper, lower
        self.index = Index(len(self.pools), seed)
        self.sessions: dict[int, Session] = {}
        self.counters: Counter[tuple[str, ...]] = Counter()
        self._room = Room(self.index, self.pools, self.counters)
        self._transfers = Transfers(self.pools)
        self._promotion = Promotion(self.index, self.pools, self._room, self._transfers, window_share)
        self.write_back = WriteBack(
            self.index, self.pools, self._room, self._transfers, self.counters, write_back and lower is not None
        )
        self._pending: dict[bytes, Lease] = {}
        """Blocks that are being written, with the leases under which they are."""
        self._ids = counter(1)

    @property
    def planned(self) -> list[Transfer]:
        """Transfers decided but not yet taken by the mover, which takes them out."""
        return self._transfers.planned

    @property
    def transfers(self) -> dict[int, Transfer]:
        """All transfers that have not ended, by id."""
        return self._transfers.running

    # -- sessions -----------------------------------------------------------------------------------------------------

    def open_session(self, session_id: int, bit: int) -> Session:
        """Enter a client; `bit` is its bit in the holders column."""
        assert session_id not in self.sessions
        session = self.sessions[session_id] = Session(session_id, bit, self.pools)
        return session

    def close_session(self, session_id: int) -> None:
        """The client is gone: everything it held is free at once."""
        session = self.sessions.pop(session_id)
        for lease in list(session.leases.values()):
            self._end_lease(session, lease)
        session.forget_restored()

    def restore_session(self, session_id: int, bit: int, slots: Slots) -> None:
        """Recovery found `slots` with this holder bit: they wait until the session resumes or its process is gone."""
        self.open_session(session_id, bit).restore(slots)

    def resume(self, session_id: int, held: Slots) -> int:
        """A client says which slots it still copies from or to; all else that it was told is free. Returns a lease on
        them or 0.
        """
        session = self.sessions[session_id]
        kept = np.unique(held)
        mine = np.union1d(session.restored, np.flatnonzero(session.told))
        if len(strangers := np.setdiff1d(kept, mine)):
            raise Invalid(f"resume: slot {strangers[0]} was never told to this session; say only what it was told")
        old = list(session.leases.values())
        lease_id = 0
        if len(kept):  # told again before the old leases let go, so that the bits never clear
            everything = np.ones(len(kept), np.bool_)
            lease = Lease(next(self._ids), session_id, ROOT, b"", kept, nothing(len(kept)), len(kept), everything)
            self.upper.use(kept)
            session.tell(kept)
            session.leases[lease.id] = lease
            lease_id = lease.id
        for held_before in old:
            self._end_lease(session, held_before)
        session.forget_restored()
        return lease_id

    # -- lookup, load, release ----------------------------------------------------------------------------------------

    def lookup(self, session_id: int, hashes: bytes, parent: bytes, now: int) -> Found:
        """Lease the longest prefix of `hashes` behind `parent` that can be had; starts the promotion of its first
        window.
        """
        session = self.sessions[session_id]
        slots, pieces = self._resident(hashes, parent)
        upper, blocks = slots[UPPER], slots.shape[1]
        is_up = upper >= 0
        up = int(np.count_nonzero(is_up))
        tiers = self._attribute(hashes, blocks, up)
        if not blocks:
            return Found(0, 0, 0, upper, tiers)
        self.index.touch(pieces, now)
        told, lower = blocks, nothing(blocks)
        if up < blocks:  # behind what is told, hold lower copies where there are any: the upper ones stay evictable
            told = min(int(is_up.argmin()), self._told_max)
            lower[told:] = slots[LOWER, told:]
            upper[told:][lower[told:] >= 0] = -1
            self.upper.use(upper[upper >= 0])
            self.pools[LOWER].use(lower[lower >= 0])
        else:
            self.upper.use(upper)
        lease = Lease(next(self._ids), session_id, parent, hashes, upper, lower, blocks, np.zeros(blocks, np.bool_))
        session.leases[lease.id] = lease
        self._tell(session, lease, 0, told, now)
        if told < blocks:
            self._promotion.start(lease, told, DEMAND, now)
            if not is_up[told] and not self._promotion.coming(lease, told):
                session.let_go(lease, slice(told, None))  # report no more than can be delivered
                lease.blocks = told
                self.counters["lookup_busy",] += 1
                if not told:
                    del session.leases[lease.id]
                    return Found(0, 0, 0, upper[:0], tiers)
        return Found(lease.id, lease.blocks, told, upper[:told].copy(), tiers)

    @property
    def _told_max(self) -> int:
        """Blocks that a lookup names at once when more are below: what it leaves is a window for these."""
        return max(self._promotion.window, self.upper.slots - self._promotion.window)

    def load(self, session_id: int, lease_id: int, first: int, count: int, now: int) -> Slots | Wait:
        """Slots of `count` blocks of a lease from `first`, or of fewer, or Wait; raises Gone and Busy."""
        session = self.sessions[session_id]
        lease = session.lease(lease_id, writing=False)
        if not 0 <= first < len(lease.upper) or count < 1:
            raise Invalid(f"load: blocks {first} to {first + count} are not in a lease of {len(lease.upper)}")
        last = min(first + count, lease.blocks)
        if ((lease.upper[first:last] < 0) & (lease.lower[first:last] < 0)).any():
            raise Invalid(f"load: some of blocks {first} to {last} of lease {lease_id} were released before")
        self._promotion.catch_up(lease, first, last)
        end = _risen(lease, first, last)
        if end < lease.blocks:
            self._promotion.start(lease, end, DEMAND, now)
        if end > first:
            self._tell(session, lease, first, end, now)
            slots: Slots = lease.upper[first:end].copy()
            return slots
        if first >= lease.blocks:
            raise Gone(f"block {first} of lease {lease_id} is lost")
        if not (transfer := self._promotion.coming(lease, first)):
            self.counters["load_busy",] += 1
            raise Busy("all slots of the cpu tier are held; load the blocks you have, release them and ask again")
        return Wait([transfer])

    def release(self, session_id: int, lease_id: int, first: int = 0, count: int | None = None) -> None:
        """End a reading lease, or give back `count` blocks of it from `first`."""
        session = self.sessions[session_id]
        lease = session.lease(lease_id, writing=False)
        if count is None:
            self._end_lease(session, lease)
            return
        end = min(first + count, len(lease.upper))
        if not 0 <= first < end:
            raise Invalid(f"release: blocks {first} to {first + count} are not in a lease of {len(lease.upper)}")
        session.let_go(lease, slice(first, end))

    def prefetch(self, hashes: bytes, parent: bytes, now: int) -> int:
        """Start to bring the head of a prefix up, without a lease; returns how many blocks are or will be up."""
        slots, pieces = self._resident(hashes, parent)
        upper, lower, blocks = slots[UPPER], slots[-1], len(slots[UPPER])
        self.index.touch(pieces, now)
        first = leading(upper >= 0)
        if first == blocks:
            return first
        nobody = Lease(0, 0, parent, hashes, upper, lower, blocks, np.zeros(blocks, np.bool_))
        self._promotion.start(nobody, first, PREFETCH, now)
        rising = self._transfers.readers(LOWER, lower) > 0
        return leading((upper >= 0) | rising)

    # -- store, commit, abort -----------------------------------------------------------------------------------------

    def store(self, session_id: int, hashes: bytes, parent: bytes, now: int) -> Placed:
        """Slots for the blocks that are new; raises Gone when the parent is unknown.

        A parent that is still being written will do; it has to be committed before them.
        """
        session = self.sessions[session_id]
        pieces = self.index.match(hashes, parent)
        if pieces is None:
            if parent not in self._pending:
                raise Gone("store: the parent of the first block is not known here; store the chain from its root")
            pieces = []
        codes = np.full(len(hashes) // HASH_BYTES, NO_ROOM, np.int32)
        for at, piece in _positions(pieces):
            stored = (piece.node.slots[:, piece.start : piece.end] >= 0).any(0)
            codes[at : at + piece.blocks][stored] = STORED
        wanted = np.flatnonzero(codes == NO_ROOM)
        new = set(names(pick(hashes, wanted)))
        if len(new) < len(wanted) or ROOT in new:
            raise Invalid("store: a block hash is there twice, or is all zeros; hashes must be chained over their parents")
        if not self._pending.keys().isdisjoint(new):
            pending = np.array([block in self._pending for block in names(pick(hashes, wanted))], np.bool_)
            codes[wanted[pending]] = PENDING
            wanted = wanted[~pending]
        anchor = self.index.touch(pieces or self._parent_piece(parent), now)
        taken = self._room.take(UPPER, len(wanted), behind=anchor[-1].node if anchor else None)
        if len(taken) < len(wanted):
            self.counters["store_short",] += 1
        if not len(taken):
            return Placed(0, codes)
        wanted = wanted[: len(taken)]
        codes[wanted] = taken
        run = pick(hashes, wanted)
        self.upper.begin(taken, run, pick(parent + hashes[:-HASH_BYTES], wanted))
        self.upper.touched(taken, now)
        everything = np.ones(len(taken), np.bool_)
        lease = Lease(next(self._ids), session_id, parent, hashes, taken, nothing(0), len(taken), everything, positions=wanted)
        session.leases[lease.id] = lease
        session.tell(taken)
        self._pending.update(dict.fromkeys(names(run), lease))
        return Placed(lease.id, codes)

    def commit(self, session_id: int, lease_id: int, count: int | None, now: int) -> Committed:
        """Publish the first `count` blocks of a writing lease (default: all) and end it; the others are aborted."""
        session = self.sessions[session_id]
        lease = session.lease(lease_id, writing=True)
        count = len(lease.upper) if count is None else count
        if not 0 <= count <= len(lease.upper):
            raise Invalid(f"commit: {count} blocks of a lease of {len(lease.upper)}")
        self._end_writing(session, lease)
        if count < len(lease.upper):
            self.upper.give(lease.upper[count:])
        dropped = self._publish(lease, count, now)
        return Committed(count - dropped, dropped)

    def abort(self, session_id: int, lease_id: int) -> None:
        """Give the slots of a writing lease back."""
        session = self.sessions[session_id]
        self._end_lease(session, session.lease(lease_id, writing=True))

    def _publish(self, lease: Lease, count: int, now: int) -> int:
        """Enter the first `count` filled slots of a lease into the tree; returns how many have no place there."""
        assert lease.positions is not None
        slots, positions = lease.upper[:count], lease.positions[:count]
        total = int(positions[-1]) + 1 if count else 0
        hashes = lease.hashes[: total * HASH_BYTES]
        pieces = self.index.match(hashes, lease.parent)
        if pieces is None or not count:
            self.upper.give(slots)
            self.counters["commit_orphans",] += count
            return count
        alive = self.upper.state[slots] == FILLING  # the others are in a segment that is being given up
        row = nothing(total)
        row[positions[alive]] = slots[alive]
        dropped = count - int(alive.sum())
        anchor = self.index.touch(pieces or self._parent_piece(lease.parent), now)
        known = 0
        for known, piece in _positions(anchor if pieces else []):
            here = piece.node.slots[UPPER, piece.start : piece.end]
            part = row[known : known + piece.blocks]
            part[here >= 0] = -1  # somebody else was faster
            if part.max() >= 0:
                self.index.assign(UPPER, piece, np.where(here >= 0, here, part))
            known += piece.blocks
        new = known + self.index.count_new(hashes[known * HASH_BYTES :])
        dropped = count - int(alive.sum()) + int((row[new:] >= 0).sum())
        filled = np.flatnonzero(row[:new] >= 0)
        self.upper.ready(row[filled])
        if len(filled) < count:
            self.upper.give(np.setdiff1d(slots, row[filled]))
        if len(filled) and filled[-1] >= known:
            end = int(filled[-1]) + 1
            rows = np.full((len(self.pools), end - known), -1, np.int32)
            rows[UPPER] = row[known:end]
            node = anchor[-1].node if anchor else self.index.root
            self.index.extend(node, hashes[known * HASH_BYTES : end * HASH_BYTES], rows, now)
        if len(filled):
            self.write_back.push(lease.parent, hashes)
        if dropped:
            self.counters["commit_misplaced",] += dropped
        return dropped

    def _end_writing(self, session: Session, lease: Lease) -> None:
        del session.leases[lease.id]
        for block in names(lease.filled()):
            del self._pending[block]
        session.untell(lease.upper)

    def _end_lease(self, session: Session, lease: Lease) -> None:
        if lease.writing:
            self._end_writing(session, lease)
            self.upper.give(lease.upper)
        else:
            del session.leases[lease.id]
            session.let_go(lease, slice(None))

    # -- moving -------------------------------------------------------------------------------------------------------

    def plan_write_back(self, blocks_max: int) -> bool:
        """Plan one transfer of at most `blocks_max` blocks to nvme; False when nothing can be planned now."""
        return self.write_back.plan(blocks_max)

    def finish(self, transfer: Transfer, outcome: NDArray[np.uint8], now: int) -> None:
        """A transfer has ended: `outcome` (uint8 per block: OK, IO_ERROR, MISMATCH) says what became of each block."""
        if transfer.behind in self.transfers:
            self.transfers[transfer.behind].held_up.append((transfer, outcome))
            return
        ended = deque([(transfer, outcome)])
        while ended:
            transfer, outcome = ended.popleft()
            self._finish(transfer, outcome, now)
            ended.extend(transfer.held_up)

    def _finish(self, transfer: Transfer, outcome: NDArray[np.uint8], now: int) -> None:
        good = outcome == OK
        for name, code in (("io_error", IO_ERROR), ("mismatch", MISMATCH)):
            self.counters["failed", name, transfer.reason] += int((outcome == code).sum())
        if transfer.reason == WRITE_BACK:
            self.write_back.finish(transfer, good, now)
        else:
            self._promotion.finish(transfer, good)
            if not good.all():
                self._promotion.distrust(transfer, transfer.source_slots[~good])
        self._transfers.end(transfer)

    def vacate(self, tier: int, ordinal: int) -> None:
        """Empty a segment that is to be given up; it is idle when the last user of its slots has gone."""
        self._room.vacate(tier, ordinal)

    # -- small helpers ------------------------------------------------------------------------------------------------

    def _resident(self, hashes: bytes, parent: bytes) -> tuple[Slots, list[Piece]]:
        """Slots (int32[tiers, n], a copy) and pieces of the longest prefix each of whose blocks is in some tier."""
        pieces = self.index.match(hashes, parent)
        if not pieces:
            return np.empty((len(self.pools), 0), np.int32), []
        slots = np.concatenate([piece.node.slots[:, piece.start : piece.end] for piece in pieces], axis=1)
        blocks = leading(slots.max(0) >= 0)
        if blocks == slots.shape[1]:
            return slots, pieces
        kept = [piece._replace(blocks=min(piece.blocks, blocks - at)) for at, piece in _positions(pieces) if at < blocks]
        return slots[:, :blocks], kept

    def _attribute(self, hashes: bytes, blocks: int, up: int) -> dict[str, int]:
        """Where each block asked for is; the values sum to their number."""
        asked = len(hashes) // HASH_BYTES
        pending = 0
        while self._pending and blocks + pending < asked:
            at = (blocks + pending) * HASH_BYTES
            if hashes[at : at + HASH_BYTES] not in self._pending:
                break
            pending += 1
        miss = asked - blocks - pending
        tiers = {"gpu": 0, "cpu": up, "nvme": blocks - up, "remote": 0, "pending": pending, "miss": miss}
        for tier, number in tiers.items():
            if number:
                self.counters["lookup", tier] += number
        return tiers

    def _parent_piece(self, parent: bytes) -> list[Piece]:
        """The parent of a chain that is new here, as the end of a path to touch; of one that is being written, what is
        known of the way to it.
        """
        while lease := self._pending.get(parent):
            if pieces := self.index.match(lease.hashes, lease.parent):
                return pieces
            parent = lease.parent
        entry = self.index.find(parent) if parent != ROOT else None
        return [Piece(entry[0], 0, entry[1] + 1)] if entry else []

    def _tell(self, session: Session, lease: Lease, first: int, end: int, now: int) -> None:
        """Name the slots of blocks [first, end) of a reading lease to its session, unless that was done before."""
        told = lease.told[first:end]
        slots = lease.upper[first:end][~told] if told.any() else lease.upper[first:end]
        told[:] = True
        self.upper.touched(slots, now)
        session.tell(slots)

    def check(self) -> None:
        """Raise AssertionError if leases, transfers, slots and the tree do not add up; for tests and idle time."""
        leases = [lease for session in self.sessions.values() for lease in session.leases.values()]
        named = [block for lease in leases for block in names(lease.filled())]
        assert sorted(named) == sorted(self._pending), "pending blocks are not those of the writing leases"
        audit(self.index, self.pools, list(self.sessions.values()), list(self.transfers.values()))


def _positions(pieces: list[Piece]) -> Iterator[tuple[int, Piece]]:
    """Pieces of one chain with the position of their first block."""
    at = 0
    for piece in pieces:
        yield at, piece
        at += piece.blocks


def _risen(lease: Lease, first: int, end: int) -> int:
    """The first block in [first, end) that is not up yet, or `end`."""
    return first + leading(lease.upper[first:end] >= 0)

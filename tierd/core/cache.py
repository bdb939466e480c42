"""The cache of one namespace: every decision about its blocks, and nothing else.

Plain functions of the state, the request and the time: no await, no clock, no bytes of blocks. What has to be moved is put on
`planned` for the caller to execute; each transfer ends in `finish`. The two tiers are the mapped one (`upper`: clients copy
from and to its slots) and, optionally, nvme (`lower`).

- A lookup leases the longest prefix that is resident in any tier, and starts to promote the first window of what is only below.
- A store leases slots for what is new; nobody sees a block before its commit.
- A slot named to a session has the session's holder bit set first, and loses it by release, commit, abort, or the session's end.
"""

from __future__ import annotations

from collections import Counter
from itertools import count as counter

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES, ROOT, split
from tierd.core.evict import evict, evict_slots
from tierd.core.index import Index, Node, Piece
from tierd.core.plan import (
    DEMAND,
    IO_ERROR,
    MISMATCH,
    NO_ROOM,
    OK,
    PENDING,
    PREFETCH,
    STORED,
    WRITE_BACK,
    Committed,
    Found,
    Lease,
    Placed,
    Slots,
    Transfer,
    Wait,
)
from tierd.core.pool import READY, RETIRED, Pool
from tierd.core.write_back import WriteBack
from tierd.errors import Busy, Gone, Invalid

UPPER, LOWER = 0, 1
WRITE_BACK_TURNS = 4
"""The write-back queue remembers as many blocks as fit into the upper tier this many times."""
TIERS = ("cpu", "nvme")


class Session:
    """What one attached client holds. `told` counts, per slot of the mapped tier, the leases that named it to the client."""

    __slots__ = ("bit", "id", "leases", "restored", "told")

    def __init__(self, session_id: int, bit: int) -> None:
        self.id = session_id
        self.bit = bit
        self.leases: dict[int, Lease] = {}
        self.told: NDArray[np.int16] = np.zeros(0, np.int16)
        self.restored: Slots = np.empty(0, np.int32)
        """Slots that carry this session's bit from an earlier life of the daemon."""


class Cache:
    """One namespace. `lower` is None without an nvme tier; `window_share` bounds one promotion to a share of the upper tier."""

    def __init__(self, upper: Pool, lower: Pool | None, *, window_share: float = 0.25, write_back: bool = True) -> None:
        self.pools = [upper] if lower is None else [upper, lower]
        self.upper, self.lower = upper, lower
        self.index = Index(len(self.pools))
        self.write_back = WriteBack()
        self.sessions: dict[int, Session] = {}
        self.planned: list[Transfer] = []
        """Transfers decided but not yet taken by the mover."""
        self.transfers: dict[int, Transfer] = {}
        """All transfers that have not ended."""
        self.counters: Counter[tuple[str, ...]] = Counter()
        self._window_share = window_share
        self._writes_back = write_back and lower is not None
        self._pending: dict[bytes, Lease] = {}
        self._raising: NDArray[np.int64] = np.zeros(0, np.int64)  # by lower slot: the transfer that promotes it, or 0
        self._ids = counter(1)

    # -- sessions -----------------------------------------------------------------------------------------------------

    def open_session(self, session_id: int, bit: int) -> Session:
        """Enter a client; `bit` is its bit in the holders column."""
        assert session_id not in self.sessions
        session = self.sessions[session_id] = Session(session_id, bit)
        return session

    def close_session(self, session_id: int) -> None:
        """The client is gone: everything it held is free at once."""
        session = self.sessions.pop(session_id)
        for lease in list(session.leases.values()):
            self._drop_lease(session, lease)
        self._forget_restored(session)

    def resume(self, session_id: int, held: Slots) -> int:
        """A client says which slots it still copies from or to; everything else it was told is free. Returns a lease on them or 0."""
        session = self.sessions[session_id]
        mine = np.unique(np.concatenate((session.restored, np.flatnonzero(session.told).astype(np.int32))))
        kept = np.unique(held)
        if len(np.setdiff1d(kept, mine)):
            raise Invalid("resume: the session says it holds slots that it was never told")
        old = list(session.leases.values())
        lease = Lease(
            next(self._ids), session_id, ROOT, b"", kept, _nothing(len(kept)), len(kept), np.ones(len(kept), bool)
        )
        if len(kept):  # told again before the old leases let go, so that the bits never clear
            self.upper.use(kept)
            session.leases[lease.id] = lease
            self._tell(session, kept)
        for held_before in old:
            self._drop_lease(session, held_before)
        self._forget_restored(session)
        return lease.id if len(kept) else 0

    def restore_session(self, session_id: int, bit: int, slots: Slots) -> None:
        """Recovery found `slots` with this holder bit: they wait until the session resumes or its process is gone."""
        session = self.open_session(session_id, bit)
        session.restored = slots
        self.upper.use(slots)

    def _forget_restored(self, session: Session) -> None:
        gone, session.restored = session.restored, session.restored[:0]
        told = np.isin(gone, np.flatnonzero(session.told))
        self.upper.unhold(gone[~told], session.bit)
        self.upper.unuse(gone)

    # -- lookup, load, release ----------------------------------------------------------------------------------------

    def lookup(self, session_id: int, hashes: bytes, parent: bytes, now: int) -> Found:
        """Lease the longest prefix of `hashes` behind `parent` that can be had; starts the promotion of its first window."""
        session = self.sessions[session_id]
        asked = len(hashes) // HASH_BYTES
        slots, pieces = self._resident(hashes, parent)
        upper, lower = slots[UPPER], slots[-1]
        blocks = slots.shape[1]
        only_below = upper < 0 if blocks and upper.min() < 0 else None
        told = int(only_below.argmax()) if only_below is not None else blocks
        tiers = self._attribute(asked, blocks, only_below, hashes)
        if not blocks:
            return Found(0, 0, 0, upper, tiers)
        pieces = self.index.touch(pieces, now)
        lease = Lease(
            next(self._ids),
            session_id,
            parent,
            hashes[: blocks * HASH_BYTES],
            upper,
            upper,
            blocks,
            np.zeros(blocks, bool),
        )
        if only_below is not None:
            lease.lower = np.where(only_below, lower, np.int32(-1))
            self.pools[LOWER].use(lower[only_below])
            self.upper.use(upper[~only_below])
        else:
            lease.lower = _nothing(blocks)
            self.upper.use(upper)
        session.leases[lease.id] = lease
        if told:
            self.upper.touched(upper[:told], now)
            lease.told[:told] = True
            self._tell(session, upper[:told])
        if only_below is not None and not self._promote(lease, told, self._window(), DEMAND, now):
            lease.blocks = told  # report no more than can be delivered
            self.counters["lookup_busy",] += 1
        if not lease.blocks:
            self._drop_lease(session, lease)
            return Found(0, 0, 0, upper[:0], tiers)
        return Found(lease.id, lease.blocks, told, upper[:told], tiers)

    def load(self, session_id: int, lease_id: int, first: int, count: int, now: int) -> Slots | Wait:
        """Slots of `count` blocks of a lease from `first`, or of fewer, or Wait; raises Gone and Busy."""
        session, lease = self._lease(session_id, lease_id, writing=False)
        if not 0 <= first < len(lease.upper) or count < 1:
            raise Invalid(f"load: blocks {first} to {first + count} are not in a lease of {len(lease.upper)}")
        if first >= lease.blocks:
            raise Gone(f"block {first} of lease {lease_id} is lost")
        last = min(first + count, lease.blocks)
        if ((lease.upper[first:last] < 0) & (lease.lower[first:last] < 0)).any():
            raise Invalid(f"load: some of blocks {first} to {last} of lease {lease_id} were released before")
        missing = np.flatnonzero(lease.upper[first:last] < 0)
        if len(missing):
            self._catch_up(lease, first + int(missing[0]), last)
            missing = np.flatnonzero(lease.upper[first:last] < 0)
        end = first + int(missing[0]) if len(missing) else last
        waits = self._promote(lease, end, self._window(), DEMAND, now) if end < lease.blocks else []
        if end > first:
            fresh = first + np.flatnonzero(~lease.told[first:end])
            lease.told[fresh] = True
            self._tell(session, lease.upper[fresh])
            return lease.upper[first:end]
        if first >= lease.blocks:
            raise Gone(f"block {first} of lease {lease_id} is lost")
        if not waits:
            self.counters["load_busy",] += 1
            raise Busy("all slots of the cpu tier are held; load the blocks you have, release them and ask again")
        return Wait(waits)

    def release(self, session_id: int, lease_id: int, first: int = 0, count: int | None = None) -> None:
        """End a reading lease, or give back `count` blocks of it from `first`."""
        session, lease = self._lease(session_id, lease_id, writing=False)
        if count is None:
            self._drop_lease(session, lease)
            return
        end = min(first + count, len(lease.upper))
        if not 0 <= first < end:
            raise Invalid(f"release: blocks {first} to {first + count} are not in a lease of {len(lease.upper)}")
        self._let_go(session, lease, slice(first, end))

    def prefetch(self, hashes: bytes, parent: bytes, now: int) -> int:
        """Start to bring the head of a prefix up, without a lease; returns how many blocks are or will be up."""
        slots, pieces = self._resident(hashes, parent)
        blocks = slots.shape[1]
        if not blocks:
            return 0
        self.index.touch(pieces, now)
        below = np.flatnonzero(slots[UPPER] < 0)
        if len(below):
            lease = Lease(0, 0, parent, hashes, slots[UPPER], slots[-1], blocks, np.zeros(blocks, bool))
            if not self._promote(lease, int(below[0]), self._window(), PREFETCH, now):
                return int(below[0])
            return min(blocks, int(below[0]) + self._window())
        return blocks

    # -- store, commit, abort -----------------------------------------------------------------------------------------

    def store(self, session_id: int, hashes: bytes, parent: bytes, now: int) -> Placed:
        """Slots for the blocks that are new; raises Gone when the parent is unknown."""
        session = self.sessions[session_id]
        pieces = self.index.match(hashes, parent)
        if pieces is None:
            raise Gone("store: the parent of the first block is not known here; store the chain from its root")
        total = len(hashes) // HASH_BYTES
        codes = np.full(total, NO_ROOM, np.int32)
        known = 0
        for piece in pieces:
            rows = piece.node.slots[:, piece.start : piece.start + piece.count]
            codes[known : known + piece.count][(rows >= 0).any(0)] = STORED
            known += piece.count
        if self._pending:
            for at, block in enumerate(split(hashes)):
                if codes[at] != STORED and block in self._pending:
                    codes[at] = PENDING
        anchor = self.index.touch(pieces or self._anchor(parent), now)
        wanted = np.flatnonzero(codes == NO_ROOM)
        if not len(wanted):
            return Placed(0, codes)
        keep = set(self.index.path(anchor[-1].node)) if anchor else set()
        taken = self._take(UPPER, len(wanted), keep)
        if len(taken) < len(wanted):
            self.counters["store_short",] += 1
        if not len(taken):
            return Placed(0, codes)
        where = wanted[: len(taken)]
        codes[where] = taken
        self.upper.begin(taken, _pick(hashes, where), _pick(parent + hashes[:-HASH_BYTES], where))
        self.upper.touched(taken, now)
        lease = Lease(
            next(self._ids),
            session_id,
            parent,
            hashes,
            taken,
            _nothing(0),
            len(taken),
            np.ones(len(taken), bool),
            where,
        )
        session.leases[lease.id] = lease
        self._tell(session, taken)
        self._pending.update(dict.fromkeys(split(_pick(hashes, where)), lease))
        return Placed(lease.id, codes)

    def commit(self, session_id: int, lease_id: int, count: int | None, now: int) -> Committed:
        """Publish the first `count` blocks of a writing lease (default: all) and end it; the others are aborted."""
        session, lease = self._lease(session_id, lease_id, writing=True)
        assert lease.positions is not None
        count = len(lease.upper) if count is None else count
        if not 0 <= count <= len(lease.upper):
            raise Invalid(f"commit: {count} blocks of a lease of {len(lease.upper)}")
        self._end_writing(session, lease)
        slots, positions = lease.upper[:count], lease.positions[:count]
        if count < len(lease.upper):
            self.upper.give(lease.upper[count:])
        if not count:
            return Committed(0, 0)
        length = int(positions[-1]) + 1
        row = _nothing(length)
        row[positions] = slots
        hashes = lease.hashes[: length * HASH_BYTES]
        pieces = self.index.match(hashes, lease.parent)
        if pieces is None:
            self.upper.give(slots)
            self.counters["commit_orphans",] += count
            return Committed(0, count)
        accepted = self._publish(hashes, lease.parent, row, pieces, now)
        if self._writes_back:
            self.write_back.push(lease.parent, hashes)
            while self.write_back.blocks > WRITE_BACK_TURNS * self.upper.slots and len(self.write_back.queue) > 1:
                self.write_back.pop()  # older than all that is still in memory
                self.counters["write_back_dropped",] += 1
        return Committed(accepted, count - accepted)

    def abort(self, session_id: int, lease_id: int) -> None:
        """Give the slots of a writing lease back."""
        session, lease = self._lease(session_id, lease_id, writing=True)
        self._drop_lease(session, lease)

    def _publish(self, hashes: bytes, parent: bytes, row: Slots, pieces: list[Piece], now: int) -> int:
        """Enter filled upper slots (int32 per block, -1: a hole) into the tree; returns how many found their place free."""
        anchor = self.index.touch(pieces or self._anchor(parent), now)
        at = 0
        for piece in anchor if pieces else []:
            part = row[at : at + piece.count]
            here = piece.node.slots[UPPER, piece.start : piece.start + piece.count]
            twice = (part >= 0) & (here >= 0)
            if twice.any():
                self.upper.give(part[twice])
                part[twice] = -1
            if part.max(initial=-1) >= 0:
                self.index.assign(UPPER, piece, np.where(part >= 0, part, here))
            at += piece.count
        filled = np.flatnonzero(row >= 0)
        self.upper.ready(row[filled])
        if len(filled) and at <= filled[-1]:
            rows = np.full((len(self.pools), len(row) - at), -1, np.int32)
            rows[UPPER] = row[at:]
            node = anchor[-1].node if anchor else self.index.root
            self.index.extend(node, hashes[at * HASH_BYTES :], rows, now)
        return len(filled)

    def _end_writing(self, session: Session, lease: Lease) -> None:
        assert lease.positions is not None
        del session.leases[lease.id]
        for block in split(_pick(lease.hashes, lease.positions)):
            self._pending.pop(block, None)
        self._untell(session, lease.upper)

    # -- promotion ----------------------------------------------------------------------------------------------------

    def _window(self) -> int:
        return max(1, int(self.upper.slots * self._window_share))

    def _promote(self, lease: Lease, start: int, limit: int, reason: str, now: int) -> list[int]:
        """Bring blocks [start, start + limit) of a lease up, all or nothing; returns the transfers to wait for (none: no room)."""
        end = min(start + limit, lease.blocks)
        need = start + np.flatnonzero(lease.upper[start:end] < 0)
        if not len(need):
            return []
        pool = self.pools[LOWER]
        lost = need[pool.state[lease.lower[need]] != READY]
        if len(lost):
            lease.blocks = int(lost[0])
            need = need[need < lost[0]]
        if len(self._raising) < len(pool.users):
            self._raising = np.concatenate((self._raising, np.zeros(len(pool.users) - len(self._raising), np.int64)))
        raising = self._raising[lease.lower[need]]
        joined = [int(transfer) for transfer in np.unique(raising[raising > 0])]
        for transfer in joined:
            if lease.id and lease not in self.transfers[transfer].leases:
                self.transfers[transfer].leases.append(lease)
        fresh = need[raising == 0]
        while len(fresh) and self._room(UPPER, len(fresh)) < len(fresh):
            fresh = fresh[: len(fresh) // 2]
        if not len(fresh):
            return joined
        targets = self.upper.take(len(fresh))
        hashes = _pick(lease.hashes, fresh)
        parents = _pick(lease.parent + lease.hashes[:-HASH_BYTES], fresh)
        source = lease.lower[fresh]
        self.upper.begin(targets, hashes, parents)
        self.upper.touched(targets, now)
        transfer_id = self._plan(reason, LOWER, UPPER, source, targets, hashes, parents, [lease] if lease.id else [])
        self._raising[source] = transfer_id
        return [*joined, transfer_id]

    def _catch_up(self, lease: Lease, first: int, end: int) -> None:
        """Take over what others brought up since the lease was made."""
        for at, piece in self.index.runs(lease.hashes[first * HASH_BYTES : end * HASH_BYTES]):
            here = piece.node.slots[UPPER, piece.start : piece.start + piece.count]
            blocks = first + at + np.flatnonzero((here >= 0) & (lease.upper[first + at : first + at + piece.count] < 0))
            slots = here[blocks - first - at]
            self.upper.use(slots)
            lease.upper[blocks] = slots
            self.pools[LOWER].unuse(lease.lower[blocks])
            lease.lower[blocks] = -1

    def _raised(self, transfer: Transfer, good: NDArray[np.bool_]) -> None:
        """Blocks have come up: into the tree, and to the leases that wait for them."""
        source, target = transfer.source_slots, transfer.target_slots
        self._raising[source] = 0
        entered = np.zeros(len(good), bool)
        for at, piece in self.index.runs(transfer.hashes):
            here = piece.node.slots[UPPER, piece.start : piece.start + piece.count]
            part = good[at : at + piece.count] & (here < 0)
            entered[at : at + piece.count] = part
            if part.any():
                self.index.assign(UPPER, piece, np.where(part, target[at : at + piece.count], here))
        good = entered
        self.upper.ready(target[good])
        order = np.argsort(source)
        for lease in transfer.leases:
            held = np.flatnonzero(lease.lower >= 0)
            spot = np.searchsorted(source[order], lease.lower[held])
            spot = order[np.minimum(spot, len(order) - 1)]
            mine = (source[spot] == lease.lower[held]) & good[spot]
            blocks, spot = held[mine], spot[mine]
            self.upper.use(target[spot])
            lease.upper[blocks] = target[spot]
            self.pools[LOWER].unuse(lease.lower[blocks])
            lease.lower[blocks] = -1
        if (~good).any():
            self.upper.give(target[~good])

    # -- write-back ---------------------------------------------------------------------------------------------------

    def plan_write_back(self, blocks_max: int) -> bool:
        """Plan one transfer of at most `blocks_max` blocks to nvme; False when nothing can be planned now."""
        while (run := self.write_back.pop()) is not None:
            parent, hashes = run
            rest = self._dirty(parent, hashes)
            if rest is None:
                continue
            parent, hashes = rest
            blocker = self.write_back.writing.get(parent) or self.write_back.writing.get(hashes[:HASH_BYTES])
            if blocker is not None:
                self.transfers[blocker].parked.append((parent, hashes))
                continue
            if len(hashes) > blocks_max * HASH_BYTES:
                cut = blocks_max * HASH_BYTES
                self.write_back.unpop(hashes[cut - HASH_BYTES : cut], hashes[cut:])
                hashes = hashes[:cut]
            if self._write(parent, hashes):
                return True
        return False

    def _dirty(self, parent: bytes, hashes: bytes) -> tuple[bytes, bytes] | None:
        """The part of a run that is up and not below, preceded by parents that are not below either; None: nothing to do."""
        pieces = self.index.match(hashes, parent)
        if not pieces:
            return None
        rows = np.concatenate(
            [piece.node.slots[:, piece.start : piece.start + piece.count] for piece in pieces], axis=1
        )
        todo = np.flatnonzero(rows[LOWER] < 0)
        if not len(todo):
            return None
        start = int(todo[0])
        up = rows[UPPER, start:] >= 0
        end = start + (int(up.argmin()) if not up.all() else len(up))
        below = rows[LOWER, start:end] >= 0
        end = start + int(below.argmax()) if below.any() else end
        if end < rows.shape[1] and (rows[LOWER, end:] < 0).any() and end > start:
            self.write_back.unpop(hashes[(end - 1) * HASH_BYTES : end * HASH_BYTES], hashes[end * HASH_BYTES :])
        if end == start:
            return None
        if start:
            parent = hashes[(start - 1) * HASH_BYTES : start * HASH_BYTES]
        run = hashes[start * HASH_BYTES : end * HASH_BYTES]
        return self._with_parents(parent, run)

    def _with_parents(self, parent: bytes, run: bytes) -> tuple[bytes, bytes] | None:
        """Lengthen a run at its head up to the first ancestor that is below or being written."""
        above: list[bytes] = []
        entry = self.index.find(parent) if parent != ROOT else None
        if parent != ROOT and entry is None:
            return None
        while entry is not None and parent not in self.write_back.writing:
            node, offset = entry
            rows = node.slots[:, : offset + 1]
            safe = np.flatnonzero(rows[LOWER] >= 0)
            first = int(safe[-1]) + 1 if len(safe) else 0
            if first <= offset:
                if (rows[UPPER, first:] < 0).any():
                    self.counters["write_back_orphans",] += len(run) // HASH_BYTES
                    return None
                above.append(node.hashes[first * HASH_BYTES : (offset + 1) * HASH_BYTES])
            if first or node.parent is None or node.parent is self.index.root:
                parent = node.hashes[(first - 1) * HASH_BYTES : first * HASH_BYTES] if first else ROOT
                break
            node = node.parent
            parent, entry = node.last_hash, (node, len(node) - 1)
        return parent, b"".join(reversed(above)) + run

    def _write(self, parent: bytes, hashes: bytes) -> bool:
        pieces = self.index.match(hashes, parent)
        if not pieces:
            return False
        source = np.concatenate([piece.node.slots[UPPER, piece.start : piece.start + piece.count] for piece in pieces])
        taken = self._take(LOWER, len(source), set(self.index.path(pieces[-1].node)))
        if len(taken) < len(source):
            self.counters["write_back_short",] += len(source) - len(taken)
        if not len(taken):
            return False
        source, hashes = source[: len(taken)], hashes[: len(taken) * HASH_BYTES]
        parents = parent + hashes[:-HASH_BYTES]
        transfer = self._plan(WRITE_BACK, UPPER, LOWER, source, taken, hashes, parents, [])
        self.write_back.begin(transfer, list(split(hashes)))
        return True

    def _written(self, transfer: Transfer, good: NDArray[np.bool_]) -> None:
        """Blocks have reached nvme: into the tree, up to the first that failed, so that the tier stays prefix-closed."""
        pool = self.pools[LOWER]
        self.write_back.end(list(split(transfer.hashes)))
        if not good.all():
            good[int(good.argmin()) :] = False
        entered = np.zeros(len(good), bool)
        for at, piece in self.index.runs(transfer.hashes):
            here = piece.node.slots[LOWER, piece.start : piece.start + piece.count]
            part = good[at : at + piece.count] & (here < 0)
            entered[at : at + piece.count] = part
            if part.any():
                self.index.assign(LOWER, piece, np.where(part, transfer.target_slots[at : at + piece.count], here))
        pool.state[transfer.target_slots[entered]] = READY
        pool.users[transfer.target_slots[entered]] -= 1
        if (~entered).any():
            pool.give(transfer.target_slots[~entered])
        for parent, hashes in reversed(transfer.parked):
            self.write_back.unpop(parent, hashes)

    # -- transfers ----------------------------------------------------------------------------------------------------

    def finish(self, transfer: Transfer, outcome: NDArray[np.uint8], now: int) -> None:
        """A transfer has ended: `outcome` (uint8 per block: OK, IO_ERROR, MISMATCH) says what became of each block."""
        del self.transfers[transfer.id]
        good = outcome == OK
        source, target = (LOWER, UPPER) if transfer.target == TIERS[UPPER] else (UPPER, LOWER)
        for name, code in (("io_error", IO_ERROR), ("mismatch", MISMATCH)):
            self.counters["failed", name, transfer.reason] += int((outcome == code).sum())
        if target == UPPER:
            bad = transfer.source_slots[~good]
            self._raised(transfer, good)
            if len(bad):
                self._distrust(transfer, bad)
        else:
            self._written(transfer, good)
        self.pools[source].unuse(transfer.source_slots)

    def _distrust(self, transfer: Transfer, bad: Slots) -> None:
        """What could not be read as it was written is not there any more."""
        trimmed = []
        for _, piece in self.index.runs(transfer.hashes):
            row = piece.node.slots[LOWER]
            offsets = np.flatnonzero(np.isin(row, bad))
            if len(offsets):
                self.index.clear(LOWER, piece.node, offsets)
                trimmed.append(piece.node)
        self.pools[LOWER].quarantine(bad)
        self.index.trim(trimmed)
        for lease in transfer.leases:
            lost = np.flatnonzero(np.isin(lease.lower, bad))
            if len(lost):
                lease.blocks = min(lease.blocks, int(lost[0]))

    def _plan(
        self,
        reason: str,
        source: int,
        target: int,
        sources: Slots,
        targets: Slots,
        hashes: bytes,
        parents: bytes,
        leases: list[Lease],
    ) -> int:
        transfer = Transfer(
            next(self._ids), reason, TIERS[source], TIERS[target], sources, targets, hashes, parents, leases
        )
        self.pools[source].use(sources)
        self.transfers[transfer.id] = transfer
        self.planned.append(transfer)
        return transfer.id

    # -- room ---------------------------------------------------------------------------------------------------------

    def _room(self, tier: int, count: int, keep: set[Node] | None = None) -> int:
        """Evict until `count` slots are free, if possible; returns how many of them there are."""
        pool = self.pools[tier]
        if pool.free < count:
            clean, drop = evict(self.index, pool, tier, count - pool.free, keep or set(), closed=tier == LOWER)
            self.counters["evicted", TIERS[tier], "clean"] += clean
            self.counters["evicted", TIERS[tier], "drop"] += drop
        return min(pool.free, count)

    def _take(self, tier: int, count: int, keep: set[Node]) -> Slots:
        self._room(tier, count, keep)
        return self.pools[tier].take(count)

    def vacate(self, tier: int, ordinal: int) -> None:
        """Empty a segment that is to be given up; it is idle when the last user of its slots has gone."""
        pool = self.pools[tier]
        pool.close_segment(ordinal)
        first = ordinal * pool.slots_per_segment
        clean, drop = evict_slots(self.index, pool, tier, first, first + pool.slots_per_segment)
        self.counters["evicted", TIERS[tier], "clean"] += clean
        self.counters["evicted", TIERS[tier], "drop"] += drop

    # -- small helpers ------------------------------------------------------------------------------------------------

    def _resident(self, hashes: bytes, parent: bytes) -> tuple[NDArray[np.int32], list[Piece]]:
        """Slots (int32[tiers, n], a copy) and pieces of the longest prefix each of whose blocks is in some tier."""
        pieces = self.index.match(hashes, parent)
        if not pieces:
            return np.empty((len(self.pools), 0), np.int32), []
        slots = np.concatenate(
            [piece.node.slots[:, piece.start : piece.start + piece.count] for piece in pieces], axis=1
        )
        best = slots.max(0)
        if best.min() >= 0:
            return slots, pieces
        blocks = int((best < 0).argmax())
        kept, at = [], 0
        for piece in pieces:
            if at < blocks:
                kept.append(Piece(piece.node, piece.start, min(piece.count, blocks - at)))
            at += piece.count
        return slots[:, :blocks], kept

    def _attribute(
        self, asked: int, blocks: int, only_below: NDArray[np.bool_] | None, hashes: bytes
    ) -> dict[str, int]:
        """Where each block asked for is; the values sum to `asked`."""
        below = int(only_below.sum()) if only_below is not None else 0
        pending = 0
        if self._pending:
            for at in range(blocks * HASH_BYTES, len(hashes), HASH_BYTES):
                if hashes[at : at + HASH_BYTES] not in self._pending:
                    break
                pending += 1
        tiers = {
            "gpu": 0,
            "cpu": blocks - below,
            "nvme": below,
            "remote": 0,
            "pending": pending,
            "miss": asked - blocks - pending,
        }
        for tier, number in tiers.items():
            if number:
                self.counters["lookup", tier] += number
        return tiers

    def _anchor(self, parent: bytes) -> list[Piece]:
        """The parent block alone, as the end of a path to touch."""
        entry = self.index.find(parent) if parent != ROOT else None
        return [Piece(entry[0], 0, entry[1] + 1)] if entry else []

    def _lease(self, session_id: int, lease_id: int, writing: bool) -> tuple[Session, Lease]:
        session = self.sessions[session_id]
        lease = session.leases.get(lease_id)
        if lease is None:
            raise Gone(f"lease {lease_id} is not held by this session")
        if lease.writing != writing:
            verbs = "commit or abort" if lease.writing else "load or release"
            raise Invalid(f"lease {lease_id} was made for the other direction: {verbs} it")
        return session, lease

    def _drop_lease(self, session: Session, lease: Lease) -> None:
        if lease.writing:
            self._end_writing(session, lease)
            self.upper.give(lease.upper)
            return
        del session.leases[lease.id]
        self._let_go(session, lease, slice(None))
        for transfer in self.transfers.values():
            if lease in transfer.leases:
                transfer.leases.remove(lease)

    def _let_go(self, session: Session, lease: Lease, part: slice) -> None:
        upper, lower, told = lease.upper[part], lease.lower[part], lease.told[part]
        if told.all():
            self._untell(session, upper)
            self.upper.unuse(upper)
        else:
            self._untell(session, upper[told])
            self.upper.unuse(upper[upper >= 0])
        if len(self.pools) > 1 and len(lower) and lower.max() >= 0:
            self.pools[LOWER].unuse(lower[lower >= 0])
        lease.upper[part], lease.lower[part], lease.told[part] = -1, -1, False

    def _tell(self, session: Session, slots: Slots) -> None:
        """Set the session's holder bit on slots that it is about to be told."""
        if len(session.told) < len(self.upper.users):
            grown = np.zeros(len(self.upper.users), np.int16)
            grown[: len(session.told)] = session.told
            session.told = grown
        counts = session.told[slots]
        session.told[slots] = counts + 1
        fresh = slots[counts == 0] if counts.any() else slots
        if len(fresh):
            self.upper.hold(fresh, session.bit)

    def _untell(self, session: Session, slots: Slots) -> None:
        counts = session.told[slots] - 1
        session.told[slots] = counts
        done = slots[counts == 0] if counts.any() else slots
        if len(done):
            self.upper.unhold(done, session.bit)

    def check(self) -> None:
        """Raise AssertionError if leases, transfers, slots and the tree do not add up; for tests and idle time."""
        self.index.check()
        for tier, pool in enumerate(self.pools):
            pool.check()
            users = np.zeros(len(pool.users), np.int32)
            for session in self.sessions.values():
                for lease in session.leases.values():
                    slots = lease.upper if tier == UPPER else lease.lower
                    np.add.at(users, slots[slots >= 0], 1)
                if tier == UPPER:
                    np.add.at(users, session.restored, 1)
            for transfer in self.transfers.values():
                np.add.at(users, transfer.source_slots if transfer.source == TIERS[tier] else transfer.target_slots, 1)
            assert (users == pool.users).all(), (
                f"users of {TIERS[tier]} slots {np.flatnonzero(users != pool.users)[:8]} are wrong"
            )
            rows = [node.slots[tier] for node in self.index.nodes()]
            slots = np.concatenate(rows) if rows else np.empty(0, np.int32)
            slots = slots[slots >= 0]
            assert len(np.unique(slots)) == len(slots), f"a {TIERS[tier]} slot is in the tree twice"
            ready = np.flatnonzero(pool.state == READY)
            assert len(np.setxor1d(slots, ready)) == 0, f"{TIERS[tier]} slots in the tree and ready slots differ"


def _nothing(blocks: int) -> Slots:
    return np.full(blocks, -1, np.int32)


def _pick(hashes: bytes, positions: NDArray[np.intp]) -> bytes:
    """The hashes at some positions of a packed run."""
    if len(positions) == len(hashes) // HASH_BYTES:
        return hashes
    return np.frombuffer(hashes, "V32")[positions].tobytes()

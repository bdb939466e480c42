"""The cache of one namespace: every decision about its blocks, and nothing else.

Plain functions of the state, the request and the time: no await, no clock, no bytes of blocks. What has to be moved is
put on `planned` for the caller to execute; each transfer ends in `finish`. A session lives in one of the tiers in memory,
and is told slots of that one only.

- A lookup leases the longest prefix that is resident in any tier, and starts to bring the first window of what is
  elsewhere to the session's tier.
- A store leases slots for what is new; nobody sees a block before its commit. Sessions of the paged tier may also
  reserve pages first and name them when they are full (`pages`).
- A slot named to a session has the session's holder bit set first, and loses it by release, commit, abort, or the
  session's end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from itertools import count as counter

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES, ROOT
from tierd.core.admission import EVERYTHING
from tierd.core.audit import audit
from tierd.core.index import Index, Piece
from tierd.core.ladder import TIERS, Ladder
from tierd.core.pages import Pages
from tierd.core.pins import Pins
from tierd.core.plan import (
    DEMAND,
    IO_ERROR,
    MISMATCH,
    OK,
    PREFETCH,
    WRITE_BACK,
    Committed,
    Found,
    Hint,
    Lease,
    Placed,
    Slots,
    Transfer,
    Wait,
    keep_one,
    leading,
)
from tierd.core.policies import make_orders
from tierd.core.pool import Pool
from tierd.core.promotion import Promotion
from tierd.core.publish import positions
from tierd.core.room import Room
from tierd.core.seen import Seen
from tierd.core.session import Session
from tierd.core.stores import Stores
from tierd.core.transfers import Transfers
from tierd.core.write_back import WriteBack
from tierd.errors import Busy, Gone, Invalid


class Cache:
    """One namespace, over the pools of its tiers by name, top first.

    `policies` names the order of eviction of each tier (default: DEFAULTS); `window_share` bounds one promotion to a share of
    the tier that it goes to; without `write_back` nothing goes to nvme, with it what `admission` says; a block that is found
    saves `block_tokens`; `seed` (secret, 64 bits) keeps clients from aiming at the index's hash table.
    """

    def __init__(
        self,
        pools: Mapping[str, Pool],
        *,
        policies: Mapping[str, str] = {},
        window_share: float = 0.25,
        transfer_blocks: int = 64,
        write_back: bool = True,
        admission: str = EVERYTHING,
        block_tokens: int = 1,
        seed: int = 0,
    ) -> None:
        self.ladder = ladder = Ladder(pools)
        self.pools = ladder.pools
        self.index = Index(len(ladder), seed, make_orders(ladder, policies))
        self.sessions: dict[int, Session] = {}
        self.counters: Counter[tuple[str, ...]] = Counter()
        self._block_tokens = block_tokens
        self._seen = Seen(self.counters)
        self.pins = Pins(self.index, ladder, self.counters)
        self._room = Room(self.index, ladder, self.counters)
        self._transfers = Transfers(ladder, self.counters)
        self._promotion = Promotion(self.index, ladder, self._room, self._transfers, window_share, transfer_blocks)
        self.write_back = WriteBack(self.index, ladder, self._room, self._transfers, self.counters, write_back, admission)
        self.pages = Pages(self.index, self._room, self.write_back, self.counters)
        self._ids = counter(1)
        self._stores = Stores(self.index, ladder, self._room, self.write_back, self.counters, self._ids)

    @property
    def planned(self) -> list[Transfer]:
        """Transfers decided but not yet taken by the mover, which takes them out."""
        return self._transfers.planned

    @property
    def hastened(self) -> list[Transfer]:
        """Prefetches that somebody waits for now: whoever executes them should hurry."""
        return self._transfers.hastened

    @property
    def transfers(self) -> dict[int, Transfer]:
        """All transfers that have not ended, by id."""
        return self._transfers.running

    # -- sessions -----------------------------------------------------------------------------------------------------

    def open_session(self, session_id: int, bit: int, tier: int) -> Session:
        """Enter a client of a mapped tier; `bit` is its bit in the holders column."""
        assert session_id not in self.sessions and tier in self.ladder.mapped
        session = self.sessions[session_id] = Session(session_id, bit, tier, self.ladder)
        return session

    def close_session(self, session_id: int) -> None:
        """The client is gone: everything it held is free at once."""
        session = self.sessions.pop(session_id)
        for lease in list(session.leases.values()):
            self._end_lease(session, lease)
        session.drop(session.all_pages())
        session.forget_restored()

    def restore_session(self, session_id: int, bit: int, tier: int, slots: Slots) -> None:
        """Recovery found `slots` with this holder bit: they wait until the session resumes or its process is gone."""
        self.open_session(session_id, bit, tier).restore(slots)

    def resume(self, session_id: int, held: Slots, writing: NDArray[np.bool_]) -> int:
        """A client says which slots it still reads from or (bool per slot) writes to; all else that it was told is free.

        Returns a lease on them or 0. What a paged session holds are pages, each as often as it says: no lease.
        """
        session = self.sessions[session_id]
        kept = np.unique(held)
        mine = np.union1d(session.restored, np.flatnonzero(session.told))
        if len(strangers := np.setdiff1d(kept, mine)):
            raise Invalid(f"resume: slot {strangers[0]} was never told to this session; say only what it was told")
        old, old_pages, lease_id = list(session.leases.values()), session.all_pages(), 0
        if session.paged:  # told again before the old leases let go, so that the bits never clear
            session.hold_again(held)
        elif len(kept):
            lease_id = self._lease_resumed(session, kept)
        for held_before in old:
            self._end_lease(session, held_before)
        session.drop(old_pages)
        session.forget_restored()
        if session.paged:
            session.pool.fill_again(np.unique(held[writing]))
        return lease_id

    def _lease_resumed(self, session: Session, slots: Slots) -> int:
        rows = np.full((len(self.pools), len(slots)), -1, np.int32)
        rows[session.tier] = slots
        everything = np.ones(len(slots), np.bool_)
        lease = Lease(next(self._ids), session.id, session.tier, ROOT, b"", rows, len(slots), everything)
        session.pool.use(slots)
        session.tell(slots)
        session.leases[lease.id] = lease
        return lease.id

    # -- lookup, load, release ----------------------------------------------------------------------------------------

    def lookup(self, session_id: int, hashes: bytes, parent: bytes, now: int) -> Found:
        """Lease the longest prefix of `hashes` behind `parent` that can be had; starts the promotion of its first
        window.
        """
        session = self.sessions[session_id]
        tier, pool = session.tier, session.pool
        self._seen.asked(hashes, now)
        slots, pieces = self._resident(hashes, parent)
        here, blocks = slots[tier], slots.shape[1]
        is_here = here >= 0
        self._remember(hashes, parent, blocks)
        self._offer_again(hashes, parent, slots)
        near = self.ladder.near[tier]
        tiers = self._attribute(hashes, slots, near, is_here if near[0] == tier else slots[near[0]] >= 0)
        self.index.touch(pieces, now, hashes[blocks * HASH_BYTES :])
        if not blocks:
            return Found(0, 0, 0, here, tiers)
        told = blocks
        if is_here.all():
            slots[:tier] = slots[tier + 1 :] = -1
            pool.use(here)
        else:  # behind what is told, hold copies elsewhere where there are any: those here stay evictable
            told = min(int(is_here.argmin()), self._told_max(tier))
            keep_one(slots, tier, told)
            for below, row in zip(self.pools, slots, strict=True):
                below.use(row[row >= 0])
        lease = Lease(next(self._ids), session_id, tier, parent, hashes, slots, blocks, np.zeros(blocks, np.bool_))
        session.leases[lease.id] = lease
        self._tell(session, lease, 0, told, now)
        if told < blocks:
            self._promotion.start(lease, told, DEMAND, now)
            if not is_here[told] and not session.paged and not self._promotion.coming(lease, told):
                session.let_go(lease, slice(told, None))  # report no more than can be delivered
                lease.blocks = told
                self.counters["lookup_busy",] += 1
                if not told:
                    del session.leases[lease.id]
                    return Found(0, 0, 0, here[:0], tiers)
        self.counters["saved", "tokens"] += lease.blocks * self._block_tokens
        return Found(lease.id, lease.blocks, told, here[:told].copy(), tiers)

    def _told_max(self, tier: int) -> int:
        """Blocks that a lookup names at once when more are elsewhere: what it leaves is a window for these."""
        window = self._promotion.window(tier)
        return max(window, self.pools[tier].slots - window)

    def load(self, session_id: int, lease_id: int, first: int, count: int, now: int) -> Slots | Wait:
        """Slots of `count` blocks of a lease from `first`, or of fewer, or Wait; raises Gone and Busy."""
        session = self.sessions[session_id]
        lease = session.lease(lease_id, writing=False)
        size = lease.slots.shape[1]
        if not 0 <= first < size or count < 1:
            raise Invalid(f"load: blocks {first} to {first + count} are not in a lease of {size}")
        last = min(first + count, lease.blocks)
        if (lease.slots[:, first:last].max(0) < 0).any():
            raise Invalid(f"load: some of blocks {first} to {last} of lease {lease_id} were released before")
        self._promotion.catch_up(lease, first, last)
        end = _risen(lease, first, last)
        if end < lease.blocks:
            self._promotion.start(lease, end, DEMAND, now)
        if end > first:
            self._tell(session, lease, first, end, now)
            slots: Slots = lease.here[first:end].copy()
            return slots
        if first >= lease.blocks:
            raise Gone(f"block {first} of lease {lease_id} is lost")
        if not (transfer := self._promotion.coming(lease, first)):
            self.counters["load_busy",] += 1
            raise Busy("all slots of the tier are held; load the blocks you have, release them and ask again")
        return Wait([transfer])

    def release(self, session_id: int, lease_id: int, first: int = 0, count: int | None = None) -> None:
        """End a reading lease, or give back `count` blocks of it from `first`."""
        session = self.sessions[session_id]
        lease = session.lease(lease_id, writing=False)
        if count is None:
            self._end_lease(session, lease)
            return
        end = min(first + count, len(lease.told))
        if not 0 <= first < end:
            raise Invalid(f"release: blocks {first} to {first + count} are not in a lease of {len(lease.told)}")
        session.let_go(lease, slice(first, end))

    def prefetch(self, tier: int, hashes: bytes, parent: bytes, now: int) -> int:
        """Start to bring the head of a prefix to a tier, without a lease; returns how many blocks are or will be there."""
        slots, pieces = self._resident(hashes, parent)
        blocks = slots.shape[1]
        self.index.touch(pieces, now)
        first = leading(slots[tier] >= 0)
        if first == blocks:
            return first
        nobody = Lease(0, 0, tier, parent, hashes, slots, blocks, np.zeros(blocks, np.bool_))
        self._promotion.start(nobody, first, PREFETCH, now)
        return leading((slots[tier] >= 0) | (self._transfers.arriving(tier, slots) > 0))

    # -- store, commit, abort -----------------------------------------------------------------------------------------

    def store(self, session_id: int, hashes: bytes, parent: bytes, now: int) -> Placed:
        """Slots for the blocks that are new; raises Gone when the parent is unknown (see Stores.store)."""
        return self._stores.store(self.sessions[session_id], hashes, parent, now)

    def commit(self, session_id: int, lease_id: int, count: int | None, now: int) -> Committed:
        """Publish the first `count` blocks of a writing lease (default: all) and end it; the others are aborted."""
        return self._stores.commit(self.sessions[session_id], lease_id, count, now)

    def abort(self, session_id: int, lease_id: int) -> None:
        """Give the slots of a writing lease back."""
        session = self.sessions[session_id]
        self._stores.abort(session, session.lease(lease_id, writing=True))

    def _end_lease(self, session: Session, lease: Lease) -> None:
        if lease.writing:
            self._stores.abort(session, lease)
        else:
            del session.leases[lease.id]
            session.let_go(lease, slice(None))

    # -- pages --------------------------------------------------------------------------------------------------------

    def reserve(self, session_id: int, count: int, now: int) -> Slots:
        """Up to `count` pages to fill, for blocks whose hashes do not exist yet; raises Busy when there is none."""
        return self.pages.reserve(self.sessions[session_id], count, now)

    def commit_pages(self, session_id: int, slots: Slots, parents: bytes, hashes: bytes, now: int) -> Slots:
        """Name reserved pages; returns a code or the slot of a duplicate for each (see Pages.commit)."""
        return self.pages.commit(self.sessions[session_id], slots, parents, hashes, now)

    def release_pages(self, session_id: int, slots: Slots) -> None:
        """End a session's hold on pages, once for each time that they are named."""
        self.pages.release(self.sessions[session_id], slots)

    def ended(self, block: bytes, hint: Hint) -> None:
        """A turn has ended whose last block this is: the hint stays with it, where the next turn would continue."""
        self.counters["turn", hint.turn] += 1
        if entry := self.index.find(block):
            self.index.hinted(entry[0], hint)

    # -- moving -------------------------------------------------------------------------------------------------------

    def plan_write_back(self, target: int, blocks_max: int) -> bool:
        """Plan one transfer of at most `blocks_max` blocks down to a tier; False when nothing can be planned now."""
        return self.write_back.plan(target, blocks_max)

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
        source, target = self.ladder.place(transfer.source), self.ladder.place(transfer.target)
        if target == self.ladder.closed:
            self.write_back.finish(transfer, good, now)
        else:
            self._promotion.finish(transfer, good)
        if source == self.ladder.closed and not good.all():
            self._promotion.distrust(transfer, ~good)
        if transfer.reason == WRITE_BACK:
            self.write_back.offer(target, transfer.parents[:HASH_BYTES], transfer.hashes, transfer.number)
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
        kept = [piece._replace(blocks=min(piece.blocks, blocks - at)) for at, piece in positions(pieces) if at < blocks]
        return slots[:, :blocks], kept

    def _attribute(self, hashes: bytes, slots: Slots, near: NDArray[np.intp], on_top: NDArray[np.bool_]) -> dict[str, int]:
        """In which kind of tier each block asked for is, of several the first of `near`; the values sum to their number."""
        asked, blocks = len(hashes) // HASH_BYTES, slots.shape[1]
        found = dict.fromkeys(TIERS, 0)
        found[self.ladder.kinds[near[0]]] = top = int(np.count_nonzero(on_top))
        if top < blocks:
            ordered = slots[near] if self.ladder.paged > 1 else slots  # with one device, near is from top to bottom
            there = np.bincount((ordered >= 0).argmax(0)).tolist()
            for place, number in zip(near[1:].tolist(), there[1:], strict=False):
                found[self.ladder.kinds[place]] += number
        pending = self._stores.leading(hashes, blocks)
        miss = asked - blocks - pending
        tiers = {**found, "remote": 0, "pending": pending, "miss": miss}
        for name, number in tiers.items():
            if number:
                self.counters["lookup", name] += number
        return tiers

    def _remember(self, hashes: bytes, parent: bytes, blocks: int) -> None:
        """Tell admission what was asked for, from the root on: an engine may name no more than what it has not got itself."""
        admission, above = self.write_back.admission, b""
        if admission.sightings is None:
            return
        if parent != ROOT and (entry := self.index.find(parent)):
            node, at = entry
            end = (at + 1 - len(node)) * HASH_BYTES
            chain = b"".join([member.hashes for member in reversed(self.index.path(node))])
            above = chain[:end] if end else chain
        admission.asked(above + hashes, len(above) // HASH_BYTES, len(above) // HASH_BYTES + blocks)

    def _offer_again(self, hashes: bytes, parent: bytes, slots: Slots) -> None:
        """What is read and is not in the prefix-closed tier was turned away before, and is worth more now."""
        closed = self.ladder.closed
        if self.write_back.admission.kind != EVERYTHING and closed in self.write_back.queues:
            above = leading(slots[closed] >= 0)
            for tier in reversed(self.ladder.mapped):
                if count := leading(slots[tier, above:] >= 0):
                    self.write_back.offer(tier, parent, hashes[: (above + count) * HASH_BYTES])
                    break

    def _tell(self, session: Session, lease: Lease, first: int, end: int, now: int) -> None:
        """Name the slots of blocks [first, end) of a reading lease to its session, unless that was done before."""
        told = lease.told[first:end]
        slots = lease.here[first:end][~told] if told.any() else lease.here[first:end]
        told[:] = True
        session.pool.touched(slots, now)
        session.tell(slots)

    def check(self) -> None:
        """Raise AssertionError if leases, transfers, slots and the tree do not add up; for tests and idle time."""
        leases = [lease for session in self.sessions.values() for lease in session.leases.values()]
        self._stores.check(leases)
        audit(self.index, self.ladder, list(self.sessions.values()), list(self.transfers.values()), self.pins)


def _risen(lease: Lease, first: int, end: int) -> int:
    """The first block in [first, end) that is not in the lease's tier yet, or `end`."""
    return first + leading(lease.here[first:end] >= 0)

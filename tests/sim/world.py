"""A cache with everything around it, in one process: directories, content of slots, clients that copy late, transfers
under way, and a naive model that says what every answer must be.

The content of a slot is the hash that was written there last. Whoever gets a slot to fill soils it at once, a transfer
copies what is in its source when it ends, and clients look at what they hold after every step: a slot that is reused
under somebody shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat

import numpy as np

from tests.sim.clients import Claim, Client, Place
from tests.sim.directories import SOILED, Segment, rows_of
from tests.sim.removed import check_removed, listened
from tests.sim.sums import check_sums
from tests.sim.tiers import check_ways, feeds_another, kind, nearest, tier_sizes
from tierd.block import HASH_BYTES, ROOT, split
from tierd.core.admission import EVERYTHING
from tierd.core.cache import Cache
from tierd.core.ladder import CLOSED, TIERS
from tierd.core.plan import MISMATCH, NO_ROOM, OK, PENDING, PREFETCH, STORED, Committed, Found, Transfer, Wait
from tierd.core.policy.chd import Chd
from tierd.core.pool import FILLING, QUARANTINED, READY, Pool
from tierd.core.recovery import recover
from tierd.errors import Busy, Gone

UPPER, LOWER = 0, 1
"""Places of cpu and nvme in a world without a gpu tier."""
SETTLED_PER_LESSON = 16


class World:
    """`where` is the model: the slot of every copy, by hash and tier. All methods check what the cache answers.

    `upper`, `lower` and `gpu` (on each of `devices`) are numbers of segments; without any there is no such tier, but cpu.
    `policies` are orders of eviction by tier; chd learns more often, or would learn nothing in so short a life.
    """

    def __init__(
        self,
        upper: int = 3,
        lower: int = 5,
        slots: int = 8,
        window_share: float = 0.25,
        gpu: int = 0,
        policies: Mapping[str, str] = {},
        admission: str = EVERYTHING,
        devices: int = 1,
    ) -> None:
        self.slots, self.window_share, self.now = slots, window_share, 1_000_000
        self.policies, self.admission = policies, admission
        self._settled = 0
        sizes = tier_sizes(gpu, upper, lower, devices)
        self.names = list(sizes)
        self.tiers = len(self.names)
        self.mapped = [at for at, name in enumerate(self.names) if name != CLOSED]
        self.closed = len(self.mapped)
        self.clients: dict[int, Client] = {}
        self.where: dict[bytes, dict[int, int]] = {}
        self.known: set[bytes] = set()
        self.parents: dict[bytes, bytes] = {}
        self.committed: set[bytes] = set()
        self.running: list[Transfer] = []
        self.gaps = False
        """A fault, or a crash amid writing, may have left gaps in the lower tier."""
        self.losses = False
        """A fault or a vacated segment may have taken blocks that are leased."""
        self._ids = iter(range(1, 1 << 40))
        self._start([{} for _ in self.names])
        for tier, segments in enumerate(sizes.values()):
            for _ in range(segments):
                self.add_segment(tier)

    # -- clients ------------------------------------------------------------------------------------------------------

    def open(self, tier: int = -1) -> Client:
        """A new client process, by default in the cpu tier."""
        taken = {client.bit for client in self.clients.values()}
        tier = self.names.index("cpu") if tier < 0 else tier
        client = Client(next(self._ids), next(bit for bit in range(64) if bit not in taken), tier)
        self.clients[client.id] = client
        self.cache.open_session(client.id, client.bit, tier)
        return client

    def kill(self, client: Client) -> None:
        """The client's process is gone."""
        del self.clients[client.id]
        self.cache.close_session(client.id)
        self.settle()

    def resume(self, client: Client, keep: Iterable[bool] = repeat(True)) -> int:
        """The client comes back and says what it still holds: the places for which `keep` says so."""
        kept = (Claim([], False), Claim([], True))
        for claim, (writing, place, block), stays in zip(
            repeat(kept), [(w, *entry) for w in (False, True) for entry in client.places(w)], keep, strict=False
        ):
            if stays:
                claim[writing].places[len(claim[writing].hashes)] = place
                claim[writing].hashes.append(block)
        held = [self._number(client.tier, place) for claim in kept for place in claim.places.values()]
        writing = [claim.writing for claim in kept for _ in claim.places]
        lease = self.cache.resume(client.id, np.array(held, np.int32), np.array(writing, np.bool_))
        assert bool(lease) == bool(held)
        client.claims = {lease: kept[False], -lease: kept[True]} if lease else {}
        client.attached = True
        self.settle()
        return lease

    # -- reading ------------------------------------------------------------------------------------------------------

    def lookup(self, client: Client, hashes: list[bytes], parent: bytes = ROOT) -> Found:
        """Look a chain up, and compare every number of the answer with the model."""
        expected = self._prefix(hashes, parent)
        places = (nearest(self.names, client.tier, self.where[block]) for block in hashes[:expected])
        counted = Counter(kind(self.names[place]) for place in places)
        pending = {block for other in self.clients.values() for block in self._filled(other)}
        waiting = next((at for at, block in enumerate(hashes[expected:]) if block not in pending), len(hashes) - expected)
        found = self.cache.lookup(client.id, b"".join(hashes), parent, self.now)
        self.settle(evicts={client.tier})
        assert sum(found.tiers.values()) == len(hashes), "the tiers do not sum to the blocks asked"
        assert [found.tiers[name] for name in TIERS] == [counted[name] for name in TIERS]
        assert found.tiers["pending"] == waiting
        assert found.told <= found.blocks <= expected and found.told == len(found.slots)
        assert bool(found.lease) == bool(found.blocks)
        assert set(hashes[: found.blocks]) <= self.committed, "a lookup found what was not committed"
        if found.blocks < expected:
            assert found.blocks == found.told
            self._assert_nothing_evictable(client.tier, spared=hashes)
        if found.lease:
            client.claims[found.lease] = Claim(hashes[: found.blocks], False)
            self._told(client, client.claims[found.lease], 0, found.slots.tolist())
        return found

    def load(self, client: Client, lease: int, first: int, count: int) -> int | Wait | None:
        """Load blocks of a lease: how many were named, or a Wait, or None for Busy or Gone."""
        claim = client.claims[lease]
        try:
            slots = self.cache.load(client.id, lease, first, count, self.now)
        except Gone:
            assert self.losses, "a leased block is lost without a fault"
            return None
        except Busy:
            self._assert_nothing_evictable(client.tier)
            return None
        finally:
            self.settle(evicts={client.tier})
        if isinstance(slots, Wait):
            assert slots.transfers and set(slots.transfers) <= set(self.cache.transfers), "waiting for nothing"
            return slots
        assert 0 < len(slots) <= count
        self._told(client, claim, first, slots.tolist())
        return len(slots)

    def release(self, client: Client, lease: int, first: int = 0, count: int | None = None) -> None:
        """Release a reading lease, or a part of it."""
        self.cache.release(client.id, lease, first, count)
        if count is None:
            del client.claims[lease]
            client.claims.pop(-lease, None)
        else:
            for claim in (client.claims[lease], *filter(None, [client.claims.get(-lease)])):
                claim.places = {at: place for at, place in claim.places.items() if not first <= at < first + count}
        self.settle()

    def prefetch(self, hashes: list[bytes], parent: bytes = ROOT, tier: int = 0) -> int:
        """Prefetch a chain."""
        expected = self._prefix(hashes, parent)
        there = next((at for at, block in enumerate(hashes[:expected]) if tier not in self.where[block]), expected)
        blocks = self.cache.prefetch(tier, b"".join(hashes), parent, self.now)
        assert there <= blocks <= expected
        self.settle(evicts={tier})
        return blocks

    # -- writing ------------------------------------------------------------------------------------------------------

    def store(self, client: Client, hashes: list[bytes], parent: bytes = ROOT) -> int | None:
        """Ask for slots: the lease, 0 when there is nothing to write, None when the parent is not known."""
        pending = {block for other in self.clients.values() for block in self._filled(other)}
        known = parent == ROOT or parent in self.known or parent in pending
        try:
            placed = self.cache.store(client.id, b"".join(hashes), parent, self.now)
        except Gone:
            assert not known, "store refused a parent that is known"
            return None
        assert known, "store took blocks without a parent"
        self.parents.update(zip(hashes, [parent, *hashes[:-1]], strict=True))
        claim, short = Claim(hashes, True), False
        for at, (block, code) in enumerate(zip(hashes, placed.slots.tolist(), strict=True)):
            if block in self.where:
                assert code == STORED
            elif block in pending:
                assert code == PENDING
            else:
                assert (code >= 0 and not short) or code == NO_ROOM
                short |= code == NO_ROOM
                if code >= 0:
                    claim.places[at] = self._place(client.tier, code)
        self.settle(evicts={client.tier})
        if short and not self._may_turn_away(client.tier):
            self._assert_nothing_evictable(client.tier, spared=[*hashes, *self._ancestors(hashes[0])])
        for place in claim.places.values():
            self._take(place)
        assert bool(placed.lease) == bool(claim.places)
        if placed.lease:
            client.claims[placed.lease] = claim
        return placed.lease

    def commit(self, client: Client, lease: int, count: int | None = None) -> Committed:
        """Write and commit the first `count` blocks of a lease."""
        client.write()
        claim = client.claims.pop(lease)
        filled = [(claim.hashes[at], self._number(client.tier, place)) for at, place in claim.places.items()]
        count = len(filled) if count is None else min(count, len(filled))
        alive = [(block, slot) for block, slot in filled[:count] if self.cache.pools[client.tier].state[slot] == FILLING]
        parent = self.parents[claim.hashes[0]]
        if parent != ROOT and parent not in self.known:
            alive = []
        done = self.cache.commit(client.id, lease, count, self.now)
        assert (done.committed, done.dropped) == (len(alive), count - len(alive))
        self.committed.update(block for block, _ in alive)
        self.settle(adds={(block, client.tier): slot for block, slot in alive})
        assert all(block in self.where for block, _ in alive), "a committed block is not there"
        return done

    def abort(self, client: Client, lease: int) -> None:
        """Give a store up."""
        del client.claims[lease]
        self.cache.abort(client.id, lease)
        self.settle()

    # -- moving -------------------------------------------------------------------------------------------------------

    def plan_write_back(self, blocks_max: int) -> bool:
        """Let the cache plan one write-back, to the highest tier that waits for something."""
        for target in self.cache.write_back.queues:
            planned = self.cache.plan_write_back(target, blocks_max)
            assert planned == bool(self.cache.planned)
            self.settle(evicts={target})
            if planned:
                return True
        return False

    def finish(self, transfer: Transfer, outcome: list[int] | None = None) -> None:
        """End a transfer; `outcome` says for each block what became of it."""
        lied = self.cache.pools[self.names.index(transfer.source)].state[transfer.source_slots] == QUARANTINED
        outcome = [OK] * len(transfer) if outcome is None else outcome
        outcome = [MISMATCH if bad else code for code, bad in zip(outcome, lied, strict=True)]  # as to who read it before
        self.running.remove(transfer)
        down = transfer.target == CLOSED
        for at, code in enumerate(outcome):
            self._arrive(transfer, at, code)
        self._moved_ahead += outcome.count(OK) if transfer.reason == PREFETCH else 0
        self.gaps |= outcome.count(OK) < len(outcome)
        self.losses |= not down and outcome.count(OK) < len(outcome)
        self.cache.finish(transfer, np.array(outcome, np.uint8), self.now)
        bad = any(outcome) and not down
        self.settle(evicts={self.closed} if bad else set())
        if down and transfer.id not in self.cache.transfers and not self.gaps:
            self._assert_entered(transfer, outcome)

    def run_all(self, blocks_max: int = 8) -> None:
        """Move everything that is to be moved, without faults."""
        while True:
            while self.running:
                self.finish(self.running[0])
            if not self.plan_write_back(blocks_max):
                return

    def _arrive(self, transfer: Transfer, at: int, code: int) -> None:
        source, target = (self.names.index(name) for name in (transfer.source, transfer.target))
        block = transfer.hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES]
        segment, index = self._place(source, int(transfer.source_slots[at]))
        assert segment.content[index] == block or code == MISMATCH, "the source of a transfer was reused"
        to, there = self._place(target, int(transfer.target_slots[at]))
        if code == OK:
            to.content[there] = block
            self._landed.add(((block, target), int(transfer.target_slots[at])))
        elif code == MISMATCH:
            segment.content[index] = SOILED
        if target == self.closed:
            (to.directory.ready if code == OK else to.directory.free)([there])

    # -- segments and lives -------------------------------------------------------------------------------------------

    def add_segment(self, tier: int, segment: Segment | None = None) -> None:
        """Give a tier one more segment."""
        segment = segment or Segment(self.slots)
        self.segments[tier][self.cache.pools[tier].add_segment(segment.directory, self.now)] = segment

    def vacate(self, tier: int, ordinal: int) -> None:
        """Start to give a segment up."""
        self.losses = True
        self.cache.vacate(tier, ordinal)
        self.settle(evicts={tier})
        assert ordinal not in {at[tier] // self.slots for at in self.where.values() if tier in at}, "still found"

    def collect(self) -> int:
        """Take away the segments that nobody uses any more; returns how many."""
        gone = [(t, at) for t, pool in enumerate(self.cache.pools) for at in pool.closing if pool.is_idle(at)]
        for tier, ordinal in gone:
            self.cache.pools[tier].remove_segment(ordinal)
            self.segments[tier].pop(ordinal).content[:] = [SOILED] * self.slots
        return len(gone)

    def restart(self, arrived: Iterable[bool] = repeat(False), keeps_memory: bool = True) -> None:
        """Kill the daemon and start it again. `arrived` says for each block on its way down whether it is on the medium
        already. Without memory all clients start over."""
        before = self._survivors(range(self.tiers) if keeps_memory else range(self.closed, self.tiers))
        flying = [(t, at) for t in self.running if t.target == CLOSED for at in range(len(t))]
        for (transfer, at), there in zip(flying, arrived, strict=False):
            if there:
                self._arrive(transfer, at, OK)
        self.gaps |= bool(flying) or bool(self.cache.transfers)
        if any(pool.counts()["retired"] for pool in self.cache.pools[self.closed :]):
            self.gaps = True  # what left the tree, but was still read, is on the medium
        self.note_recency()
        if not keeps_memory:
            self.gaps = True
            self.clients.clear()
            for tier in self.mapped:
                self.segments[tier] = {at: Segment(self.slots) for at in self.segments[tier]}
        self._start(self.segments)
        for client in self.clients.values():
            client.attached = False
            held = [number for number, (segment, at) in self._numbered(client.tier) if at in segment.held(client.bit)]
            self.cache.restore_session(client.id, client.bit, client.tier, np.array(held, np.int32))
        tree, self.known = self._tree()
        for block, tiers in before.items():
            assert tiers <= set(tree.get(block, {})), "a block was lost to a restart"
        assert set(tree) <= self.committed, "a restart brought up what was not committed"
        self.where = tree

    def _start(self, segments: list[dict[int, Segment]]) -> None:
        self.running = []
        self._moved_ahead = 0
        self._landed: set[tuple[tuple[bytes, int], int]] = set()
        self.segments: list[dict[int, Segment]] = [{} for _ in self.names]
        pools = {name: Pool(self.slots) for name in self.names}
        chosen = {"policies": self.policies, "admission": self.admission}
        self.cache = listened(Cache(pools, **chosen, window_share=self.window_share, seed=7))
        for tier, old in enumerate(segments):
            for segment in old.values():
                self.add_segment(tier, segment)
        dead = ~np.bitwise_or.reduce([np.uint64(1 << client.bit) for client in self.clients.values()] or [np.uint64(0)])
        for segment in self._in_memory():
            segment.directory.holders &= ~dead
        recover(self.cache, [rows_of(tier, self.slots) for tier in self.segments], self.now)

    def note_recency(self) -> None:
        """Write last use and use counts to the directories, as the daemon does once in a while."""
        touched, self.cache.index.touched = self.cache.index.touched, {}
        for node in touched:
            for pool, row in zip(self.cache.pools, node.slots, strict=True):
                for ordinal, local, _ in pool.by_segment(row[row >= 0]):
                    pool.segments[ordinal].touch(local, node.last_use, node.uses)

    # -- the model ----------------------------------------------------------------------------------------------------

    def settle(self, evicts: set[int] = frozenset(), adds: dict[tuple[bytes, int], int] | None = None) -> None:  # type: ignore[assignment]
        """Take over what was planned, and compare the tree with the model.

        Copies go only from tiers that may evict, and come only from where bytes were written.
        """
        for transfer in self.cache.planned:
            target = self.names.index(transfer.target)
            for slot in transfer.target_slots.tolist():
                self._take(self._place(target, slot))
            if target == self.closed:
                hashes, parents = split(transfer.hashes), split(transfer.parents)
                for slot, block, parent in zip(transfer.target_slots.tolist(), hashes, parents, strict=True):
                    segment, at = self._place(target, slot)
                    segment.directory.begin([at], block, parent)
        self._settled += 1
        for order in self.cache.index.orders if self._settled % SETTLED_PER_LESSON == 0 else ():
            if isinstance(order, Chd):
                order.survival.learn(self.now)
        tree, self.known = self._tree()
        check_ways(self.names, self.cache.planned, tree)
        self.running += self.cache.planned
        self.cache.planned.clear()
        come = {(b, t): slot for b, at in tree.items() for t, slot in at.items() if self.where.get(b, {}).get(t) != slot}
        gone = {(b, t) for b, at in self.where.items() for t in at if t not in tree.get(b, {})}
        assert {tier for _, tier in gone} <= set(evicts), "copies are gone from a tier that had no reason to evict"
        assert come.items() <= self._landed | (adds or {}).items(), "copies came from nowhere"
        check_removed(self.cache, self.where, tree)
        self.where = tree

    def check(self, deep: bool = True) -> None:
        """Raise AssertionError if anything that must hold between two steps does not; `deep` also asks the cache itself."""
        if deep:
            self.cache.check()
        for block, at in self.where.items():
            for tier, slot in at.items():
                segment, index = self._place(tier, slot)
                assert segment.content[index] == block, f"a {self.names[tier]} slot has other bytes than the index says"
        if not self.gaps:
            for block, at in self.where.items():
                parent = self.parents[block]
                has_parent = parent == ROOT or self.closed in self.where.get(parent, {})
                assert self.closed not in at or has_parent, "nvme is not prefix-closed"
        check_sums(self.cache, self._moved_ahead)
        self._check_clients()

    def _check_clients(self) -> None:
        bits = {id(segment): segment.directory.holders.tolist() for segment in self._in_memory()}
        alive = sum(1 << client.bit for client in self.clients.values())
        assert all(not word & ~alive for words in bits.values() for word in words), "a bit of nobody"
        writers: dict[tuple[int, int], int] = {}
        for client in self.clients.values():
            for writing in (False, True):
                for (segment, at), block in client.places(writing):
                    assert bits[id(segment)][at] >> client.bit & 1, "a told slot does not carry the bit"
                    if not writing:
                        assert segment.content[at] == block, "somebody wrote into a slot that a client reads"
                    elif writers.setdefault((id(segment), at), client.id) != client.id:
                        raise AssertionError("two clients write into one slot")

    def _assert_entered(self, transfer: Transfer, outcome: list[int]) -> None:
        """A block that was written whole is below, unless its parent is not, or its segment is being given up."""
        closing = self.cache.pools[self.closed].closing
        blocks, parents = list(split(transfer.hashes)), list(split(transfer.parents))
        for block, parent, slot, code in zip(blocks, parents, transfer.target_slots.tolist(), outcome, strict=True):
            has_parent = parent == ROOT or self.closed in self.where.get(parent, {})
            if code == OK and has_parent and block in self.known and slot // self.slots not in closing:
                assert self.closed in self.where.get(block, {}), "a block that was written is not found below"

    def _assert_nothing_evictable(self, tier: int, spared: Iterable[bytes] = ()) -> None:
        """There is no slot of the tier that could have been had; of the asker's own chain, what is only there may stay."""
        pool = self.cache.pools[tier]
        own = {self.where[block][tier] for block in spared if self.where.get(block, {}).keys() == {tier}}
        idle = set(np.flatnonzero((pool.state == READY) & (pool.users == 0)).tolist()) - own
        assert pool.free == 0 and not idle, f"refused, though {pool.free} slots are free and {len(idle)} evictable"

    def _may_turn_away(self, tier: int) -> bool:
        """Whether the order of a tier may refuse what is new: chd's, where there is no other tier to choose for itself."""
        return isinstance(self.cache.index.orders[tier], Chd) and not feeds_another(self.names, tier)

    def _tree(self) -> tuple[dict[bytes, dict[int, int]], set[bytes]]:
        """What the index says: where each resident block is, and all blocks that it knows."""
        where: dict[bytes, dict[int, int]] = {}
        known: set[bytes] = set()
        for node in self.cache.index.nodes():
            for block, *slots in zip(split(node.hashes), *node.slots.tolist(), strict=True):
                known.add(block)
                if at := {tier: slot for tier, slot in enumerate(slots) if slot >= 0}:
                    where[block] = at
        return where, known

    def _survivors(self, tiers: range) -> dict[bytes, set[int]]:
        """The copies that a restart must find again: those whose chain back to the root is in these tiers."""
        have = {block: set(at) & set(tiers) for block, at in self.where.items()}
        return {b: at for b, at in have.items() if at and all(have.get(a) for a in self._ancestors(b))}

    def _ancestors(self, block: bytes) -> list[bytes]:
        chain = []
        while (block := self.parents.get(block, ROOT)) != ROOT:
            chain.append(block)
        return chain

    def _prefix(self, hashes: list[bytes], parent: bytes) -> int:
        if parent != ROOT and parent not in self.known:
            return 0
        return next((at for at, block in enumerate(hashes) if block not in self.where), len(hashes))

    def _filled(self, client: Client) -> Iterator[bytes]:
        """Blocks that the daemon knows to be written by a client."""
        if client.attached:
            for lease in client.leases(writing=True):
                yield from (client.claims[lease].hashes[at] for at in client.claims[lease].places)

    def _told(self, client: Client, claim: Claim, first: int, slots: list[int]) -> None:
        for at, slot in enumerate(slots, first):
            claim.places[at] = segment, index = self._place(client.tier, slot)
            assert segment.content[index] == claim.hashes[at], "a slot was named that holds another block"

    def _take(self, place: Place) -> None:
        """A slot is handed out to be filled: nobody else may have to do with it."""
        segment, at = place
        for client in self.clients.values():
            for writing in (False, True):
                assert place not in [other for other, _ in client.places(writing)], "a told slot was handed out again"
        segment.content[at] = SOILED

    def _in_memory(self) -> Iterator[Segment]:
        yield from (segment for tier in self.mapped for segment in self.segments[tier].values())

    def _place(self, tier: int, slot: int) -> Place:
        return self.segments[tier][slot // self.slots], slot % self.slots

    def _number(self, tier: int, place: Place) -> int:
        return next(number for number, other in self._numbered(tier) if other == place)

    def _numbered(self, tier: int) -> Iterator[tuple[int, Place]]:
        for ordinal, segment in self.segments[tier].items():
            yield from ((ordinal * self.slots + at, (segment, at)) for at in range(self.slots))

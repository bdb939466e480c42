"""What the verbs about blocks do: from a checked message to its reply. Each method reads like the story of its verb.

A verb that never waits answers at once; one that may wait (lookup, load, store, reserve) returns how it goes on then, which the
server begins and gives a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from tierd import clock
from tierd.block import HASH_BYTES
from tierd.config import Limits
from tierd.core.pins import Term
from tierd.core.plan import Hint, Wait
from tierd.errors import Busy, Gone, Invalid
from tierd.keeper import Keeper
from tierd.pinboard import Pinboard
from tierd.recorder import Recorder
from tierd.space import Attached, Slots, Space, give_segments
from tierd.wire.messages import TURN_ENDS, Answer, Reply, Request, pack_slots, unpack_slots


class Verbs:
    """Verbs of a session. The cache decides, the keeper finds room and moves; here is only what may be asked and is told."""

    def __init__(self, limits: Limits, keeper: Keeper, recorder: Recorder, pinboard: Pinboard) -> None:
        self._limits, self._keeper, self._recorder, self._pinboard = limits, keeper, recorder, pinboard

    def lookup(self, session: Attached, arguments: Request) -> Answer:
        """Lease the longest prefix, and name the slots of what can be read at once."""
        self._check_lease_limit(session)
        hashes = self._hashes(arguments)
        if not session.arena.pool.slots and session.space.cache.index.blocks:
            return partial(self._lookup_later, session, hashes, arguments["parent"])
        return self._find_prefix(session, hashes, arguments["parent"])

    async def _lookup_later(self, session: Attached, hashes: bytes, parent: bytes) -> Reply:
        """All blocks are below, and the first segment to bring them up to is still being made."""
        with suppress(Busy):
            await self._keeper.supply(session.space, session.tier, 1)
        self._check_attached(session)
        return self._find_prefix(session, hashes, parent)

    def _find_prefix(self, session: Attached, hashes: bytes, parent: bytes) -> Reply:
        cache, now = session.space.cache, clock.unix_milliseconds()
        if self._recorder.is_on:
            self._recorder.asked(session.space, hashes, parent, now)
        found = cache.lookup(session.id, hashes, parent, now)
        if cache.planned or cache.hastened:
            self._keeper.pump(session.space)
            self._keeper.supply_ahead(session.space, session.tier)
        self._introduce(session, found.slots)
        return {
            "lease": found.lease,
            "blocks": found.blocks,
            "told": found.told,
            "slots": pack_slots(found.slots),
            "tiers": found.tiers,
        }

    def load(self, session: Attached, arguments: Request) -> Answer:
        """Name the slots of blocks that have to be brought up first."""
        first, count = arguments["first"], arguments["count"]
        arena = session.arena
        if arena.pool.free < count and self._keeper.can_grow(arena):
            return partial(self._load_later, session, arguments["lease"], first, count, None)
        answer = self._try_load(session, arguments["lease"], first, count)
        if isinstance(answer, dict):
            return answer
        return partial(self._load_later, session, arguments["lease"], first, count, answer)

    async def _load_later(self, session: Attached, lease: int, first: int, count: int, wait: Wait | None) -> Reply:
        """Grow rather than evict, then wait for the transfers that bring the blocks."""
        if wait is None:
            await self._keeper.supply(session.space, session.tier, count)
        while True:
            if wait is not None:
                await self._ended(session.space, wait)
            self._check_attached(session)
            answer = self._try_load(session, lease, first, count)
            if isinstance(answer, dict):
                return answer
            wait = answer

    async def _ended(self, space: Space, wait: Wait) -> None:
        """Until one of the transfers has ended."""
        ended = [asyncio.ensure_future(space.ended(transfer).wait()) for transfer in wait.transfers]
        try:
            await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ended:
                task.cancel()

    def _check_attached(self, session: Attached) -> None:
        if session.id not in session.space.sessions:
            raise Gone("the session has ended")

    def _try_load(self, session: Attached, lease: int, first: int, count: int) -> dict[str, Any] | Wait:
        cache = session.space.cache
        slots = cache.load(session.id, lease, first, count, clock.unix_milliseconds())
        if cache.planned or cache.hastened:
            self._keeper.pump(session.space)
        if isinstance(slots, Wait):
            return slots
        self._introduce(session, slots)
        return {"first": first, "count": len(slots), "slots": pack_slots(slots)}

    def release(self, session: Attached, arguments: Request) -> Reply:
        """End a lease, or a part of it."""
        if arguments["first"] is not None and arguments["count"] is None:
            raise Invalid("release: first without count: leave both out to end the lease, or say how many")
        session.space.cache.release(session.id, arguments["lease"], arguments["first"] or 0, arguments["count"])
        return {}

    def store(self, session: Attached, arguments: Request) -> Answer:
        """Name slots for what is new; waits only while the namespace grows."""
        self._check_lease_limit(session)
        hashes = self._hashes(arguments)
        parent = arguments["parent"]
        return self._supplied(session, len(hashes) // HASH_BYTES, lambda: self._place(session, hashes, parent))

    def _supplied(self, session: Attached, count: int, answer: Callable[[], Reply]) -> Answer:
        """The answer, after the tier has grown if it has to for `count` blocks and can."""
        arena = session.arena
        if arena.pool.free >= count or not (self._keeper.can_grow(arena) or not arena.pool.slots):
            return answer()

        async def later() -> Reply:
            await self._keeper.supply(session.space, session.tier, count)
            self._check_attached(session)
            return answer()

        return later

    def _place(self, session: Attached, hashes: bytes, parent: bytes) -> Reply:
        placed = session.space.cache.store(session.id, hashes, parent, clock.unix_milliseconds())
        self._introduce(session, placed.slots[placed.slots >= 0])
        self._keeper.supply_ahead(session.space, session.tier)
        return {"lease": placed.lease, "slots": pack_slots(placed.slots)}

    def commit(self, session: Attached, arguments: Request) -> Reply:
        """Make written blocks visible, pin them if that is wanted and may be, and start to write them back."""
        cache, lease, count = session.space.cache, arguments["lease"], arguments["count"]
        last = cache.sessions[session.id].lease(lease, writing=True).last_hash(count) if arguments["pin"] else b""
        done = cache.commit(session.id, lease, count, clock.unix_milliseconds())
        asyncio.get_running_loop().call_soon(self._keeper.pump, session.space)
        reply = {"committed": done.committed, "dropped": done.dropped}
        return reply | {"pinned": self._pin(session.space, last)} if last else reply

    def keep(self, session: Attached, arguments: Request) -> Reply:
        """Pin the chain of a request for a time, unless there is no room for it beside others."""
        term = Term(arguments["priority"], clock.unix_milliseconds() + arguments["ttl_ms"])
        try:
            return {"kept": self._pinboard.keep(session.space, arguments["block"], term)}
        except (Busy, Gone):
            return {"kept": 0}

    def _pin(self, space: Space, block: bytes) -> int:
        """How many blocks are pinned: none where pins may hold no more, or where the chain has a gap."""
        try:
            return self._pinboard.pin(space, block)
        except (Busy, Gone):
            return 0

    def abort(self, session: Attached, arguments: Request) -> Reply:
        """Give the slots of a store back."""
        session.space.cache.abort(session.id, arguments["lease"])
        return {}

    def reserve(self, session: Attached, arguments: Request) -> Answer:
        """Name pages to fill whose blocks have no hashes yet; waits only while the namespace grows."""
        count = min(arguments["count"], self._limits.blocks_per_request_max)
        return self._supplied(session, count, lambda: self._reserve(session, count))

    def _reserve(self, session: Attached, count: int) -> Reply:
        slots = session.space.cache.reserve(session.id, count, clock.unix_milliseconds())
        self._introduce(session, slots)
        self._keeper.supply_ahead(session.space, session.tier)
        return {"slots": pack_slots(slots)}

    def commit_pages(self, session: Attached, arguments: Request) -> Reply:
        """Make full pages visible under their hashes, and start to write them back."""
        slots, parents, hashes = unpack_slots(arguments["slots"]), arguments["parents"], self._hashes(arguments)
        codes = session.space.cache.commit_pages(session.id, slots, parents, hashes, clock.unix_milliseconds())
        self._introduce(session, codes[codes >= 0])
        asyncio.get_running_loop().call_soon(self._keeper.pump, session.space)
        return {"codes": pack_slots(codes)}

    def release_pages(self, session: Attached, arguments: Request) -> Reply:
        """Let go of pages."""
        session.space.cache.release_pages(session.id, unpack_slots(arguments["slots"]))
        return {}

    def ended(self, session: Attached, arguments: Request) -> Reply:
        """Note why a turn ended."""
        hint = Hint(arguments["turn"], arguments["conversation"])
        if hint.turn not in TURN_ENDS:
            raise Invalid(f"ended: turn {hint.turn!r} is not one of {', '.join(TURN_ENDS)}")
        if self._recorder.is_on:
            self._recorder.ended(session.space, arguments["block"], hint, clock.unix_milliseconds())
        session.space.cache.ended(arguments["block"], hint)
        return {}

    def prefetch(self, session: Attached, arguments: Request) -> Reply:
        """Start to bring a prefix up."""
        cache = session.space.cache
        hashes = self._hashes(arguments)
        blocks = cache.prefetch(session.tier, hashes, arguments["parent"], clock.unix_milliseconds())
        self._keeper.pump(session.space)
        self._keeper.supply_ahead(session.space, session.tier)
        return {"blocks": blocks}

    def stats(self, session: Attached, arguments: Request) -> Reply:
        """Counters of the session's namespace."""
        space = session.space
        return {
            "counters": {".".join(name): number for name, number in space.cache.counters.items()},
            "slots": {arena.tier.name: arena.pool.counts() for arena in space.arenas},
            "blocks": space.cache.index.blocks,
        }

    def _hashes(self, arguments: Request) -> bytes:
        hashes: bytes = arguments["hashes"]
        if len(hashes) // HASH_BYTES > self._limits.blocks_per_request_max:
            most = self._limits.blocks_per_request_max
            raise Invalid(f"{len(hashes) // HASH_BYTES} blocks in a request, the maximum is {most}: ask in parts")
        return hashes

    def _check_lease_limit(self, session: Attached) -> None:
        leases = len(session.space.cache.sessions[session.id].leases)
        if leases >= self._limits.leases_per_session_max:
            raise Busy(f"the session holds its maximum of {leases} leases: release some")

    def _introduce(self, session: Attached, slots: Slots) -> None:
        """Send the segments of these slots that the client does not know yet, before it is told the slots."""
        if unknown := session.space.unknown(session, slots):
            give_segments(session, unknown)


BY_NAME: dict[str, Callable[[Verbs, Attached, Request], Answer]] = {
    "lookup": Verbs.lookup,
    "load": Verbs.load,
    "release": Verbs.release,
    "store": Verbs.store,
    "commit": Verbs.commit,
    "abort": Verbs.abort,
    "reserve": Verbs.reserve,
    "commit_pages": Verbs.commit_pages,
    "release_pages": Verbs.release_pages,
    "ended": Verbs.ended,
    "keep": Verbs.keep,
    "prefetch": Verbs.prefetch,
    "stats": Verbs.stats,
}

"""Keeps every space supplied with segments, within the tiers' bytes, and lower tiers supplied with what was committed.

- A space grows ahead of need, off the loop, while its tier has bytes left; a request waits only for the first segment.
- When a tier is full, or its quota is, a space lives inside its own segments. One that has none is given the coldest segment of
  another space, and one whose own coldest block is warmer than that segment takes it over in the background.
- What a space is promised is not taken from it, and one that has less takes over from any other.
- Pages that an engine holds are not waited for: of the gpu tier only segments that nobody uses change hands.
- A memory segment changes hands by dying: its blocks leave the index, its last user lets go, every client that maps it
  answers `detach` (or dies), and only then its bytes are free for a new one: they are reserved for who waits for them at once.
- A client that does not let go, or a medium that refuses the new segment, costs a tier at most two segments.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from itertools import count
from typing import Any

from tierd import clock
from tierd.core.ladder import CLOSED, PAGED, kind_of
from tierd.core.plan import WRITE_BACK, Transfer
from tierd.core.write_back import TRANSFERS_MIN
from tierd.endurance import Endurance
from tierd.errors import Busy, TierdError
from tierd.log import get_logger
from tierd.mover import Mover
from tierd.space import Arena, Space
from tierd.tiers.tier import Tier

log = get_logger("keeper")
WRITE_BACK_BYTES = 32 << 20
"""Of one write-back transfer at most; half as many as there are io threads wait behind those under way."""
POLL_SECONDS, POLL_SECONDS_MAX = 0.005, 0.5
SYNC_POLL_SECONDS = 0.1
"""A sync looks again at least this often: growth and hand-overs end without a transfer."""
PAUSE_SECONDS = 2.0
"""How long a tier that had no room on its medium is not asked again."""
HANDOVER_SECONDS_MAX = 30.0
PATIENCE_SECONDS = 1.0
"""How long a segment that a client does not give back is waited for before another one is taken."""
DYING_MAX = 2
"""Segments of a tier on their way out at a time: one that a client does not give back, and one that changes hands."""
RECENCY_SECONDS = 1.0


class Keeper:
    """Background work of all spaces: growing, handing over, writing back, noting recency."""

    def __init__(self, tiers: list[Tier], io_threads: int, endurance: Endurance | None = None) -> None:
        self.tiers = tiers
        self._endurance = endurance
        self.spaces: dict[bytes, Space] = {}
        self.mover = Mover(io_threads, self._moved)
        self.handovers = 0
        self._progress = asyncio.Event()
        self.forgotten: Counter[tuple[str, ...]] = Counter()
        """Counters of namespaces that were forgotten, so that no sum ever goes down."""
        self._failures: Counter[str] = Counter()
        self._writing: Counter[str] = Counter()
        """Write-backs under way, by the tier that they go to."""
        self._refused: list[tuple[Space, float] | None] = [None for _ in tiers]
        """By tier: to whom its medium refused the last segment, and until when it is not asked again; None: it gave it."""
        self._handing: list[asyncio.Task[None] | None] = [None for _ in tiers]
        self._takers: list[list[Space]] = [[] for _ in tiers]
        """Who waits for the bytes of a segment that is on its way out, by tier and in the order of their coming."""
        self._dying: list[set[asyncio.Task[None]]] = [set() for _ in tiers]
        self._given_up: list[set[asyncio.Task[None]]] = [set() for _ in tiers]
        """Segments on their way out for nobody in particular, likewise."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._turns = count(1)
        self._closing = False

    # -- write-back ---------------------------------------------------------------------------------------------------

    def pump(self, space: Space) -> None:
        """Start what the cache of a space has decided, and as much write-back as fits under way."""
        self._submit(space)
        for tier in space.cache.write_back.queues:
            if not self._closing:
                self._write_back(space, tier)

    def _write_back(self, space: Space, tier: int) -> None:
        cache, arena = space.cache, space.arenas[tier]
        blocks = max(1, min(cache.write_back.piece(tier), WRITE_BACK_BYTES // arena.geometry.slot_bytes))
        most = min(self.mover.threads * 3 // 2, max(TRANSFERS_MIN, cache.write_back.share(tier) // blocks))
        while cache.write_back.queues[tier] and self._writing[arena.tier.name] < most:
            if not (count := self._affordable(space, arena, blocks)):
                return  # `run` tries again
            if arena.pool.free < count:
                if self.can_grow(arena):
                    self._start_growth(space, arena)  # it goes on from here when it ends
                    return
                self._rebalance(space, tier)
            if not cache.plan_write_back(tier, count):
                return
            self._submit(space)

    def _affordable(self, space: Space, arena: Arena, blocks: int) -> int:
        """How many of so many blocks may be written to a tier now."""
        if self._endurance is None or arena is not space.lower:
            return blocks
        size = arena.geometry.slot_bytes
        return self._endurance.left(blocks * size, clock.unix_milliseconds()) // size

    def _submit(self, space: Space) -> None:
        planned = space.cache.planned
        while planned:
            transfer = planned.pop(0)
            self._writing[transfer.target] += transfer.reason == WRITE_BACK
            if self._endurance and transfer.target == CLOSED:
                self._endurance.spend(len(transfer) * space.arena(CLOSED).geometry.slot_bytes)
            self.mover.submit(space, transfer)
        while space.cache.hastened:
            self.mover.hasten(space.cache.hastened.pop())

    def _moved(self, space: Space, transfer: Transfer) -> None:
        self._progress.set()
        if transfer.reason == WRITE_BACK:
            self._writing[transfer.target] -= 1
            space.turn = next(self._turns)
            for other in sorted(self.spaces.values(), key=lambda other: other.turn):  # who was served last waits longest
                self.pump(other)
        else:
            self.pump(space)

    def unwritten(self) -> int:
        """Write-backs that are queued or under way; the exporter's threads ask too."""
        queues = [queue for space in list(self.spaces.values()) for queue in space.cache.write_back.queues.values()]
        return sum(map(len, queues)) + self.mover.in_flight[WRITE_BACK]

    async def sync(self, deadline: float) -> None:
        """Wait until all that was admitted before is on NVMe or given up; raises Busy at the deadline (monotonic seconds), or
        as soon as nothing is under way that could make room for what waits.
        """
        marks = {space: space.cache.write_back.mark() for space in self.spaces.values()}
        while True:
            for space in marks:
                self.pump(space)
            runs = sum(space.cache.write_back.left(mark) for space, mark in marks.items())
            if not runs:
                return
            if not self._is_moving():
                raise Busy(f"sync: {runs} runs wait for room below, or for tomorrow's writes, and nothing moves: see the log")
            if (seconds := deadline - clock.monotonic_seconds()) <= 0:
                raise Busy(f"sync: {runs} runs are still to be written; ask again with a longer deadline")
            self._progress.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._progress.wait(), min(seconds, SYNC_POLL_SECONDS))

    def _is_moving(self) -> bool:
        """Whether something is under way after which a tier may have room."""
        growing = any(arena.growing for space in self.spaces.values() for arena in space.arenas)
        leaving = any(self._handing) or any(self._dying) or any(self._given_up)
        return growing or leaving or any(self.mover.in_flight.values())

    # -- growing ------------------------------------------------------------------------------------------------------

    def can_grow(self, arena: Arena) -> bool:
        """Whether the tier has bytes for one more segment of this arena, and its medium did not just refuse one."""
        at = self.tiers.index(arena.tier)
        budget = arena.tier.budget
        fits = arena.may_grow and budget.used + arena.geometry.total_bytes <= budget.most
        return (fits or arena.growing is not None) and not self._closing and not self._is_paused(at)

    async def grow(self, space: Space, arena: Arena) -> bool:
        """Add one segment; many callers at a time share one growth. Returns whether there is one more."""
        growing = self._start_growth(space, arena)
        return growing is not None and await asyncio.shield(growing)

    def _start_growth(self, space: Space, arena: Arena) -> asyncio.Task[bool] | None:
        """The growth under way, started now if there was none; None when the tier or its quota has no bytes for it."""
        if arena.growing is None and arena.reserve():
            arena.growing = self._background(self._create(space, arena))
        return arena.growing

    async def _create(self, space: Space, arena: Arena) -> bool:
        """Make a segment whose bytes are reserved, then go on with what waited for it."""
        ordinal, at, grown = arena.pool.next_ordinal, self.tiers.index(arena.tier), False
        try:
            segment = await asyncio.to_thread(arena.tier.create, space.namespace, ordinal, epoch := space.epoch)
            while epoch < space.epoch:  # purged meanwhile: it is empty, and joins the new epoch
                await asyncio.to_thread(segment.outdate, epoch := space.epoch)
                segment.directory.epoch = epoch
        except TierdError as error:
            arena.tier.budget.release(arena.geometry.total_bytes)
            if not self._refused[at]:
                log.warning("tier cannot grow", tier=arena.tier.name, reason=str(error), retry_seconds=PAUSE_SECONDS)
            self._refused[at] = space, clock.monotonic_seconds() + PAUSE_SECONDS
        except BaseException:
            arena.tier.budget.release(arena.geometry.total_bytes)
            raise
        else:
            arena.add(segment, clock.unix_milliseconds(), ordinal)
            if self._refused[at]:
                log.info("tier grows again", tier=arena.tier.name)
                if arena.tier.name == CLOSED:  # what came while it was full has driven out what may be above still
                    for other in self.spaces.values():
                        other.cache.write_back.push_all()
            self._refused[at], grown = None, True
        finally:
            arena.growing = None
        self.fit(space)  # its quota may have been lowered meanwhile
        self.pump(space)
        return grown

    async def supply(self, space: Space, tier: int, wanted: int) -> None:
        """See that `wanted` blocks find slots in a mapped tier: grow while possible, else take a first segment from another
        namespace.
        """
        arena = space.arenas[tier]
        while arena.pool.free < wanted and self.can_grow(arena):
            if not await self.grow(space, arena):
                break
        if not arena.pool.slots:
            await self._take_over(space, tier)

    def supply_ahead(self, space: Space, tier: int) -> None:
        """After hello and store: grow before the next store needs it; who has stored may take over colder memory."""
        arena = space.arenas[tier]
        if arena.is_short:
            if self.can_grow(arena):
                self._start_growth(space, arena)
            elif arena.segments:
                self._rebalance(space, tier)

    def is_refused(self, tier: int) -> bool:
        """Whether the tier's medium refused the last segment that it was asked for."""
        return self._refused[tier] is not None

    def _is_paused(self, tier: int) -> bool:
        refused = self._refused[tier]
        return refused is not None and clock.monotonic_seconds() < refused[1]

    def _ask_again(self, tier: int) -> None:
        """A medium that refused a segment may have room for it by now, and nobody may store what would ask for it."""
        if (refused := self._refused[tier]) is None or self._is_paused(tier):
            return
        space, arena = refused[0], refused[0].arenas[tier]
        if space in self.spaces.values() and arena.is_short and self.can_grow(arena):
            self._start_growth(space, arena)
        else:
            self._refused[tier] = None

    # -- handing over -------------------------------------------------------------------------------------------------

    def _rebalance(self, space: Space, tier: int) -> None:
        """In a full tier, start to take over a segment that is colder than all that this space has."""
        if len(self.spaces) > 1:
            self._start_handing_over(space, tier)

    def _start_handing_over(self, taker: Space, tier: int) -> None:
        """Unless one is under way, or can only cost blocks: the taker may have no more, nothing may go, or the medium has just
        refused a segment.
        """
        may_have = taker.arenas[tier].may_grow and not self._is_paused(tier)
        if self._handing[tier] is None and may_have and self._victim(taker, tier):
            self._handing[tier] = self._background(self._hand_over(taker, tier))

    async def _take_over(self, space: Space, tier: int) -> None:
        """A space without a segment gets one, or Busy."""
        arena, name = space.arenas[tier], self.tiers[tier].name
        deadline = clock.monotonic_seconds() + HANDOVER_SECONDS_MAX
        self._takers[tier].append(space)
        try:
            while not arena.pool.slots:
                if arena.growing is None:
                    self._start_handing_over(space, tier)
                growing = {other.arenas[tier].growing for other in self.spaces.values()}
                leaving = self._dying[tier] | self._given_up[tier]
                under_way = {task for task in (*growing, self._handing[tier], *leaving) if task}
                left = deadline - clock.monotonic_seconds()
                if not under_way:
                    if not arena.may_grow:
                        raise Busy(f"a quota of {arena.quota.most} bytes of the {name} tier has room for no segment: raise it")
                    raise Busy(f"others use every segment of the {name} tier, or are promised it, or its medium is full")
                if left <= 0:
                    raise Busy(f"no segment of the {name} tier came free in {HANDOVER_SECONDS_MAX} seconds")
                await asyncio.wait(under_way, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._takers[tier].remove(space)

    def _victim(self, taker: Space, tier: int) -> tuple[Space, int] | None:
        """The coldest segment of another space that the taker deserves more, or None.

        Those that a client maps which cannot be asked for them, or was asked in vain so far, are the last choice.
        """
        if len(self._dying[tier]) >= DYING_MAX:
            return None
        need = not taker.arenas[tier].pool.slots or taker.arenas[tier].is_owed
        best: tuple[bool, int] | None = None
        choice: tuple[Space, int] | None = None
        for space in self.spaces.values():
            pool = space.arenas[tier].pool
            if space is taker or space.arenas[tier].is_guarded or (not need and space.sessions and len(pool.segments) <= 1):
                continue
            stuck = space.kept_back(tier)
            for ordinal, last_use in pool.last_use.items():
                held = kind_of(self.tiers[tier].name) == PAGED and not pool.is_idle(ordinal)
                stays = ordinal in pool.closing or ordinal in pool.pinned or held
                if not stays and (best is None or (ordinal in stuck, last_use) < best):
                    best, choice = (ordinal in stuck, last_use), (space, ordinal)
        return choice if best and (need or best < (False, taker.coldest(tier))) else None

    async def _hand_over(self, taker: Space, tier: int) -> None:
        """Have a segment of another space destroyed for the taker, and a second one if that takes too long or is too small.

        A medium that refuses the new segment ends it: nobody else loses blocks for that.
        """
        arena = taker.arenas[tier]
        segments = len(arena.segments)
        self._takers[tier].append(taker)
        try:
            for _ in range(DYING_MAX):
                if (choice := self._victim(taker, tier)) is None:
                    return
                dying = self._kill(*choice, tier)
                self._dying[tier].add(dying)
                dying.add_done_callback(self._dying[tier].discard)
                await asyncio.wait([dying], timeout=PATIENCE_SECONDS)
                if arena.growing is not None:
                    await asyncio.wait([arena.growing])
                if len(arena.segments) > segments or self._is_paused(tier):
                    return
        finally:
            self._takers[tier].remove(taker)
            self._handing[tier] = None

    def _kill(self, space: Space, ordinal: int, tier: int) -> asyncio.Task[None]:
        """Vacate a segment at once, so that nobody chooses it again, and begin to destroy it."""
        space.cache.vacate(tier, ordinal)
        return self._background(self._destroy(space, ordinal, tier))

    async def _destroy(self, space: Space, ordinal: int, tier: int) -> None:
        """Wait for the users and mappers of a vacated segment, and give its bytes to who waits for them."""
        arena = space.arenas[tier]
        await until(lambda: arena.pool.is_idle(ordinal))
        if tier in space.cache.ladder.mapped:
            await until(lambda: self._is_unmapped(space, arena, ordinal))
        segment = arena.remove(ordinal)
        arena.leaving.add(segment)
        try:
            is_gone = await asyncio.to_thread(arena.tier.discard, segment)
        except OSError:  # memory that a GPU does not overwrite
            log.exception("a segment cannot be given up", segment=segment.segment_id)
            is_gone = False
        if arena is space.lower:
            self._failures.update(segment.failures)
        if not is_gone:
            log.error("what a segment had stays: its bytes count till the next start", segment=segment.segment_id)
            return
        arena.leaving.remove(segment)
        arena.tier.budget.release(arena.geometry.total_bytes)
        for taker in self._takers[tier]:  # at once, before who has lost the segment can have its bytes again
            wanting = taker.arenas[tier]
            if wanting.growing is None and self._start_growth(taker, wanting):
                self.handovers += 1
                return

    def _is_unmapped(self, space: Space, arena: Arena, ordinal: int) -> bool:
        """Whether every client has unmapped a segment; asks who was not asked yet. Who does not answer keeps it until its
        process is gone.
        """
        segment_id = arena.segments[ordinal].segment_id
        mappers = space.mappers(segment_id)
        for session in mappers:
            if session.events is not None and segment_id not in session.waiting_detach:
                session.waiting_detach.add(segment_id)
                entry = {"tier": arena.tier.name, "ordinal": ordinal, "segment": segment_id}
                session.events.send({"id": 0, "push": "detach", "segments": [entry]})
        return not mappers

    def forget_empty(self) -> None:
        """Make room for other namespaces: those without sessions and segments have nothing to lose but their names.

        Not while a medium has a segment of theirs: whoever purged them waits for its end, and a later life has their epoch of
        it.
        """
        if any(self._takers):
            return  # one of them may be about to get a segment
        for space in list(self.spaces.values()):
            if not space.sessions and not any(arena.used_bytes for arena in space.arenas):
                self.forgotten.update(space.cache.counters)
                del self.spaces[space.namespace.id]

    def give_up_one(self) -> bool:
        """Begin to give up all of the namespace that has been without sessions longest, so that it can be forgotten; False
        when every one has sessions, pins without an end, or a promise.
        """
        idle = [
            space for space in self.spaces.values() if not (space.sessions or space.cache.pins.has_endless or space.is_promised)
        ]
        if not idle:
            return False
        owners = [space for space in idle if any(arena.segments for arena in space.arenas)]
        ends = len(owners) < len(idle) and any(self._given_up)  # one of them has only what a medium is removing
        if owners and not ends:
            space = min(owners, key=lambda one: one.left_at)
            space.cache.pins.clear()  # what requests wanted to be kept
            self.give_up(space, space.open_segments())
        return True

    def fit(self, space: Space) -> None:
        """Begin to give up the coldest segments that a space has over its quotas."""
        self.give_up(space, [(tier, at) for tier, arena in enumerate(space.arenas) for at in arena.over_quota()])

    def give_up(self, space: Space, segments: list[tuple[int, int]]) -> None:
        """Begin to destroy these segments of a space, by tier and ordinal; each goes when nobody uses it any more."""
        for tier, ordinal in segments:
            dying = self._kill(space, ordinal, tier)
            self._given_up[tier].add(dying)
            dying.add_done_callback(self._given_up[tier].discard)

    def nvme_failures(self) -> Counter[str]:
        """Failed accesses to segment files by reason, those of files that are gone included."""
        total = Counter(self._failures)
        for space in list(self.spaces.values()):
            for segment in list(space.lower.segments.values()) if space.lower else ():
                total.update(dict(segment.failures))
        return total

    # -- the rest -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled: write recency to directories and files once in a while, and restart what was paused."""
        while True:
            await asyncio.sleep(RECENCY_SECONDS)
            for tier in range(len(self.tiers)):
                self._ask_again(tier)
            for space in list(self.spaces.values()):
                self.note_recency(space)
                self.pump(space)
                for segment in list(space.lower.segments.values()) if space.lower else ():
                    if segment.is_dirty:
                        await asyncio.to_thread(segment.flush)

    def note_recency(self, space: Space) -> None:
        """Write last use and use counts of what was touched since the last time to the directories."""
        touched, space.cache.index.touched = space.cache.index.touched, {}
        for node in touched:
            for arena, row in zip(space.arenas, node.slots, strict=True):
                for ordinal, local, _ in arena.pool.by_segment(row[row >= 0]):
                    arena.pool.segments[ordinal].touch(local, node.last_use, node.uses)

    async def close(self) -> None:
        """Stop background work and wait for transfers under way; segments stay as they are."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.mover.close()
        for space in self.spaces.values():
            self.note_recency(space)
            for segment in space.lower.segments.values() if space.lower else ():
                segment.close()

    def _background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work failed", error=repr(error))


async def until(so: Callable[[], bool]) -> None:
    """Wait until something is so, asking less and less often."""
    pause = POLL_SECONDS
    while not so():
        await asyncio.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS_MAX)

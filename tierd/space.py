"""A space is a namespace that is being served: its cache, its segments and its sessions.

The cache decides; the space knows which segment a slot number means, and which process holds which bit.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd import clock, systemd
from tierd.core.admission import EVERYTHING
from tierd.core.cache import Cache
from tierd.core.plan import Transfer
from tierd.core.pool import Pool
from tierd.core.purge import purge
from tierd.errors import Busy
from tierd.layout import Namespace
from tierd.log import get_logger
from tierd.quotas import UNLIMITED, Quota
from tierd.tiers.nvme import FileSegment
from tierd.tiers.tier import FIRST_EPOCH, MemorySegment, MemoryTier, Tier
from tierd.wire.messages import SEGMENTS_PER_PUSH_MAX

log = get_logger("space")
Slots = NDArray[np.int32]
BITS = 64
TRANSFER_BYTES, TRANSFER_BLOCKS_MAX = 32 << 20, 64
"""Size of one promotion: enough for all io threads, and the client copies it while the next one comes."""


class Arena:
    """The segments of one space in one tier, by ordinal; `pool` accounts for their slots."""

    def __init__(self, tier: Tier, namespace: Namespace) -> None:
        self.tier = tier
        self.geometry = tier.geometry(namespace)
        self.pool = Pool(self.geometry.slot_count)
        self.segments: dict[int, Any] = {}
        self.leaving: set[Any] = set()
        """Segments that are out of the pool, and whose medium does not have its bytes again yet."""
        self.growing: asyncio.Task[bool] | None = None
        self.quota = UNLIMITED

    @property
    def used_bytes(self) -> int:
        """What it has of its tier, with segments that are being made or removed."""
        return (len(self.segments) + len(self.leaving) + (self.growing is not None)) * self.geometry.total_bytes

    @property
    def is_short(self) -> bool:
        """Whether fewer slots are free than half a segment has."""
        return self.pool.free < self.pool.slots_per_segment // 2

    @property
    def may_grow(self) -> bool:
        """Whether its quota has room for one more segment."""
        return not self.quota.most or self.used_bytes + self.geometry.total_bytes <= self.quota.most

    @property
    def is_guarded(self) -> bool:
        """Whether it has no more segments that will stay than it was promised: other namespaces take none of these."""
        return self._staying <= self.quota.least // self.geometry.total_bytes

    @property
    def is_owed(self) -> bool:
        """Whether it has fewer segments than it was promised, made ones and one that is being made."""
        return self.may_grow and self._staying + (self.growing is not None) < self.quota.least // self.geometry.total_bytes

    def over_quota(self) -> list[int]:
        """The coldest segments, by ordinal: as many as it has over its maximum."""
        most = self.quota.most // self.geometry.total_bytes if self.quota.most else self._staying
        may_go = sorted(self.segments.keys() - self.pool.closing - self.pool.pinned, key=self.pool.last_use.__getitem__)
        return may_go[: max(0, self._staying - most)]

    @property
    def _staying(self) -> int:
        return len(self.segments) - len(self.pool.closing)

    def reserve(self) -> bool:
        """Take the bytes of one more segment, if its quota and the tier have them."""
        return self.may_grow and self.tier.budget.reserve(self.geometry.total_bytes)

    def add(self, segment: MemorySegment | FileSegment, now: int, ordinal: int | None = None) -> int:
        """Enter a segment, under a certain ordinal if that is free; returns its ordinal."""
        directory: Any = segment if isinstance(segment, FileSegment) else segment.directory
        ordinal = self.pool.add_segment(directory, now, ordinal)
        self.segments[ordinal] = segment
        return ordinal

    @property
    def device(self) -> bytes:
        """The GPU that its segments are on, by its 16 bytes; empty where they are in host memory."""
        return self.tier.device if isinstance(self.tier, MemoryTier) else b""

    def remove(self, ordinal: int) -> Any:
        """Take out a segment that was vacated and is idle."""
        self.pool.remove_segment(ordinal)
        return self.segments.pop(ordinal)

    def payloads(self, slots: Slots) -> list[Any]:
        """The memory of these slots: one uint8[slot_bytes] view each, a DeviceArray on a GPU (memory segments only)."""
        per_segment = self.pool.slots_per_segment
        return [self.segments[slot // per_segment].slots[slot % per_segment] for slot in slots.tolist()]


@dataclass(eq=False)
class Attached:
    """A session as the daemon knows it: one client process, its bit, its connections."""

    id: int
    token: bytes
    bit: int
    pidfd: int
    pid: int
    name: str
    space: Space
    tier: int
    connection: Any = None
    events: Any = None
    known: dict[int, bytes] = field(default_factory=dict)
    """Ordinal -> segment id of the memory segments that the client was given."""
    waiting_detach: set[bytes] = field(default_factory=set)
    listens: bool = False
    """Whether it is told which blocks are gone."""
    missed: bool = False
    """Whether some went that it could not be told of."""

    @property
    def arena(self) -> Arena:
        """The segments of its tier."""
        return self.space.arenas[self.tier]

    @property
    def stored_name(self) -> str:
        """Under which name the service manager keeps the process's pidfd."""
        return f"{self.space.session_prefix}{self.arena.tier.name}.{self.bit}.{self.id:x}.{systemd.short(self.token)}"


class Space:
    """One namespace's cache, arenas and sessions."""

    def __init__(
        self,
        namespace: Namespace,
        tiers: list[Tier],
        window_share: float,
        write_back: bool,
        policies: Mapping[str, str] = {},
        admission: str = EVERYTHING,
    ) -> None:
        self.namespace = namespace
        self.arenas = [Arena(tier, namespace) for tier in tiers]
        pools = {arena.tier.name: arena.pool for arena in self.arenas}
        seed = int.from_bytes(os.urandom(8), "little")
        tokens = namespace.layout.block_tokens
        blocks = max(1, min(TRANSFER_BLOCKS_MAX, TRANSFER_BYTES // namespace.layout.block_bytes))
        self.cache = Cache(
            pools,
            policies=policies,
            window_share=window_share,
            transfer_blocks=blocks,
            write_back=write_back,
            admission=admission,
            block_tokens=tokens,
            seed=seed,
        )
        self.sessions: dict[int, Attached] = {}
        self.left_at = 0.0
        """When a session of it ended last (monotonic seconds); 0: none has in this life of the daemon."""
        self.epoch = FIRST_EPOCH
        """Grows with each purge; what a segment's directory has of an older one is stale."""
        self.turn = 0
        """When its last write-back ended, as a number that grows over all spaces."""
        self._done: dict[int, asyncio.Event] = {}

    def __repr__(self) -> str:
        return f"<Space {self.namespace.id.hex()[:8]}: {len(self.sessions)} sessions, {self.cache.index.blocks} blocks>"

    def allot(self, quotas: Mapping[str, Quota]) -> None:
        """Its quotas by tier from now on; a tier that is missing has none. Keeper.fit gives up what is over them."""
        for arena in self.arenas:
            arena.quota = quotas.get(arena.tier.name, UNLIMITED)

    @property
    def is_promised(self) -> bool:
        """Whether it has a minimum in some tier."""
        return any(arena.quota.least for arena in self.arenas)

    @property
    def session_prefix(self) -> str:
        """How the names begin under which the service manager keeps its sessions' pidfds."""
        return f"session.{systemd.short(self.namespace.id[:12])}."

    @property
    def mapped(self) -> list[Arena]:
        """The segments in memory, by tier."""
        return self.arenas[: self.cache.ladder.closed]

    @property
    def lower(self) -> Arena | None:
        """The nvme tier's segments."""
        return next(iter(self.arenas[self.cache.ladder.closed :]), None)

    def arena(self, name: str) -> Arena:
        """The segments of one tier."""
        return self.arenas[self.cache.ladder.place(name)]

    def attach(self, pidfd: int, pid: int, name: str, tier: int, sessions_max: int) -> Attached:
        """A new session of a mapped tier with a bit of its own; raises Busy when all bits are taken."""
        taken = {session.bit for session in self.sessions.values()}
        bit = next((at for at in range(min(BITS, sessions_max)) if at not in taken), None)
        if bit is None:
            raise Busy(f"namespace has its maximum of {len(taken)} sessions: close one, or share a client among threads")
        session = Attached(int.from_bytes(os.urandom(7), "big"), os.urandom(16), bit, pidfd, pid, name, self, tier)
        self.sessions[session.id] = session
        self.cache.open_session(session.id, bit, tier)
        return session

    def detach(self, session: Attached) -> None:
        """The session has ended: free what it held, and its bit."""
        del self.sessions[session.id]
        self.left_at = clock.monotonic_seconds()
        self.cache.close_session(session.id)
        for segment in session.arena.segments.values():
            segment.directory.unhold_all(session.bit)

    def unknown(self, session: Attached, slots: Slots) -> list[int]:
        """Ordinals among these slots whose segments the session was not given yet."""
        arena = session.arena
        if len(session.known) == len(arena.segments) or not len(slots):
            return []
        used = np.flatnonzero(np.bincount(slots // arena.pool.slots_per_segment))
        return [ordinal for ordinal in used.tolist() if ordinal not in session.known]

    def ended(self, transfer: int) -> asyncio.Event:
        """Set when the transfer ends; an ended transfer's is set."""
        if transfer not in self.cache.transfers:
            event = asyncio.Event()
            event.set()
            return event
        return self._done.setdefault(transfer, asyncio.Event())

    def finish(self, transfer: Transfer, outcome: NDArray[np.uint8], now: int) -> None:
        """Tell the cache how a transfer went, and wake who waits for it."""
        self.cache.finish(transfer, outcome, now)
        if event := self._done.pop(transfer.id, None):
            event.set()

    def open_segments(self) -> list[tuple[int, int]]:
        """Tier and ordinal of each segment that is not on its way out."""
        return [(tier, at) for tier, arena in enumerate(self.arenas) for at in arena.segments.keys() - arena.pool.closing]

    def purge(self) -> int:
        """Forget every block and begin a new epoch; returns how many there were."""
        self.epoch += 1
        return purge(self.cache)

    @property
    def dying(self) -> int:
        """Segments that are on their way out."""
        return sum(len(arena.pool.closing) + len(arena.leaving) for arena in self.arenas)

    def coldest(self, tier: int) -> int:
        """Last use (Unix milliseconds) of this space's coldest block in a tier."""
        node = next(self.cache.index.orders[tier].coldest(), None)
        return node.last_use if node is not None else 0

    def kept_back(self, tier: int) -> set[int]:
        """Ordinals of segments that a client maps which has no event channel, or owes an answer on it."""
        stuck = [s for s in self.sessions.values() if s.tier == tier and (s.events is None or s.waiting_detach)]
        return {ordinal for session in stuck for ordinal in session.known}

    def mappers(self, segment_id: bytes) -> list[Attached]:
        """Sessions that were given a segment."""
        return [session for session in self.sessions.values() if segment_id in session.known.values()]


def give_segments(session: Attached, ordinals: list[int]) -> None:
    """Send segments of its tier, with their descriptors, to a connected session.

    Raises Busy, and ends the connection, when this process has no descriptors left: the client resumes, which frees what it
    was about to be told.
    """
    try:
        for at in range(0, len(ordinals), SEGMENTS_PER_PUSH_MAX):
            _give_batch(session, ordinals[at : at + SEGMENTS_PER_PUSH_MAX])
    except OSError as error:
        log.error("segments cannot be given", client=session.name, pid=session.pid, reason=str(error))
        session.connection.close("no descriptors for its segments")
        raise Busy(f"the daemon has no descriptors for segments ({error}): raise its limit (LimitNOFILE=)") from error


def _give_batch(session: Attached, ordinals: list[int]) -> None:
    entries, descriptors = [], []
    with ExitStack() as opened:
        for ordinal in ordinals:
            segment = session.arena.segments[ordinal]
            shape = segment.header.geometry
            directory = segment.readonly_directory_fd()
            opened.callback(os.close, directory)
            descriptors += [directory, segment.slots_fd]
            entries.append(
                {
                    "tier": session.arena.tier.name,
                    "ordinal": ordinal,
                    "segment": segment.segment_id,
                    "slots": shape.slot_count,
                    "slot_bytes": shape.slot_bytes,
                    "directory_bytes": shape.directory_bytes,
                    "slots_bytes": shape.slots_bytes,
                }
            )
        session.connection.send({"id": 0, "push": "attach", "segments": entries}, descriptors)
    session.known |= {entry["ordinal"]: entry["segment"] for entry in entries}

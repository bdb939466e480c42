"""A lookup under way, the blocks that it found, and the way to copy them out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tierd.block import HASH_BYTES
from tierd.client.connection import Connection, NoAnswer, Ticket
from tierd.client.context import Context
from tierd.client.transfer import Pages, Pool, as_pages, as_pool
from tierd.clock import monotonic_seconds
from tierd.errors import Busy, Closed, Invalid
from tierd.wire.messages import READING, unpack_slots

PIECE_BYTES = 64 << 20
"""Of a prefix that comes in windows, this much is copied and given back at a time."""

MOMENT_SECONDS = 0.001
"""An answer that came while another client's was waited for is read, though the deadline may be over."""

NO_SLOTS: NDArray[np.int32] = np.empty(0, np.int32)


class Lookup:
    """A lease on the first `blocks` blocks that were asked for; use it as a context manager, or `release` it.

    The first `told` of them are in memory now, at `slots` (int32). `tiers` says where each block asked for is, and
    sums to their number. Falsy when nothing was found. For one thread at a time.
    """

    def __init__(self, context: Context, asked: int, connection: Connection | None = None, reply: Any = None) -> None:
        self.blocks: int = 0
        self.told: int = 0
        self.tiers: dict[str, int] = {"miss": asked}
        self.slots = NO_SLOTS
        self._context = context
        self._connection = connection
        self._lease: int = 0
        if reply is not None:
            self.blocks, self.told, self._lease = reply["blocks"], reply["told"], reply["lease"]
            self.tiers = reply["tiers"]
            self.slots = unpack_slots(reply["slots"])
            if not len(self.slots) == self.told <= self.blocks <= asked or bool(self.blocks) != bool(self._lease):
                raise Closed(f"lookup of {asked} blocks was answered with {self!r}, {len(self.slots)} slots")

    def __repr__(self) -> str:
        return f"<Lookup {self.blocks} blocks, {self.told} in memory, lease {self._lease}>"

    def __bool__(self) -> bool:
        return self.blocks > 0

    def __enter__(self) -> Lookup:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def copy_into(self, pool: Pool | NDArray[np.generic], pages: ArrayLike, first: int = 0, count: int | None = None) -> int:
        """Copy blocks `first` to `first + count` into `pages` of `pool`; returns how many leading ones arrived.

        pool is as for `Client.load`; pages has one number per block (default count: as many as there are). Waits for
        blocks that are not in memory yet, for each answer at most the deadline. Where not all blocks were told at once,
        each is given back when it is copied, and can be copied once. Raises Invalid for misuse.
        """
        context = self._context
        context.check_process()
        rows = as_pool(pool, context.layout.block_bytes, writable=True)
        targets = as_pages(pages, rows)
        count = min(len(targets), self.blocks - first) if count is None else count
        if not 0 <= first <= first + count <= self.blocks or count > len(targets):
            raise Invalid(f"blocks {first} to {first + count} on {len(targets)} pages: found were {self.blocks} blocks")
        copied = 0
        with context.missing("load"):
            for good in self._copy(rows, targets[:count], first):
                copied += good
        context.count(blocks_loaded=copied, bytes_loaded=copied * context.layout.block_bytes)
        return copied

    def release(self) -> None:
        """End the lease; the blocks may be evicted. Never fails, and never waits for the daemon."""
        lease, self._lease, self.blocks, self.told, self.slots = self._lease, 0, 0, 0, NO_SLOTS
        if lease and self._connection is not None:
            self._context.check_process()
            self._connection.tell("release", {"lease": lease})

    def _copy(self, pool: Pool, pages: Pages, first: int) -> Iterator[int]:
        """Copy piece by piece; yields how many blocks of each have arrived, and ends where not all have."""
        context, connection = self._context, self._connection
        assert connection is not None or not len(pages)
        windowed = self.told < self.blocks
        piece = max(1, PIECE_BYTES // context.layout.block_bytes) if windowed else len(pages)
        copied = 0
        for window in self._windows(first, first + len(pages)):
            for at in range(0, len(window), piece):
                slots = window[at : at + piece]
                assert connection is not None
                with context.session.segments.copying(connection, slots, READING) as parts:
                    good = context.copier.load(parts, pool, pages[copied : copied + len(slots)])
                if good and windowed:
                    connection.tell("release", {"lease": self._lease, "first": first + copied, "count": good})
                copied += good
                yield good
                if good < len(slots):
                    context.count(blocks_changed=1)
                    return

    def _windows(self, first: int, end: int) -> Iterator[NDArray[np.int32]]:
        """The slots of blocks `first` to `end`, run by run; the next is asked for before the caller copies this one."""
        slots = self.slots[first:end]
        ahead: Ticket | None = None
        try:
            while first < end:
                if not len(slots):
                    slots = self._loaded(self._ask(first, end), first, end)
                first += len(slots)
                ahead = self._ask(first, end) if first < end else None
                yield slots
                slots = NO_SLOTS
                if ahead is not None:
                    asked, ahead = ahead, None
                    try:
                        slots = self._loaded(asked, first, end)
                    except NoAnswer:
                        raise
                    except Busy:  # while we held the last window: it is asked again without that
                        pass
        finally:
            if ahead is not None and self._connection is not None:
                self._connection.abandon(ahead)

    def _ask(self, first: int, end: int) -> Ticket:
        assert self._connection is not None
        arguments = {"lease": self._lease, "first": first, "count": end - first}
        return self._connection.ask("load", arguments, self._context.deadline_seconds)

    def _loaded(self, asked: Ticket, first: int, end: int) -> NDArray[np.int32]:
        assert self._connection is not None
        reply = self._connection.wait(asked, self._context.deadline_seconds)
        slots = unpack_slots(reply["slots"])
        if reply["first"] != first or not 1 <= reply["count"] == len(slots) <= end - first:
            raise Closed(f"load of blocks {first} to {end} was answered with {len(slots)} slots from {reply['first']}")
        return slots


class LookingUp:
    """A lookup that was asked for; `wait` for it, once. The deadline begins when it is asked. For one thread at a time."""

    def __init__(self, context: Context, hashes: bytes, parent: bytes) -> None:
        self._context = context
        self._asked = len(hashes) // HASH_BYTES
        self._sent: tuple[Connection, Ticket] | None = None
        if not self._asked:
            return
        context.count(requests=1)
        with context.missing("lookup"):
            connection = context.session.connection()
            self._late_at = monotonic_seconds() + context.deadline_seconds
            arguments = {"hashes": hashes, "parent": parent}
            self._sent = connection, connection.ask("lookup", arguments, context.deadline_seconds, undo="release")

    def wait(self) -> Lookup:
        """The lease on what was found; on nothing where the daemon is away or late."""
        context, found = self._context, Lookup(self._context, self._asked)
        if self._sent is not None:
            connection, ticket = self._sent
            with context.missing("lookup"):
                reply = connection.wait(ticket, max(MOMENT_SECONDS, self._late_at - monotonic_seconds()))
                context.session.absence.answered()
                found = Lookup(context, self._asked, connection, reply)
        if self._asked:
            context.count_tiers(found.tiers)
        return found

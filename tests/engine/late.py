"""A memory that answers late: the real one behind tickets that are done some polls after they could be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tierd_engine.memory import Memory


class LateMemory:
    """Wraps a memory as the daemon's distance does: order is kept, nothing is answered at once."""

    def __init__(self, memory: Memory, seed: int) -> None:
        self.memory, self.polls, self._random = memory, 0, random.Random(seed)
        self.tensor, self.layout, self.count = memory.tensor, memory.layout, memory.count
        self.wait, self.release, self.ended = memory.wait, memory.release, memory.ended
        self.statistics, self.close = memory.statistics, memory.close

    def lookup(self, hashes: bytes) -> LateLookup:
        return LateLookup(self, self.memory.lookup(hashes))

    def reserve(self, count: int, urgent: bool = False) -> LateTicket:
        return LateTicket(self, self.memory.reserve(self._random.randint(1, count), urgent))

    def commit(self, pages: Sequence[int], parents: bytes, hashes: bytes) -> LateTicket:
        return LateTicket(self, self.memory.commit(pages, parents, hashes))

    def poll(self) -> None:
        self.polls += 1
        self.memory.poll()

    def check(self) -> None:
        self.memory.check()

    def due(self) -> int:
        return self.polls + self._random.randrange(6)


class LateTicket:
    """Any ticket, late."""

    def __init__(self, memory: LateMemory, ticket: Any) -> None:
        self._memory, self._ticket, self._due = memory, ticket, memory.due()

    @property
    def done(self) -> bool:
        return self._ticket.done and self._memory.polls >= self._due

    def __getattr__(self, name: str) -> Any:
        assert self.done, f"{name} was read before the ticket was done"
        return getattr(self._ticket, name)


class LateLookup:
    """A lookup whose first answer is late, and whose blocks become ready one by one."""

    def __init__(self, memory: LateMemory, lookup: Any) -> None:
        self._memory, self._lookup, self._due, self._stopped = memory, lookup, memory.due(), False
        self.seconds = 0.0

    @property
    def done(self) -> bool:
        return self._stopped or (self._lookup.done and self._memory.polls >= self._due)

    @property
    def blocks(self) -> int:
        return self._lookup.blocks if self.done else 0

    @property
    def ready(self) -> int:
        return min(self._lookup.ready, max(0, self._memory.polls - self._due)) if not self._stopped else self._lookup.ready

    @property
    def starved(self) -> bool:
        return self._lookup.starved

    @property
    def pages(self) -> Sequence[int]:
        return self._lookup.pages

    def stop(self) -> None:
        self._stopped = True
        self._lookup.stop()

    def release(self) -> None:
        self._lookup.release()

"""What engines ask for, handed to `tierd record` as it comes, for a trace.

Nothing is kept while nobody records. Whoever does has a connection to the admin socket, and the recording ends with it. What it
does not fetch in time is given up and counted: memory is bounded, and no engine ever waits for a recording.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any

from tierd.block import HASH_BYTES, ROOT
from tierd.core.plan import Hint
from tierd.errors import Busy
from tierd.log import get_logger
from tierd.space import Space

log = get_logger("recorder")
BUFFER_BYTES_MAX = 32 << 20
"""Of hashes that were not fetched yet; an event counts EVENT_BYTES more."""
EVENT_BYTES = 256
CHAIN_BYTES_MAX = HASH_BYTES << 16
REPLY_BYTES, REPLY_EVENTS = 256 << 10, 1024
"""A reply ends with the event that reaches one of them."""

Event = list[Any]
"""When (Unix milliseconds), a whole chain of packed hashes, and of a turn that has ended why it did and whose it was."""


class Recorder:
    """At most one recording, of one namespace."""

    def __init__(self) -> None:
        self._owner: object = None
        self._namespace = b""
        """How the id begins of the namespace that is recorded."""

    @property
    def is_on(self) -> bool:
        """Whether somebody records; nobody else has to call `asked` and `ended`."""
        return self._owner is not None

    def status(self) -> dict[str, int] | None:
        """How many requests came since the recording began, and how many events wait; None when nobody records."""
        if not self.is_on:
            return None
        return {"requests": self._requests, "left": len(self._events), "missed": self._missed}

    async def take(self, owner: object, namespace: bytes, seconds_max: float) -> dict[str, Any]:
        """What has come since the last call, waiting that long for it; the first call begins a recording.

        It is of the first namespace with this beginning that is asked for anything. Raises Busy if another owner records.
        """
        if not self.is_on:
            self._begin(owner, namespace)
        elif self._owner is not owner:
            raise Busy("somebody else records this daemon: one recording at a time")
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds_max):
                    await self._come.wait()
        return self._fetched()

    def end(self, owner: object) -> None:
        """The owner's connection has ended: forget what it did not fetch."""
        if self.is_on and self._owner is owner:
            log.info("recording ends", requests=self._requests, missed=self._missed)
            self._owner = None
            self._events.clear()

    def asked(self, space: Space, hashes: bytes, parent: bytes, now: int) -> None:
        """A request looks up blocks behind a parent."""
        if self._wants(space):
            above = b"" if parent == ROOT else chain_to(space, parent)
            self._requests += 1
            if above or parent == ROOT:
                self._put([now, above + hashes, None, None])
            else:
                self._missed += 1

    def ended(self, space: Space, block: bytes, hint: Hint, now: int) -> None:
        """A turn has ended whose last block this is; one that is not known says nothing of any request."""
        if self._wants(space) and (chain := chain_to(space, block)):
            self._put([now, chain, *hint])

    def _begin(self, owner: object, namespace: bytes) -> None:
        self._owner, self._namespace = owner, namespace
        self._block_tokens = self._requests = self._missed = self._bytes = 0
        self._elsewhere = 0
        self._events: deque[Event] = deque()
        self._come = asyncio.Event()
        log.info("recording begins", namespace=namespace)

    def _wants(self, space: Space) -> bool:
        if not space.namespace.id.startswith(self._namespace):
            self._elsewhere += 1
            return False
        self._namespace, self._block_tokens = space.namespace.id, space.namespace.layout.block_tokens
        return True

    def _put(self, event: Event) -> None:
        size = len(event[1]) + EVENT_BYTES
        if size > CHAIN_BYTES_MAX or self._bytes + size > BUFFER_BYTES_MAX:
            self._missed += event[2] is None
            return
        self._bytes += size
        self._events.append(event)
        self._come.set()

    def _fetched(self) -> dict[str, Any]:
        events: list[Event] = []
        size = 0
        while self._events and size < REPLY_BYTES and len(events) < REPLY_EVENTS:
            events.append(self._events.popleft())
            size += len(events[-1][1]) + EVENT_BYTES
        self._bytes -= size
        if not self._events:
            self._come.clear()
        return {
            "namespace": self._namespace if self._block_tokens else b"",
            "block_tokens": self._block_tokens,
            "events": events,
            "left": len(self._events),
            "missed": self._missed,
            "elsewhere": self._elsewhere,
        }


def chain_to(space: Space, block: bytes) -> bytes:
    """The packed hashes from the root to a block; none when it is not known."""
    index = space.cache.index
    if not (found := index.find(block)):
        return b""
    node, offset = found
    runs = [above.hashes for above in index.path(node)]
    runs[0] = runs[0][: (offset + 1) * HASH_BYTES]
    return b"".join(reversed(runs))

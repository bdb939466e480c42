"""Mapped segments are registered with the CUDA driver in the background, so that copy engines reach them at full speed.

Until a segment is registered, and where the driver refuses (RLIMIT_MEMLOCK, a container), copies are made all the same: slower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread

from tierd.client.mapping import Mapping
from tierd.driver import Context

log = logging.getLogger("tierd.client")

Ended = Callable[[], None]


class Pins:
    """Which segments are registered. Registers one after the other, in a thread of its own; used by several threads."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = Lock()
        self._registered: set[int] = set()
        self._refused = 0
        self._closed = False
        self._wanted: SimpleQueue[tuple[Mapping, Ended] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="tierd-pin", daemon=True)
        self._thread.start()

    def add(self, mapping: Mapping, ended: Ended) -> None:
        """Have a segment registered; `ended` is called in any case, and nobody may unmap the segment before."""
        self._wanted.put((mapping, ended))

    def cover(self, address: int) -> None:
        """What begins at this address is registered already, by somebody else who keeps it so."""
        with self._lock:
            self._registered.add(address)

    def covers(self, address: int) -> bool:
        """Whether the slots that begin at this address are registered."""
        return address in self._registered

    def statistics(self) -> dict[str, int]:
        """How many segments are registered now, and how many the driver refused."""
        return {"segments_pinned": len(self._registered), "pins_refused": self._refused}

    def close(self, seconds: float) -> None:
        """Register no more; waits at most so long for the one that is being registered."""
        self._closed = True
        self._wanted.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            mapping, ended = wanted
            if mapping.wanted and not self._closed:
                self._register(mapping)
            ended()

    def _register(self, mapping: Mapping) -> None:
        address = mapping.slots.ctypes.data
        try:
            self._context.register(address, mapping.slots.nbytes)
        except OSError as error:
            self._say("registered", mapping, error)
            return
        mapping.unpin = partial(self._unregister, mapping, address)
        with self._lock:
            self._registered.add(address)

    def _unregister(self, mapping: Mapping, address: int) -> None:
        """Called by the mapping just before it is unmapped."""
        with self._lock:
            self._registered.discard(address)
        try:
            self._context.unregister(address)
        except OSError as error:
            self._say("unregistered", mapping, error)

    def _say(self, what: str, mapping: Mapping, error: OSError) -> None:
        with self._lock:
            self._refused += 1
            first = self._refused == 1
        if first:
            log.warning("%r cannot be %s, copies to and from the GPU go on more slowly: %s", mapping, what, error.strerror)

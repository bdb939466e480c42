"""Tells sessions that asked for it which blocks of their namespace live nowhere any more (docs/decisions/0026).

Each is told in the order in which blocks went, or that everything may be gone: when there was too much to name, when it has no
event channel, or does not read it. So nothing waits here for a client but one bit.
"""

from __future__ import annotations

import asyncio
from functools import partial

from tierd.core.removed import Removed
from tierd.space import Attached, Space

TOLD_SECONDS = 0.02
"""How long blocks that go are gathered, to be named in one push."""


class Removals:
    """Of all namespaces. In one that nobody listens to nothing is noted."""

    def __init__(self) -> None:
        self._due: set[Space] = set()

    def listen(self, session: Attached, missed: bool = False) -> None:
        """From now on the session is told; `missed`: and first, that everything it knew of may be gone."""
        index = session.space.cache.index
        if index.removed is None:
            index.removed = Removed(partial(self.soon, session.space))
        session.listens = True
        session.missed |= missed

    def soon(self, space: Space) -> None:
        """Something has gone, or a session can be told what it has missed."""
        if space not in self._due:
            self._due.add(space)
            asyncio.get_running_loop().call_later(TOLD_SECONDS, self._tell, space)

    def _tell(self, space: Space) -> None:
        self._due.discard(space)
        index = space.cache.index
        sessions = [session for session in space.sessions.values() if session.listens]
        if index.removed is None or not sessions:
            index.removed = None
            return
        hashes, everything = index.removed.take()
        for session in sessions:
            session.missed |= everything
            channel = session.events
            if channel is None or not channel.is_read:
                session.missed |= bool(hashes)
            elif hashes or session.missed:
                named = b"" if session.missed else hashes
                channel.send({"id": 0, "push": "removed", "hashes": named, "everything": session.missed})
                session.missed = False
        if any(session.missed and session.events is not None for session in sessions):
            self.soon(space)  # to look whether it reads by now

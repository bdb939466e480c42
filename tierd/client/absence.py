"""When not to try: a daemon that is away, or late, is left alone for a while, and the log of the engine says so."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Lock

from tierd.clock import monotonic_seconds
from tierd.errors import Busy, Closed, TierdError

PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.2, 2.0

log = logging.getLogger("tierd.client")


class Absence:
    """Whether `who` has a daemon on `path`. It goes and comes back with one warning each, whatever is asked meanwhile.

    Where nobody listens the daemon is away at once; one that was late is away when it is late again: a stumble is no absence.
    Used by several threads.
    """

    def __init__(self, who: str, path: Path) -> None:
        self._who = who or "a client"
        self._path = path
        self._lock = Lock()
        self._pause_seconds = self._pause_ends = 0.0
        self._since: float | None = None
        """When an absence that was told began, on the monotonic clock."""

    def __bool__(self) -> bool:
        return bool(self._pause_ends)

    def answered(self) -> None:
        """The daemon answered in time: no pause is due."""
        if not self._pause_ends:
            return
        with self._lock:
            self._pause_seconds = self._pause_ends = 0.0
            since, self._since = self._since, None
        if since is not None:
            log.warning(
                "tierd is back on %s after %.1f s: %s uses it again", self._path, monotonic_seconds() - since, self._who
            )

    def failed(self, error: TierdError) -> None:
        """The daemon is away, or does not answer in time: leave it alone, twice as long each time."""
        now = monotonic_seconds()
        with self._lock:
            again = 0 < self._pause_ends <= now  # not just another request that waited for the same answer
            away = isinstance(error, Closed) or (isinstance(error, Busy) and again)
            told = away and self._since is None
            if told:
                self._since = now
            self._pause_seconds = min(max(2 * self._pause_seconds, PAUSE_SECONDS_MIN), PAUSE_SECONDS_MAX)
            self._pause_ends = now + self._pause_seconds
        if told:
            log.warning("tierd is away (%s): %s goes on without it until it is back", error, self._who)

    def pause_seconds_left(self) -> float:
        """How long it is to be left alone still."""
        return max(0.0, self._pause_ends - monotonic_seconds()) if self._pause_ends else 0.0

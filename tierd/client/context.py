"""What the calls of one client share: the session, the copier, and the counts of what they did and what failed."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

from tierd.client.connection import NoAnswer
from tierd.client.session import Session
from tierd.client.transfer import Copier
from tierd.errors import Invalid, TierdError
from tierd.layout import Layout

log = logging.getLogger("tierd.client")
COUNTED = ("requests", "blocks_loaded", "bytes_loaded", "blocks_stored", "bytes_stored", "blocks_changed")


class Context:
    """Used by several threads. `deadline_seconds` bounds each wait for the daemon."""

    def __init__(self, session: Session, copier: Copier, layout: Layout, deadline_seconds: float) -> None:
        self.session, self.copier, self.layout, self.deadline_seconds = session, copier, layout, deadline_seconds
        self._pid = os.getpid()
        self._lock = Lock()
        self._counters: Counter[str] = Counter()
        self._tiers: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._logged: set[str] = set()

    @property
    def is_ours(self) -> bool:
        """False in a forked child: socket, mappings and threads are its parent's."""
        return os.getpid() == self._pid

    def check_process(self) -> None:
        """Raise Invalid in a forked child."""
        if not self.is_ours:
            raise Invalid(f"this client belongs to process {self._pid}: make a new Client in process {os.getpid()}")

    def count(self, **amounts: int) -> None:
        """Add to the statistics."""
        with self._lock:
            self._counters.update(amounts)

    def count_tiers(self, tiers: Mapping[str, int]) -> None:
        """Add where the blocks of a lookup were."""
        with self._lock:
            self._tiers.update(tiers)

    def statistics(self) -> dict[str, Any]:
        """All counts since the start."""
        with self._lock:
            return {
                **{name: self._counters[name] for name in COUNTED},
                "reconnects": max(0, self.session.connects - 1),
                "failures": dict(self._failures),
                "tiers": dict(self._tiers),
            }

    @contextmanager
    def missing(self, verb: str) -> Iterator[None]:
        """Turn every failure inside into a miss."""
        try:
            yield
        except Exception as error:
            self.failed(verb, error)

    def failed(self, verb: str, error: Exception) -> None:
        """Count a failure by kind; say once what an operator can do something about."""
        kind = error.code if isinstance(error, TierdError) else "internal"
        if isinstance(error, NoAnswer):
            kind = "late"
            self.session.absence.failed(error)
        with self._lock:
            self._failures[kind] += 1
            first = kind not in self._logged
            self._logged.add(kind)
        if first and kind in ("invalid", "internal", "copy"):
            log.warning("tierd %s failed and counts as a miss: %s", verb, error, exc_info=kind == "internal")

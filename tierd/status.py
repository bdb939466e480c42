"""How the daemon is, as plain values: for `tierd status`, `tierd top` and the page in a browser.

It reads what others keep and changes nothing, so the exporter's threads may ask too.
"""

from __future__ import annotations

import os
from typing import Any

from tierd import __version__, clock
from tierd.config import Config
from tierd.core.ahead import FATES, PREFETCHED
from tierd.core.plan import WRITE_BACK
from tierd.keeper import Keeper
from tierd.metrics import EVICTIONS, FAILURES, LOOKUP_TIERS, Metrics, mismatches, slots_by_state
from tierd.recorder import Recorder
from tierd.space import Space
from tierd.tiers.io import Io

GIVEN_UP: list[tuple[str, ...]] = [(f"write_back_{why}",) for why in ("dropped", "orphans", "short")]
GIVEN_UP += [("failed", outcome, WRITE_BACK) for outcome in FAILURES]
"""Counters of blocks that were to be written and will not be."""


class Status:
    """Asked by calling it. Numbers of bytes, blocks and requests grow over the daemon's life; rates are differences."""

    def __init__(self, config: Config, keeper: Keeper, metrics: Metrics, recorder: Recorder, io: Io) -> None:
        self._config, self._keeper, self._metrics, self._recorder, self._io = config, keeper, metrics, recorder, io
        self._started = clock.monotonic_seconds()
        self.metrics_address = ""
        """Where metrics are served on loopback, once they are."""

    def __call__(self) -> dict[str, Any]:
        """Everything a person asks first."""
        counters = self._metrics.counters()
        spaces = list(self._keeper.spaces.values())
        tiers = {
            tier.name: {
                "used_bytes": tier.budget.used,
                "limit_bytes": tier.budget.most,
                "slots": slots_by_state(spaces, at),
            }
            for at, tier in enumerate(self._keeper.tiers)
        }
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_seconds": clock.monotonic_seconds() - self._started,
            "socket": str(self._config.server.socket),
            "metrics": self.metrics_address,
            "io": self._io._asdict(),
            "tiers": tiers,
            "lookup_blocks": {tier: counters["lookup", tier] for tier in LOOKUP_TIERS},
            "evicted_blocks": {f"{tier}.{kind}": counters["evicted", tier, kind] for tier in tiers for kind in EVICTIONS},
            "prefetched_blocks": {fate: counters[PREFETCHED, fate] for fate in FATES},
            "checksum_failures": mismatches(counters),
            "transfers": self._transfers(),
            "written": self.written(),
            "unwritten_runs": self._keeper.unwritten(),
            "recording": self._recorder.status(),
            "sessions": sum(len(space.sessions) for space in spaces),
            "namespaces": [about(space) for space in spaces],
        }

    def written(self) -> dict[str, int]:
        """How many blocks were written to NVMe so far, and how many never will be: there was no room, or the disk failed."""
        counters = self._metrics.counters()
        return {"blocks": counters["written",], "given_up": sum(counters[name] for name in GIVEN_UP)}

    def _transfers(self) -> list[dict[str, Any]]:
        """Bytes by reason, source and target, of the ways that were used so far."""
        moved = list(self._keeper.mover.moved.items())
        return [{"reason": reason, "source": source, "target": to, "bytes": n} for (reason, source, to), n in moved]


def about(space: Space) -> dict[str, Any]:
    """What there is to say of one namespace."""
    counters = space.cache.counters
    return {
        "id": space.namespace.id.hex(),
        "domain": space.namespace.domain,
        "model": space.namespace.model,
        "block_bytes": space.namespace.layout.block_bytes,
        "blocks": space.cache.index.blocks,
        "dying_segments": space.dying,
        "lookup_blocks": {tier: counters["lookup", tier] for tier in LOOKUP_TIERS},
        "sessions": [{"client": session.name, "pid": session.pid} for session in list(space.sessions.values())],
        "slots": {arena.tier.name: arena.pool.counts() for arena in space.arenas},
    }

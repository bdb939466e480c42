"""The admin socket: how the daemon is, and what an operator may ask of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from tierd import __version__, audit, clock
from tierd.config import Config
from tierd.core.plan import WRITE_BACK
from tierd.errors import Gone, Invalid, TierdError
from tierd.keeper import Keeper
from tierd.metrics import EVICTIONS, FAILURES, LOOKUP_TIERS, Metrics, mismatches, slots_by_state
from tierd.purge import Purged, purge
from tierd.scrub import Scrub
from tierd.server import Connection
from tierd.space import Space
from tierd.tiers.io import Io
from tierd.wire.messages import Request

GIVEN_UP: list[tuple[str, ...]] = [(f"write_back_{why}",) for why in ("dropped", "orphans", "short")]
GIVEN_UP += [("failed", outcome, WRITE_BACK) for outcome in FAILURES]
"""Counters of blocks that were to be written and will not be."""


class Admin:
    """Handler of the admin socket."""

    def __init__(
        self,
        config: Config,
        keeper: Keeper,
        metrics: Metrics,
        io: Io,
        scrub: Scrub,
        metrics_address: str,
        drain: Callable[[], None],
        reload: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        self._config, self._keeper, self._metrics, self._io = config, keeper, metrics, io
        self._scrub, self._drain, self._reload = scrub, drain, reload
        self._metrics_address = metrics_address
        self._purging: set[asyncio.Task[Purged]] = set()
        self._started = clock.monotonic_seconds()

    def connected(self, connection: Connection) -> None:
        """Nothing is kept per connection; the server admits only root and the daemon's own user."""

    def disconnected(self, connection: Connection) -> None:
        """Nothing was kept."""

    def request(self, connection: Connection, request: Request) -> dict[str, Any] | Awaitable[dict[str, Any]]:
        """Answer a checked request; the audit log has it when it has ended."""
        try:
            answer = self._answer(request)
        except TierdError as error:
            audit.asked(connection.peer, request, error.code, reason=str(error))
            raise
        if not isinstance(answer, dict):
            return audit.followed(connection.peer, request, answer)
        audit.asked(connection.peer, request, "done")
        return answer

    def _answer(self, request: Request) -> dict[str, Any] | Awaitable[dict[str, Any]]:
        match request.verb:
            case "status":
                return self.status()
            case "sync":
                return self._sync(request.deadline_seconds)
            case "drain":
                self._drain()
                return {}
            case "reload":
                return self._reload()
            case "purge":
                return self._purge(request["namespace"], request["shred"])
            case "scrub":
                return self._scrubbed(request["action"])
        raise Invalid(f"{request.verb}: not on this socket")

    async def _sync(self, seconds: float | None) -> dict[str, Any]:
        before = self._metrics.counters()
        most = self._config.limits.wait_seconds_max if seconds is None else seconds
        await self._keeper.sync(clock.monotonic_seconds() + most)
        meanwhile = self._metrics.counters() - before
        return {"blocks": meanwhile["written",], "given_up": sum(meanwhile[name] for name in GIVEN_UP)}

    async def _purge(self, prefix: str, shred: bool) -> dict[str, Any]:
        space = self._find(prefix)
        purging = asyncio.create_task(purge(self._keeper, space, shred))
        self._purging.add(purging)
        purging.add_done_callback(self._purging.discard)
        done = await asyncio.shield(purging)  # whoever asked may leave: what was begun is finished
        return {"namespace": space.namespace.id, "epoch": space.epoch, "blocks": done.blocks, "segments": done.segments}

    def _scrubbed(self, action: str) -> dict[str, Any]:
        match action:
            case "start":
                self._scrub.start()
            case "pause":
                self._scrub.pause()
            case "status":
                pass
            case _:
                raise Invalid(f"scrub: {action!r:.64} is not one of start, pause, status")
        return self._scrub.status()

    def _find(self, prefix: str) -> Space:
        """The namespace whose id in hex begins so."""
        found = [space for space in self._keeper.spaces.values() if space.namespace.id.hex().startswith(prefix.lower())]
        if not found:
            raise Gone(f"no namespace begins with {prefix!r}: tierd status --json lists them")
        if len(found) > 1:
            raise Invalid(f"{len(found)} namespaces begin with {prefix!r}: give more digits")
        return found[0]

    def status(self) -> dict[str, Any]:
        """Everything a person asks first, as plain values."""
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
            "metrics": self._metrics_address,
            "io": self._io._asdict(),
            "tiers": tiers,
            "lookup_blocks": {tier: counters["lookup", tier] for tier in LOOKUP_TIERS},
            "evicted_blocks": {f"{tier}.{kind}": counters["evicted", tier, kind] for tier in tiers for kind in EVICTIONS},
            "checksum_failures": mismatches(counters),
            "unwritten_runs": self._keeper.unwritten(),
            "sessions": sum(len(space.sessions) for space in spaces),
            "namespaces": [
                {
                    "id": space.namespace.id.hex(),
                    "domain": space.namespace.domain,
                    "model": space.namespace.model,
                    "block_bytes": space.namespace.layout.block_bytes,
                    "blocks": space.cache.index.blocks,
                    "dying_segments": space.dying,
                    "sessions": [{"client": s.name, "pid": s.pid} for s in space.sessions.values()],
                    "slots": {arena.tier.name: arena.pool.counts() for arena in space.arenas},
                }
                for space in spaces
            ],
        }

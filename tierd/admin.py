"""The admin socket: what an operator may ask of the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from tierd import audit, clock
from tierd.config import Config
from tierd.errors import Gone, Invalid, TierdError
from tierd.keeper import Keeper
from tierd.pinboard import Pinboard, listed, pinned_bytes
from tierd.purge import Purged, leave, purge
from tierd.quotas import UNLIMITED, Quotas, checked
from tierd.recorder import Recorder
from tierd.scrub import Scrub
from tierd.server import Connection
from tierd.space import Space
from tierd.status import Status
from tierd.tiers.state import folder_of
from tierd.tiers.tier import Tier
from tierd.wire.messages import Answer, Answering, Request

CLOSE_SECONDS_MAX = 30.0
RECORD_SECONDS = 1.0
"""How long an answer to `record` waits for the first request."""


class Admin:
    """Handler of the admin socket."""

    def __init__(
        self,
        config: Config,
        keeper: Keeper,
        recorder: Recorder,
        status: Status,
        scrub: Scrub,
        quotas: Quotas,
        pinboard: Pinboard,
        drain: Callable[[], None],
        reload: Answering,
    ) -> None:
        self._config, self._keeper, self._recorder, self._status = config, keeper, recorder, status
        self._scrub, self._quotas, self._pinboard, self._drain, self._reload = scrub, quotas, pinboard, drain, reload
        self._purging: set[asyncio.Task[Purged]] = set()

    async def close(self) -> None:
        """Wait for purges under way, so that no header is written any more when the next life reads them; for a medium that
        does not answer, no longer than CLOSE_SECONDS_MAX.
        """
        if self._purging:
            await asyncio.wait(self._purging, timeout=CLOSE_SECONDS_MAX)

    def connected(self, connection: Connection) -> None:
        """Nothing is kept per connection; the server admits only root and the daemon's own user."""

    def disconnected(self, connection: Connection) -> None:
        """A recording ends with the connection that asked for it."""
        self._recorder.end(connection)

    def request(self, connection: Connection, request: Request) -> Answer:
        """Answer a checked request; the audit log has it when it has ended."""
        try:
            answer = self._answer(connection, request)
        except TierdError as error:
            self.refused(connection, request, error)
            raise
        if not isinstance(answer, dict):
            return partial(audit.followed, connection.peer, request, answer)
        audit.asked(connection.peer, request, "done")
        return answer

    def refused(self, connection: Connection, request: Request, error: TierdError) -> None:
        """The audit log has it."""
        audit.asked(connection.peer, request, error.code, reason=str(error))

    def _answer(self, connection: Connection, request: Request) -> dict[str, Any] | Answering:
        match request.verb:
            case "status":
                return self._status()
            case "sync":
                return partial(self._sync, request.deadline_seconds)
            case "drain":
                self._drain()
                return {}
            case "reload":
                return self._reload
            case "record":
                seconds = min(RECORD_SECONDS, self._config.limits.wait_seconds_max / 2)
                return partial(self._recorder.take, connection, request["namespace"], seconds)
            case "purge":
                return partial(self._purge, request["namespace"], request["shred"])
            case "scrub":
                return self._scrubbed(request["action"])
            case "pin":
                return partial(self._pin, request["namespace"], request["block"])
            case "unpin":
                return partial(self._unpin, request["namespace"], request["block"])
            case "quota":
                if request["min"] is None and request["max"] is None:
                    return {"quotas": self._allotted(request["namespace"], request["tier"])}
                return partial(self._allot, **request)
        raise Invalid(f"{request.verb}: not on this socket")

    async def _sync(self, seconds: float | None) -> dict[str, Any]:
        most = self._config.limits.wait_seconds_max if seconds is None else seconds
        await self._keeper.sync(clock.monotonic_seconds() + most)
        return self._status.written()

    async def _purge(self, prefix: str, shred: bool) -> dict[str, Any]:
        space = self._find(prefix)
        self._check_reach(space)
        purging = asyncio.create_task(purge(self._keeper, space, shred))
        self._purging.add(purging)
        purging.add_done_callback(self._purged)
        done = await asyncio.shield(purging)  # whoever asked may leave: what was begun is finished
        await leave(space)
        return {"namespace": space.namespace.id, "epoch": space.epoch, "blocks": done.blocks, "segments": done.segments}

    def _check_reach(self, space: Space) -> None:
        """A daemon without an nvme tier does not know the files of a life that had one: the next such life would serve them."""
        folder = folder_of(self._config.nvme.path, space.namespace)
        if not space.lower and folder.is_dir() and any(folder.iterdir()):
            remedy = "remove it, then purge again"
            raise Invalid(f"purge: {folder} has blocks that this daemon cannot reach, its nvme.bytes is 0: {remedy}")

    def _purged(self, purging: asyncio.Task[Purged]) -> None:
        self._purging.discard(purging)
        if not purging.cancelled():
            purging.exception()  # the log has it; whoever asked may have left

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

    async def _pin(self, prefix: str, block: bytes | None) -> dict[str, Any]:
        """Pin a chain, if one is named, and list what is pinned."""
        space = self._find(prefix)
        if block is not None:
            self._pinboard.pin(space, block)
            await self._pinboard.save()
        return {"namespace": space.namespace.id, "pins": listed(space)}

    async def _unpin(self, prefix: str, block: bytes) -> dict[str, Any]:
        """End a pin, and list what is pinned still."""
        space = self._find(prefix)
        space.cache.pins.unpin(block)
        await self._pinboard.save()
        return {"namespace": space.namespace.id, "pins": listed(space)}

    def _allotted(self, prefix: str, only: str | None = None) -> list[dict[str, Any]]:
        """Quotas, and bytes in use, of the namespaces whose ids begin so, in each tier or only one."""
        self._tier(only)
        rows = []
        for namespace in sorted({*self._keeper.spaces, *self._quotas.namespaces}):
            space = self._keeper.spaces.get(namespace)
            for at, tier in enumerate(self._keeper.tiers):
                if namespace.hex().startswith(prefix.lower()) and only in (None, tier.name):
                    least, most = self._quotas.of(namespace).get(tier.name, UNLIMITED)
                    used = space.arenas[at].used_bytes if space else 0
                    rows.append({"namespace": namespace, "tier": tier.name, "min": least, "max": most, "used": used})
        if prefix and not rows:
            raise Gone(f"no namespace begins with {prefix!r}: tierd quota lists them")
        return rows

    async def _allot(self, namespace: str, tier: str | None, min: int | None, max: int | None) -> dict[str, Any]:
        """Change a quota, and give up what is over it; what is not named stays."""
        arena = self._tier(tier)
        if not namespace or arena is None:
            raise Invalid(f"quota: which namespace, and which tier of {', '.join(one.name for one in self._keeper.tiers)}?")
        rows = self._allotted(namespace, tier)
        if len(rows) > 1:
            raise Invalid(f"{len(rows)} namespaces begin with {namespace!r}: give more digits")
        row = rows[0]
        name = row["namespace"]
        quota = checked(row["min"] if min is None else min, row["max"] if max is None else max)
        if space := self._keeper.spaces.get(name):
            segment = arena.geometry(space.namespace).total_bytes
            if any(0 < bound < segment for bound in quota):
                raise Invalid(f"quota: {quota.least} and {quota.most}: one of them is less than a segment, {segment} bytes")
            if quota.most and (pinned := pinned_bytes(space.arena(arena.name))) > quota.most:
                raise Invalid(f"quota: segments of {pinned} bytes have pinned blocks, {quota.most} is less: unpin some first")
        await self._quotas.set(name, arena.name, quota, arena.budget.most)
        if space := self._keeper.spaces.get(name):
            space.allot(self._quotas.of(name))
            self._keeper.fit(space)
        return {"quotas": self._allotted(namespace, tier)}

    def _tier(self, name: str | None) -> Tier | None:
        """The tier of a name, or none of no name; raises Invalid where there is none."""
        tiers = {tier.name: tier for tier in self._keeper.tiers}
        if name and name not in tiers:
            raise Invalid(f"quota: which tier of {', '.join(tiers)}? There is no {name!r:.64}")
        return tiers[name] if name else None

    def _find(self, prefix: str) -> Space:
        """The namespace whose id in hex begins so."""
        found = [space for space in self._keeper.spaces.values() if space.namespace.id.hex().startswith(prefix.lower())]
        if not found:
            raise Gone(f"no namespace begins with {prefix!r}: tierd status --json lists them")
        if len(found) > 1:
            raise Invalid(f"{len(found)} namespaces begin with {prefix!r}: give more digits")
        return found[0]

"""The admin socket: what an operator may ask of the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from tierd import audit, clock
from tierd.audit import Answering
from tierd.config import Config
from tierd.errors import Gone, Invalid, TierdError
from tierd.keeper import Keeper
from tierd.purge import Purged, leave, purge
from tierd.recorder import Recorder
from tierd.scrub import Scrub
from tierd.server import Connection
from tierd.space import Space
from tierd.status import Status
from tierd.tiers.state import folder_of
from tierd.wire.messages import Request

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
        drain: Callable[[], None],
        reload: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        self._config, self._keeper, self._recorder, self._status = config, keeper, recorder, status
        self._scrub, self._drain, self._reload = scrub, drain, reload
        self._purging: set[asyncio.Task[Purged]] = set()

    async def close(self) -> None:
        """Wait for purges under way, so that no header is written any more when the next life reads them."""
        if self._purging:
            await asyncio.wait(self._purging)

    def connected(self, connection: Connection) -> None:
        """Nothing is kept per connection; the server admits only root and the daemon's own user."""

    def disconnected(self, connection: Connection) -> None:
        """A recording ends with the connection that asked for it."""
        self._recorder.end(connection)

    def request(self, connection: Connection, request: Request) -> dict[str, Any] | Awaitable[dict[str, Any]]:
        """Answer a checked request; the audit log has it when it has ended."""
        try:
            answer = self._answer(connection, request)
        except TierdError as error:
            audit.asked(connection.peer, request, error.code, reason=str(error))
            raise
        if not isinstance(answer, dict):
            return audit.followed(connection.peer, request, answer)
        audit.asked(connection.peer, request, "done")
        return answer

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

    def _find(self, prefix: str) -> Space:
        """The namespace whose id in hex begins so."""
        found = [space for space in self._keeper.spaces.values() if space.namespace.id.hex().startswith(prefix.lower())]
        if not found:
            raise Gone(f"no namespace begins with {prefix!r}: tierd status --json lists them")
        if len(found) > 1:
            raise Invalid(f"{len(found)} namespaces begin with {prefix!r}: give more digits")
        return found[0]

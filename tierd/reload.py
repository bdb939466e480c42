"""SIGHUP and `tierd reload`: the configuration is read again as a whole, or not at all.

What can change while clients are attached is applied at once; other keys that differ wait for a restart, and are named.
A mistake anywhere changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tierd import log as logs
from tierd import systemd
from tierd.config import Config
from tierd.errors import Invalid

log = logs.get_logger("reload")


class Reloader:
    """`load` reads the configuration as it was read at start; `apply` is given the new one and cannot fail."""

    def __init__(self, config: Config, load: Callable[[], Config], apply: Callable[[Config], None]) -> None:
        self.config = config
        self._load, self._apply = load, apply
        self._turn = asyncio.Lock()

    async def reload(self) -> dict[str, Any]:
        """The names of keys that have `changed` and of those that need a `restart`; raises Invalid with nothing changed."""
        async with self._turn:
            await asyncio.to_thread(systemd.reloading)
            try:
                fresh = await asyncio.to_thread(self._load)
                config, changed, restart = self.config.reloaded(fresh)
                self._apply(config)
                self.config = config
            except Invalid as error:
                log.error("configuration not reloaded", reason=str(error))
                raise
            finally:
                await asyncio.to_thread(systemd.ready)
            log.info("configuration reloaded", changed=",".join(changed), restart=",".join(restart))
            waiting = f"; a restart is needed for {', '.join(restart)}" if restart else ""
            await asyncio.to_thread(systemd.status, f"serving{waiting}")
            return {"changed": changed, "restart": restart}

    async def on_signal(self) -> None:
        """As `reload`, for a signal, which nobody waits for."""
        try:
            await self.reload()
        except Invalid:
            return  # logged

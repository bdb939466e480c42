"""What the service manager keeps of sessions, asked for without making the event loop wait.

A message to a manager that hangs waits for up to a second, so messages go out from one thread, in their order: a session is
never given up before it was stored.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from tierd import systemd


class Kept:
    """Stores and gives up descriptors by name; on the loop only."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "tierd-kept")

    async def store(self, name: str, descriptor: int) -> bool:
        """Whether the manager has taken a copy of the descriptor, which stays the caller's."""
        copy = os.dup(descriptor)
        return await asyncio.wrap_future(self._thread.submit(_store, name, copy))

    def remove(self, name: str) -> None:
        """Have it given up, some time soon. What is lost of that, the next life sees: its process is gone."""
        if systemd.can_store():
            with suppress(RuntimeError):  # closed
                self._thread.submit(systemd.remove, name)

    def close(self) -> None:
        """Forget what is queued, and wait for the message under way."""
        self._thread.shutdown(cancel_futures=True)


def _store(name: str, copy: int) -> bool:
    try:
        return systemd.store(name, [copy])
    finally:
        os.close(copy)

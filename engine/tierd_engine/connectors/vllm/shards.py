"""A block in the parts that tensor parallel workers have of it: each worker's parts are a namespace of their own.

A prefix is found as far as all parts of it are there, and its lease is one lease in each namespace. So the daemon needs no
notion of a part, and one that was lost is a miss of that block like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tierd.client import Client, Lookup, Removed


@dataclass
class Found:
    """Leases on a prefix of `blocks` blocks, of which `told` are in memory; `release` gives all of them back."""

    parts: list[Lookup]

    def __post_init__(self) -> None:
        self.blocks = min(part.blocks for part in self.parts)
        self.told = min(part.told for part in self.parts)

    def release(self) -> None:
        """End the leases."""
        for part in self.parts:
            part.release()


class Shards:
    """Looks prefixes up in the namespaces of all workers, in the order of their ranks."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.clients = clients

    def __repr__(self) -> str:
        return f"<Shards {[client.session for client in self.clients]}>"

    def lookup(self, hashes: bytes) -> Found:
        """Lease the longest prefix of which every worker's part is there. All are asked before any answer is waited for: it
        takes one way to the daemon and back however many workers there are, and one deadline when it hangs.
        """
        asked = [client.lookup_nowait(hashes) for client in self.clients]
        return Found([part.wait() for part in asked])

    def keep(self, block: bytes, seconds: float, priority: int) -> None:
        """Ask that a chain is kept, every worker's part of it."""
        for client in self.clients:
            client.keep(block, seconds, priority)

    def removed(self) -> list[Removed]:
        """What went of each worker's parts since the last call."""
        return [client.removed() for client in self.clients]

    def close(self) -> None:
        """End the sessions."""
        for client in self.clients:
            client.close()

"""The tiers of a namespace, top first: which there are, and what each of them is for."""

from __future__ import annotations

from collections.abc import Mapping

from tierd.core.pool import Pool

TIERS = ("gpu", "cpu", "nvme")
"""All tiers, top first. Sessions live in gpu or cpu, whose slots they map; nvme survives alone."""
PAGED = "gpu"
"""The tier whose slots are the pages of its sessions: they hold them one by one, and name them when they are full."""
CLOSED = "nvme"
"""The tier that is prefix-closed: a block enters it only behind its parent, and leaves it only before."""


class Ladder:
    """Tiers by their place, 0 being the top; a place that a namespace does not have is left out."""

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        self.names = tuple(pools)
        assert self.names == tuple(name for name in TIERS if name in pools), f"tiers {self.names} are in the wrong order"
        self.pools = list(pools.values())
        self.closed = len(self.names) - (CLOSED in pools)
        """Place of the prefix-closed tier; without one, the place behind the last."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def mapped(self) -> range:
        """The places of the tiers in memory."""
        return range(self.closed)

    def place(self, name: str) -> int:
        """Where a tier is."""
        return self.names.index(name)

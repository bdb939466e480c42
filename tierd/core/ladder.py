"""The tiers of a namespace, top first: which there are, and what each of them is for.

A tier's kind is its name without a number. Only the paged kind may be there several times: a tier for each device (gpu0, gpu1),
side by side at the top, each with slots and an order of eviction of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import digits

import numpy as np
from numpy.typing import NDArray

from tierd.core.pool import Pool

TIERS = ("gpu", "cpu", "nvme")
"""All kinds, top first. Sessions live in gpu or cpu, whose slots they map; nvme survives alone."""
PAGED = "gpu"
"""The kind whose slots are the pages of its sessions: they hold them one by one, and name them when they are full."""
CLOSED = "nvme"
"""The tier that is prefix-closed: a block enters it only behind its parent, and leaves it only before."""


class Ladder:
    """Tiers by their place, 0 being the top; a place that a namespace does not have is left out."""

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        self.names = tuple(pools)
        self.kinds = tuple(map(kind_of, self.names))
        self.paged = self.kinds.count(PAGED)
        """How many tiers are of the paged kind: they have the first places."""
        wanted = tuple(kind for kind in TIERS for _ in range(self.kinds.count(kind) if kind == PAGED else kind in self.kinds))
        assert self.kinds == wanted, f"tiers {self.names} are in the wrong order"
        self.pools = list(pools.values())
        self.closed = len(self.names) - (CLOSED in pools)
        """Place of the prefix-closed tier; without one, the place behind the last."""
        self.near = [self._near(tier) for tier in range(len(self.names))]
        """By tier: all places, the one that it is quickest to read from first."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def mapped(self) -> range:
        """The places of the tiers in memory."""
        return range(self.closed)

    def place(self, name: str) -> int:
        """Where a tier is."""
        return self.names.index(name)

    def below(self, tier: int) -> int:
        """The place that what is stored in a tier goes on to: of all devices, the same."""
        return max(tier + 1, self.paged)

    def _near(self, tier: int) -> NDArray[np.intp]:
        """From top to bottom; but for a device other devices come behind what is in host memory, which costs one copy less."""
        others = [other for other in range(self.paged) if other != tier] if tier < self.paged else []
        rest = [place for place in range(len(self.names)) if place not in others]
        between = sum(place < self.closed for place in rest)
        return np.array(rest[:between] + others + rest[between:], np.intp)


def kind_of(name: str) -> str:
    """What a tier of this name is for: one of TIERS."""
    return name.rstrip(digits)

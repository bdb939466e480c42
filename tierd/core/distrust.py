"""Copies that are not what was written: they leave the tree, and their slots are not used again in this life."""

from __future__ import annotations

import numpy as np

from tierd.core.index import Index
from tierd.core.plan import Slots
from tierd.core.pool import Pool


def distrust(index: Index, tier: int, pool: Pool, hashes: bytes, slots: Slots) -> None:
    """Give up the copies that some of these blocks (packed hashes) have in these slots of a tier."""
    trimmed = []
    for _, piece in index.runs(hashes):
        offsets = np.flatnonzero(np.isin(piece.node.slots[tier], slots))
        if len(offsets):
            index.clear(tier, piece.node, offsets)
            trimmed.append(piece.node)
    pool.quarantine(slots)
    index.trim(trimmed)

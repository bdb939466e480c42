"""Pinned chains of one namespace: a pin is one more user of each copy of its blocks, so that eviction passes them by.

- Copies are those that are there when it is pinned. On devices, whose pages engines need, only one of what is nowhere else.
- A segment with a pinned block is not given up (`Pool.pinned`), so what pins may hold is counted in segments.
- Chains may share blocks: each pin uses them for itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tierd.core.index import Index
from tierd.core.ladder import Ladder
from tierd.core.plan import Slots
from tierd.errors import Busy, Gone


class Pins:
    """Pins by the hash of their chain's last block: the slots (int32[tiers, n], -1: none) that each one uses."""

    def __init__(self, index: Index, ladder: Ladder, counters: Counter[tuple[str, ...]]) -> None:
        self._index, self._ladder, self._counters = index, ladder, counters
        self.chains: dict[bytes, Slots] = {}
        self._segments: dict[bytes, list[set[int]]] = {}
        """The ordinals by tier that each of them is in: a pin or its end does not look at the slots of all others."""

    def pin(self, block: bytes, segments_max: Sequence[int]) -> int:
        """Pin the chain from the root to a block; returns its blocks. A pin that is there stays as it is.

        Raises Gone when a block of it is in no tier, Busy when pins would be in more than `segments_max` segments of a tier.
        """
        if block in self.chains:
            return len(self.chains[block][0])
        slots = self._choose(self._slots(block))
        segments = [_ordinals(row, pool.slots_per_segment) for pool, row in zip(self._ladder.pools, slots, strict=True)]
        for pool, name, own, most in zip(self._ladder.pools, self._ladder.names, segments, segments_max, strict=True):
            ordinals = own | pool.pinned
            if len(ordinals) > max(most, len(pool.pinned)):
                self._counters["pin_refused",] += 1
                what = f"its blocks and those pinned before are in {len(ordinals)} segments of the {name} tier"
                raise Busy(f"pin: {what}, pins may be in {most}: unpin others, or raise policy.pinned_share")
        for pool, row in zip(self._ladder.pools, slots, strict=True):
            pool.use(row[row >= 0])
        self.chains[block], self._segments[block] = slots, segments
        self._note_segments()
        return len(slots[0])

    def unpin(self, block: bytes) -> int:
        """End a pin; returns its blocks. Raises Gone when there is none."""
        if block not in self.chains:
            raise Gone(f"unpin: the chain that ends in {block.hex()} is not pinned")
        blocks = self._end(block)
        self._note_segments()
        return blocks

    def clear(self) -> None:
        """End all pins."""
        for block in list(self.chains):
            self._end(block)
        self._note_segments()

    def _end(self, block: bytes) -> int:
        slots = self.chains.pop(block)
        del self._segments[block]
        for pool, row in zip(self._ladder.pools, slots, strict=True):
            pool.unuse(row[row >= 0])
        return len(slots[0])

    def _slots(self, block: bytes) -> Slots:
        """Where each block of the chain is (int32[tiers, n])."""
        if not (found := self._index.find(block)):
            raise Gone(f"pin: block {block.hex()} is not known here: store its chain first")
        node, offset = found
        *above, _ = reversed(self._index.path(node))
        slots = np.concatenate([*(member.slots for member in above), node.slots[:, : offset + 1]], axis=1)
        missing = np.flatnonzero(slots.max(0) < 0)
        if len(missing):
            raise Gone(f"pin: block {missing[0]} of the chain of {slots.shape[1]} is in no tier any more: store it again")
        return slots

    def _choose(self, slots: Slots) -> Slots:
        """The copies that are worth a pin."""
        chosen = slots >= 0
        for tier in range(self._ladder.paged):  # one after the other: what only devices have stays chosen on the last of them
            chosen[tier] &= np.count_nonzero(chosen, axis=0) == 1
        return np.where(chosen, slots, -1).astype(np.int32)

    def _note_segments(self) -> None:
        for tier, pool in enumerate(self._ladder.pools):
            pool.pinned = set[int]().union(*(segments[tier] for segments in self._segments.values()))


def _ordinals(row: Slots, slots_per_segment: int) -> set[int]:
    return set(np.unique(row[row >= 0] // slots_per_segment).tolist())

"""Pinned chains of one namespace: a pin is one more user of each copy of its blocks, so that eviction passes them by.

- Copies are those that are there when it is pinned. On devices, whose pages engines need, only one of what is nowhere else.
- A segment with a pinned block is not given up (`Pool.pinned`), so what pins may hold is counted in segments.
- Chains may share blocks: each pin uses them for itself.
- A pin may have a Term. It ends by itself then, and before that it gives way to one of a greater term, as if it were not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tierd.core.index import Index
from tierd.core.ladder import Ladder
from tierd.core.plan import Slots
from tierd.errors import Busy, Gone


class Term(NamedTuple):
    """Which pin is kept of two that have no room together: that of the higher `priority`, else the one that lasts longer,
    `until` when (Unix milliseconds).
    """

    priority: int
    until: int

    def joined(self, other: Term) -> Term:
        """What two requests for the same chain want together."""
        return Term(max(self.priority, other.priority), max(self.until, other.until))


FOREVER = Term(1 << 32, (1 << 63) - 1)
"""Until it is unpinned. It gives way to nothing."""


class Pins:
    """Pins by the hash of their chain's last block: the slots (int32[tiers, n], -1: none) that each one uses."""

    def __init__(self, index: Index, ladder: Ladder, counters: Counter[tuple[str, ...]]) -> None:
        self._index, self._ladder, self._counters = index, ladder, counters
        self.chains: dict[bytes, Slots] = {}
        self.terms: dict[bytes, Term] = {}
        self._segments: dict[bytes, list[set[int]]] = {}
        """The ordinals by tier that each of them is in: a pin or its end does not look at the slots of all others."""

    def pin(self, block: bytes, segments_max: Sequence[int], chains_max: int, term: Term = FOREVER) -> int:
        """Pin the chain from the root to a block; returns its blocks. One that is pinned stays so, for the greater term.

        Where there are `chains_max` pins, or they would be in more than `segments_max` segments of a tier, pins of lesser
        terms end; the greatest stay first, then whatever still fits. Raises Gone when a block of the chain is in no tier, Busy
        when even all of those would not make room.
        """
        if block in self.chains:
            self.terms[block] = self.terms[block].joined(term)
            return len(self.chains[block][0])
        slots = self._choose(self._slots(block))
        segments = [_ordinals(row, pool.slots_per_segment) for pool, row in zip(self._ladder.pools, slots, strict=True)]
        for other in self._in_the_way(segments, segments_max, chains_max, term):
            self._counters["pin_displaced",] += 1
            self._end(other)
        for pool, row in zip(self._ladder.pools, slots, strict=True):
            pool.use(row[row >= 0])
        self.chains[block], self._segments[block], self.terms[block] = slots, segments, term
        self._note_segments()
        return len(slots[0])

    def _in_the_way(self, own: list[set[int]], segments_max: Sequence[int], chains_max: int, term: Term) -> list[bytes]:
        """Pins of lesser terms that must end so that one in its `own` segments can be; raises Busy when that is not enough."""
        pools = self._ladder.pools
        most = [max(limit, len(pool.pinned)) for limit, pool in zip(segments_max, pools, strict=True)]
        lesser = sorted((one for one in self.chains if self.terms[one] < term), key=self.terms.__getitem__)
        others = self.chains.keys() - lesser
        pinned = [new.union(*(self._segments[one][tier] for one in others)) for tier, new in enumerate(own)]
        for ordinals, name, limit in zip(pinned, self._ladder.names, most, strict=True):
            if len(ordinals) > limit:
                self._counters["pin_refused",] += 1
                what = f"its blocks and those pinned before are in {len(ordinals)} segments of the {name} tier"
                raise Busy(f"pin: {what}, pins may be in {limit}: unpin others, or raise policy.pinned_share")
        room = chains_max - len(others) - 1
        if room < 0:
            self._counters["pin_refused",] += 1
            raise Busy(f"pin: the namespace has its maximum of {chains_max} pins: unpin others")
        ended = []
        for one in reversed(lesser):  # the greatest term has the first choice of what room is left
            more = [its - there for there, its in zip(pinned, self._segments[one], strict=True)]
            if room and all(len(old) + len(new) <= limit for old, new, limit in zip(pinned, more, most, strict=True)):
                room -= 1
                for ordinals, new in zip(pinned, more, strict=True):
                    ordinals |= new
            else:
                ended.append(one)
        return ended

    def unpin(self, block: bytes) -> int:
        """End a pin; returns its blocks. Raises Gone when there is none."""
        if block not in self.chains:
            raise Gone(f"unpin: the chain that ends in {block.hex()} is not pinned")
        blocks = self._end(block)
        self._note_segments()
        return blocks

    def blocks_of(self, block: bytes) -> int:
        """How many blocks the chain has that ends in a block; raises Gone when one of them is in no tier."""
        return int(self._slots(block).shape[1])

    def is_below(self, block: bytes) -> bool:
        """Whether every block of a chain has a copy beneath the paged tiers, so that a pin takes no page from an engine. Raises
        Gone when one is in no tier.
        """
        return bool((self._slots(block)[self._ladder.paged :].max(0, initial=-1) >= 0).all())

    @property
    def has_endless(self) -> bool:
        """Whether any pin is not only what a request wanted to be kept."""
        return FOREVER in self.terms.values()

    def lapse(self, now: int) -> int:
        """End the pins whose term is over at `now` (Unix milliseconds); returns how many."""
        over = [block for block, term in self.terms.items() if term.until <= now]
        for block in over:
            self._end(block)
        if over:
            self._note_segments()
        return len(over)

    def clear(self) -> None:
        """End all pins."""
        for block in list(self.chains):
            self._end(block)
        self._note_segments()

    def _end(self, block: bytes) -> int:
        slots = self.chains.pop(block)
        del self._segments[block], self.terms[block]
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

"""Three queues, leaf first: for `tierd replay` alone, as a measure.

New blocks wait in a small queue; those used at least twice there go on to the main one, the others leave a ghost, whose
return goes to the main queue at once. In the main queue what was used goes round again (S3-FIFO: Yang, Zhang, Qiu, Yue and
Rashmi, SOSP 2023). Do not use it in front of models: the small queue is shorter than one prompt's chain, whose tail is gone
before the next turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tierd.block import HASH_BYTES
from tierd.core.policy.placed import Placed, Spot, haunt, recall
from tierd.core.policy.runs import MARK_BYTES, Ghosts, Run, key, marks_of

SMALL, MAIN = 0, 1
SMALL_SHARE, GHOST_SHARE = 0.1, 0.9
USES_TO_MOVE, USES_MAX = 2, 3


class S3Fifo(Placed):
    """One tier's nodes in two queues; `slots` says how many blocks the tier holds."""

    def __init__(self, slots: Callable[[], int]) -> None:
        super().__init__(2)
        self._slots = slots
        self._ghosts: Ghosts[Run] = Ghosts()
        self._returning = b"", 0
        self._has_evicted = False

    def asked(self, path: Sequence[Any], rest: bytes, now: int) -> None:
        """A request uses these nodes; nothing moves."""
        for node in path:
            if spot := self.spots.get(node):
                spot.uses += 1
        marks = marks_of(rest)
        self._returning = marks[:MARK_BYTES], recall(self._ghosts, marks, 0)

    def touch(self, nodes: Sequence[Any]) -> None:
        """Queues know no recency."""

    def spot_of_new(self, node: Any) -> Spot:
        """In the main queue if it comes again, or as long as the tier is not full and the small queue is."""
        mark, blocks = self._returning
        spills = not self._has_evicted and self.sizes[SMALL] >= int(self._slots() * SMALL_SHARE)
        return Spot(MAIN if spills or (blocks and key(node) == mark) else SMALL, self.next(), 0)

    def cuts(self, node: Any, hashes: bytes) -> Sequence[int]:
        """What comes again is cut from what is new."""
        mark, blocks = self._returning
        return [0, blocks] if mark == hashes[:MARK_BYTES] and 0 < blocks * HASH_BYTES < len(hashes) else [0]

    def left(self, kind: int, hashes: bytes) -> None:
        """Blocks that left the small queue are ghosts now."""
        if kind == SMALL:
            haunt(self._ghosts, hashes)
            while self._ghosts.blocks > self._slots() * GHOST_SHARE and len(self._ghosts) > 1:
                self._ghosts.forget_oldest()

    def coldest(self, new: bytes = b"", price: float = 1.0) -> Iterator[Any]:
        """Nodes from the first on that were not used; what is new is always let in."""
        self._has_evicted = self._has_evicted or bool(new)
        main_max = self._slots() - int(self._slots() * SMALL_SHARE)
        draw, taken = self.leaves.draw(), [0, 0]
        while True:
            small, main = (self.sizes[kind] - taken[kind] for kind in (SMALL, MAIN))
            kind = MAIN if main > main_max or not small else SMALL
            if draw.first(kind) is None:
                kind = 1 - kind
            if (node := draw.first(kind)) is None:
                return
            spot = self.spots[node]
            if kind == SMALL and spot.uses >= USES_TO_MOVE:
                self.move(node, MAIN)
                spot.order, spot.uses = self.next(), 0
                draw.place(node)
            elif kind == MAIN and spot.uses:
                spot.order, spot.uses = self.next(), min(spot.uses, USES_MAX) - 1
                draw.place(node)
            else:
                draw.take(kind)
                taken[kind] += len(node)
                yield node

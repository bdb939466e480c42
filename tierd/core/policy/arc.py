"""Adaptive replacement, leaf first: for `tierd replay` alone, as a measure.

Blocks that were used once and those that were used again are two lists, each least recently used first; how much room each
has follows from which of the two would have had more hits, by ghosts of what they lost (ARC: Megiddo and Modha, FAST 2003).
A chain counts as many times as it has blocks. Do not use it in front of models: one prompt is a burst of new blocks, which
moves the balance back and forth. At tiers of five percent of the working set and more it is behind plain `lru`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tierd.block import HASH_BYTES
from tierd.core.policy.placed import Placed, Spot, haunt, recall
from tierd.core.policy.runs import MARK_BYTES, Ghosts, Run, key, marks_of

ONCE, AGAIN = 0, 1


class Arc(Placed):
    """One tier's nodes in two lists; `slots` says how many blocks the tier holds."""

    def __init__(self, slots: Callable[[], int]) -> None:
        super().__init__(2)
        self._slots = slots
        self._ghosts: list[Ghosts[Run]] = [Ghosts(), Ghosts()]
        self._room_for_once = 0
        """Blocks that the first list may have (p in the paper)."""
        self._returning = b"", 0
        """Mark of the first block behind the path of the latest request, and how many blocks from there on come again."""
        self._wanted_again = False

    def asked(self, path: Sequence[Any], rest: bytes, now: int) -> None:
        """A request uses these nodes again, and those of ghosts too."""
        for node in path:
            if spot := self.spots.get(node):
                spot.order = self.next()
                self.move(node, AGAIN)
        marks, at = marks_of(rest), 0
        self._wanted_again = False
        while any(self._ghosts[kind].get(marks[at : at + MARK_BYTES]) for kind in (ONCE, AGAIN)):
            for kind in (ONCE, AGAIN):
                mine, other = self._ghosts[kind].blocks, self._ghosts[1 - kind].blocks
                blocks = recall(self._ghosts[kind], marks, at)
                change = blocks * max(1, other // max(mine, 1))
                self._room_for_once += change if kind == ONCE else -change
                self._room_for_once = min(max(self._room_for_once, 0), self._slots())
                self._wanted_again |= kind == AGAIN and blocks > 0
                at += blocks * MARK_BYTES
        self._returning = marks[:MARK_BYTES], at // MARK_BYTES

    def touch(self, nodes: Sequence[Any]) -> None:
        """Make nodes the most recently used of their list."""
        for node in nodes:
            if spot := self.spots.get(node):
                spot.order = self.next()
                self.leaves.place(node)

    def spot_of_new(self, node: Any) -> Spot:
        """In the second list if it comes again."""
        mark, blocks = self._returning
        return Spot(AGAIN if blocks and key(node) == mark else ONCE, self.next(), 0)

    def add(self, node: Any) -> None:
        """Enter a node, and forget what has been gone for longest."""
        super().add(node)
        slots, (once, again) = self._slots(), self._ghosts
        while self.sizes[ONCE] + once.blocks > slots and len(once):
            once.forget_oldest()
        while sum(self.sizes) + once.blocks + again.blocks > 2 * slots and len(again):
            again.forget_oldest()

    def cuts(self, node: Any, hashes: bytes) -> Sequence[int]:
        """What comes again is cut from what is new."""
        mark, blocks = self._returning
        return [0, blocks] if mark == hashes[:MARK_BYTES] and 0 < blocks * HASH_BYTES < len(hashes) else [0]

    def left(self, kind: int, hashes: bytes) -> None:
        """Blocks of a list are ghosts now."""
        haunt(self._ghosts[kind], hashes)

    def coldest(self, new: bytes = b"", price: float = 1.0) -> Iterator[Any]:
        """Nodes from the first on of the list that has more than its room; what is new is always let in."""
        draw, once = self.leaves.draw(), self.sizes[ONCE]
        while True:
            room = self._room_for_once
            kind = ONCE if once > room or (once == room and self._wanted_again and once) else AGAIN
            if draw.first(kind) is None:
                kind = 1 - kind
            if (node := draw.first(kind)) is None:
                return
            draw.take(kind)
            once -= len(node) if kind == ONCE else 0
            yield node

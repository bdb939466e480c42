"""Least frequently used, with dynamic aging, leaf first.

What goes first has the smallest number of uses plus the age of the tier when it was used last, and the age is that sum
for what went last (LFU-DA: Arlitt, Cherkasova, Dilley, Friedrich and Jin, Performance Evaluation Review 2000). Do not use
it for prompts: one request enters a long chain at once, and the uses of old conversations outlive their value. It is for
traffic of a few popular prefixes that long-tailed requests must not wash out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tierd.core.policy.placed import Placed, Spot


class Lfu(Placed):
    """One tier's nodes by uses and age."""

    def __init__(self) -> None:
        super().__init__(1)
        self._age = 0

    def asked(self, path: Sequence[Any], rest: bytes, now: int) -> None:
        """A request uses these nodes once more."""
        for node in path:
            if spot := self.spots.get(node):
                spot.uses += 1
        self.touch(path)

    def touch(self, nodes: Sequence[Any]) -> None:
        """Make nodes the most recently used of those as often used."""
        for node in nodes:
            if spot := self.spots.get(node):
                spot.order = (self._age + spot.uses, self.next())
                self.leaves.place(node)

    def spot_of_new(self, node: Any) -> Spot:
        """Used once."""
        return Spot(0, (self._age + 1, self.next()), 1)

    def coldest(self, new: bytes = b"", price: float = 1.0) -> Iterator[Any]:
        """Nodes from the least used on; what is new is always let in."""
        draw = self.leaves.draw()
        while (node := draw.first(0)) is not None:
            if new:
                self._age = max(self._age, self.spots[node].order[0])
            draw.take(0)
            yield node

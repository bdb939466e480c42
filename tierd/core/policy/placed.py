"""What orders of classed nodes have in common: `lfu`, `arc` and `s3fifo`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tierd.block import HASH_BYTES
from tierd.core.policy import Policy
from tierd.core.policy.leaves import Leaves
from tierd.core.policy.runs import Ghosts, Run, marks_of


class Spot:
    """A node's class, its place in the order of its class, and how often it was used."""

    __slots__ = ("kind", "order", "uses")

    def __init__(self, kind: int, order: Any, uses: int) -> None:
        self.kind, self.order, self.uses = kind, order, uses


class Placed(Policy):
    """Nodes in `kinds` classes: `spots` says where each one is, `sizes` how many blocks a class has."""

    def __init__(self, kinds: int) -> None:
        self.spots: dict[Any, Spot] = {}
        self.sizes = [0] * kinds
        self.leaves = Leaves(self.spots, kinds)
        self._heads: dict[Any, Spot] = {}
        self._count = 0

    def __contains__(self, node: Any) -> bool:
        return node in self.spots

    def __len__(self) -> int:
        return len(self.spots)

    def next(self) -> int:
        """Larger than all before."""
        self._count += 1
        return self._count

    def spot_of_new(self, node: Any) -> Spot:
        """Where a node begins that was not entered before."""
        raise NotImplementedError

    def left(self, kind: int, hashes: bytes) -> None:
        """Blocks of a class are not in the tier any more."""

    def move(self, node: Any, kind: int) -> None:
        """A node is of another class, or has another place in its own."""
        spot = self.spots[node]
        self.sizes[spot.kind] -= len(node)
        self.sizes[kind] += len(node)
        spot.kind = kind
        self.leaves.place(node)

    def add(self, node: Any) -> None:
        """Enter a node as the most recently used."""
        spot = self._heads.pop(node, None)
        if spot is None:
            spot = self.spot_of_new(node)
            self.sizes[spot.kind] += len(node)
        self.spots[node] = spot
        self.leaves.enter(node)

    def remove(self, node: Any) -> None:
        """Take a node out."""
        spot = self.spots.pop(node)
        self.sizes[spot.kind] -= len(node)
        self.leaves.leave(node)
        self.left(spot.kind, node.hashes)

    def trimmed(self, node: Any, keep: int) -> None:
        """A node is about to lose all but its first `keep` blocks."""
        if spot := self.spots.get(node):
            self.sizes[spot.kind] -= len(node) - keep
            self.left(spot.kind, node.hashes[keep * HASH_BYTES :])

    def grown(self, node: Any, hashes: bytes) -> None:
        """Blocks were added at the end of a node that is entered."""
        if spot := self.spots.get(node):
            self.sizes[spot.kind] += len(hashes) // HASH_BYTES

    def split(self, node: Any, head: Any, is_entered: bool) -> None:
        """The first blocks of a node are a node of their own now, which is entered next if it is in the tier."""
        if (spot := self.spots.get(node)) and is_entered:
            self._heads[head] = Spot(spot.kind, spot.order, spot.uses)
        self.leaves.split(node, head)

    def alike(self, above: Any, node: Any) -> bool:
        """Whether a node and its only child may be joined."""
        one, other = self.spots.get(above), self.spots.get(node)
        return one is None or other is None or (one.kind, one.uses) == (other.kind, other.uses)

    def join(self, nodes: Sequence[Any]) -> None:
        """A line of only children, the first on top, is about to be the first one."""
        if spots := [spot for node in nodes if (spot := self.spots.pop(node, None))]:
            spots[0].order = max(spot.order for spot in spots)
            self.spots[nodes[0]] = spots[0]
        self.leaves.join(nodes)

    def cuts(self, node: Any, hashes: bytes) -> Sequence[int]:
        """Where blocks that come below a node are to be cut into nodes: what was used is kept apart from what is new."""
        return [0]


def haunt(ghosts: Ghosts[Run], hashes: bytes) -> None:
    """Remember blocks that have left the tier, of which nothing more is known."""
    ghosts.put(Run(0, 0, 0, 1, 0, 0.0), marks_of(hashes))


def recall(ghosts: Ghosts[Run], marks: bytes, at: int) -> int:
    """Forget the ghosts of blocks that come again, along `marks` from byte `at`; returns how many blocks they have."""
    found = ghosts.along(marks, at)
    for run, same in found:
        if same < run.blocks:
            ghosts.cut(run, same)
        ghosts.pop(run)
    return sum(same for _, same in found)

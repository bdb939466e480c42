"""Which nodes are leaves of what a tier holds, the first to go of each class on top of a heap.

Only a leaf may go: everything above it is needed to reach it. For orders that do not get that for free, as `lru` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from typing import Any, Protocol


class Place(Protocol):
    """What a policy knows of a node: its class, and its place in the order of its class (any type that can be compared)."""

    kind: int
    order: Any


class Leaves:
    """Leaves among the nodes that `places` has, which the policy keeps: it says here what it did there."""

    def __init__(self, places: Mapping[Any, Place], kinds: int) -> None:
        self._places = places
        self._below: dict[Any, int] = {}
        """How many children of a node have something in the tier, themselves or below; 0 is left out."""
        self._heaps: list[list[tuple[Any, int, Any]]] = [[] for _ in range(kinds)]
        """Heaps of (order, serial number, node): some are out of date."""
        self._serial = 0
        self._drawn: list[Any] = []
        """Nodes that were taken out of the heaps to be evicted, and may still be there."""

    def place(self, node: Any) -> None:
        """The place of a node has changed."""
        if node not in self._below:
            self._push(node, self._places[node])

    def enter(self, node: Any) -> None:
        """A node has a place now."""
        if node not in self._below:
            self._rise(node)
            self._push(node, self._places[node])

    def leave(self, node: Any) -> None:
        """A node has no place any more."""
        if node not in self._below:
            self._sink(node)

    def split(self, node: Any, head: Any) -> None:
        """`head` is above `node` now."""
        if node in self._places or node in self._below:
            self._below[head] = 1

    def join(self, nodes: Any) -> None:
        """A line of only children is the first one now, which has a place if any of them had one."""
        below = self._below.get(nodes[-1], 0)
        for node in nodes:
            self._below.pop(node, None)
        if below:
            self._below[nodes[0]] = below
        elif nodes[0] in self._places:
            self._push(nodes[0], self._places[nodes[0]])

    def kinds(self) -> list[int]:
        """The classes in which there may be leaves."""
        return [kind for kind, heap in enumerate(self._heaps) if heap]

    def draw(self) -> Draw:
        """Begin to take leaves."""
        for node in self._drawn:
            if node in self._places:
                self.place(node)
        self._drawn.clear()
        if sum(map(len, self._heaps)) > 4 * len(self._places) + 1024:
            self._compact()
        return Draw(self._places, self._heaps, self._below, self._drawn, self._push)

    def _push(self, node: Any, place: Place) -> None:
        self._serial += 1
        heappush(self._heaps[place.kind], (place.order, self._serial, node))

    def _compact(self) -> None:
        """Make the heaps anew: most of what is in them is out of date."""
        for heap in self._heaps:
            heap.clear()
        for node, place in self._places.items():
            if node not in self._below:
                self._serial += 1
                self._heaps[place.kind].append((place.order, self._serial, node))
        for heap in self._heaps:
            heapify(heap)

    def _rise(self, node: Any) -> None:
        """A node has something in the tier now: so have its ancestors below them."""
        while (parent := node.parent).parent is not None:
            had = self._below.get(parent, 0)
            self._below[parent] = had + 1
            if had or parent in self._places:
                return
            node = parent

    def _sink(self, node: Any) -> None:
        """A node has nothing in the tier any more, neither itself nor below."""
        while (parent := node.parent).parent is not None:
            if left := self._below[parent] - 1:
                self._below[parent] = left
                return
            del self._below[parent]
            if place := self._places.get(parent):
                self._push(parent, place)
                return
            node = parent


class Draw:
    """Leaves that are taken one after the other, as if each were gone at once; what is still there is a leaf again in the
    next draw.
    """

    def __init__(self, places: Mapping[Any, Place], heaps: Any, below: dict[Any, int], drawn: list[Any], push: Any) -> None:
        self._places, self._heaps, self._below, self._push = places, heaps, below, push
        self._drawn = drawn
        self._seen: set[Any] = set()
        self._gone: dict[Any, int] = {}
        """How many of the children of a node were taken."""

    def first(self, kind: int) -> Any | None:
        """The first leaf of a class."""
        heap = self._heaps[kind]
        while heap:
            order, _, node = heap[0]
            place = self._places.get(node)
            if place is not None and place.order == order and place.kind == kind and self._is_leaf(node):
                return node
            heappop(heap)
        return None

    def place(self, node: Any) -> None:
        """A leaf of this draw has another place."""
        self._push(node, self._places[node])

    def take(self, kind: int) -> int | None:
        """Take the first leaf of a class; returns the class of the node that is a leaf now because of it."""
        node = heappop(self._heaps[kind])[2]
        self._drawn.append(node)
        self._seen.add(node)
        while (parent := node.parent).parent is not None:
            self._gone[parent] = self._gone.get(parent, 0) + 1
            if self._gone[parent] < self._below[parent]:
                return None
            if place := self._places.get(parent):
                self._push(parent, place)
                return place.kind
            node = parent
        return None

    def _is_leaf(self, node: Any) -> bool:
        return self._below.get(node, 0) == self._gone.get(node, 0) and node not in self._seen

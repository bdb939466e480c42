"""Least recently used, leaf first.

Touches arrive deepest node first, so the oldest entry is always a leaf of what is resident, and giving up its tail
keeps everything that stays reachable. This is the same order as vLLM's tail-first free queue and RadixAttention's leaf-
first LRU (Zheng et al., SGLang, 2024). Do not use it for a tier of under two percent of the working set with agent
traffic, where an order that learns reuse intervals keeps far more.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any

from tierd.core.policy import Policy


class Lru(Policy):
    """One tier's nodes, coldest first. Every operation is O(1)."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: OrderedDict[Any, None] = OrderedDict()

    def __contains__(self, node: Any) -> bool:
        return node in self._order

    def __len__(self) -> int:
        return len(self._order)

    def add(self, node: Any) -> None:
        """Enter a node as the most recently used."""
        self._order[node] = None

    def touch(self, nodes: Sequence[Any]) -> None:
        """Make nodes the most recently used, the last one most; those that are not entered are left out."""
        try:
            deque(map(self._order.move_to_end, nodes), maxlen=0)
        except KeyError:  # in a tier that has them all, as nvme has, nobody needs to look
            for node in nodes:
                if node in self._order:
                    self._order.move_to_end(node)

    def remove(self, node: Any) -> None:
        """Take a node out."""
        del self._order[node]

    def coldest(self, new: bytes = b"", price: float = 1.0) -> Iterator[Any]:
        """Nodes from the coldest on; do not change the order while iterating. What is new is always worth more."""
        return iter(self._order)

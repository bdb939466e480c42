"""KV events: what vLLM publishes of blocks that come to tierd, and of those that leave it, for whoever routes requests by it.

Workers say which blocks were copied, the daemon which are gone, each on a way of its own. So that the last event of a block is
never a false promise, a block that went while its run was under way is not announced when the run has ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tierd.block import split
from tierd_engine.connectors.vllm.api import AllBlocksCleared, KVCacheEvent, block_removed, block_stored
from tierd_engine.connectors.vllm.shards import Shards


class KVEvents:
    """Of one engine, in the order in which things happened. Used by the scheduler's thread only."""

    def __init__(self, shards: Shards, block_tokens: int) -> None:
        self._shards, self._block_tokens = shards, block_tokens
        self._under_way: dict[int, set[bytes]] = {}
        """Runs by their numbers: their blocks that did not go since the run began."""
        self._events: list[KVCacheEvent] = []
        self._announced = False
        """Whether anybody may believe that there is a block of ours."""

    def begins(self, number: int, hashes: Iterable[bytes]) -> None:
        """Blocks (their hashes) will be copied from or to tierd."""
        self._hear()
        self._under_way[number] = set(hashes)

    def ended(self, number: int, request: Any, first: int, blocks: int) -> None:
        """A run has ended: so many blocks of the request, from its block `first`, are in tierd."""
        self._hear()
        there = self._under_way.pop(number)
        hashes = request.block_hashes[first : first + blocks]
        blocks = next((at for at, block in enumerate(hashes) if block not in there), blocks)
        if blocks:
            self._events.append(block_stored(request, first, first + blocks, self._block_tokens))
            self._announced = True

    def take(self) -> list[KVCacheEvent]:
        """What is new since the last call."""
        self._hear()
        events, self._events = self._events, []
        return events

    def _hear(self) -> None:
        """What left tierd: a block is gone when any worker's part of it is."""
        gone: dict[bytes, None] = {}
        everything = False
        for part in self._shards.removed():
            everything |= part.everything
            gone.update(dict.fromkeys(split(part.hashes)))
        for blocks in self._under_way.values():
            if everything:
                blocks.clear()
            blocks.difference_update(gone)
        if everything and self._announced:
            self._events.append(AllBlocksCleared())
        if gone and self._announced:
            self._events.append(block_removed(gone))
        self._announced &= not everything

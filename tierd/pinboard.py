"""Which chains are pinned, over all namespaces: within what pins may hold, and over restarts.

A namespace's pins may be in `share` of the segments that it may have of a tier, those of all in `share` of its bytes, so that
the rest can change hands. `pins.json` in the state directory has the hashes of what is pinned: an operator's pin is in it
before it is answered, a client's within a second. A start pins again what it finds there and what is still whole.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from tierd.block import HASH_BYTES
from tierd.errors import Busy, Gone, TierdError
from tierd.keeper import Keeper
from tierd.log import get_logger
from tierd.notes import replace
from tierd.space import Arena, Space

log = get_logger("pinboard")
FILE = "pins.json"
FILE_BYTES_MAX = 16 << 20
PINS_MAX = 256
"""Of one namespace: eviction looks at each of them when all that is warmer has gone."""
SAVE_SECONDS = 1.0
Noted = dict[str, list[str]]
"""Hashes of the last blocks of pinned chains by namespace, in hex."""


class Pinboard:
    """The pins of all spaces of a keeper."""

    def __init__(self, keeper: Keeper, state_dir: Path, share: float) -> None:
        self._keeper, self._path, self._share = keeper, state_dir / FILE, share
        self._saving = asyncio.Lock()
        self._saved: Noted = {}

    def pin(self, space: Space, block: bytes) -> int:
        """Pin the chain that ends in a block; returns its blocks. Raises Gone and Busy, as Pins.pin."""
        pins = space.cache.pins
        if len(pins.chains) >= PINS_MAX and block not in pins.chains:
            raise Busy(f"pin: the namespace has its maximum of {PINS_MAX} pins: unpin others")
        return pins.pin(block, [self._segments_max(space, tier) for tier in range(len(space.arenas))])

    def _segments_max(self, space: Space, tier: int) -> int:
        """In how many segments of a tier the pins of a space may be."""
        arena = space.arenas[tier]
        others = sum(pinned_bytes(other.arenas[tier]) for other in self._keeper.spaces.values() if other is not space)
        budget = arena.tier.budget.most * self._share
        own = (arena.quota.most or arena.tier.budget.most) * self._share
        return max(0, int(min(own, budget - others) // arena.geometry.total_bytes))

    def restore(self) -> None:
        """Pin again what earlier lives had pinned, as far as it is whole; what is not is forgotten, and the log says so."""
        noted = self._read()
        for name, blocks in noted.items():
            space = self._keeper.spaces.get(bytes.fromhex(name))
            for block in blocks:
                try:
                    if space is None:
                        raise Gone("nothing of its namespace is left")
                    self.pin(space, bytes.fromhex(block))
                except TierdError as error:
                    log.warning("a pin is lost", namespace=name, block=block, reason=str(error))
        self._saved = noted

    async def save(self) -> None:
        """Note what is pinned now, if that has changed. Raises Busy when the medium does not take it."""
        async with self._saving:
            pinned = {space.namespace.id.hex(): [block.hex() for block in space.cache.pins.chains] for space in self._spaces()}
            if pinned != self._saved:
                try:
                    await asyncio.to_thread(replace, self._path, {"pins": pinned})
                except OSError as error:
                    raise Busy(f"{self._path} cannot be written ({error}): pins hold, but only in this life") from error
                self._saved = pinned

    async def watch(self) -> None:
        """Until cancelled: note what clients pin, and what a purge has unpinned."""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            try:
                await self.save()
            except Busy as error:
                log.warning("pins are not noted", reason=str(error))

    def _spaces(self) -> list[Space]:
        return [space for space in self._keeper.spaces.values() if space.cache.pins.chains]

    def _read(self) -> Noted:
        """What is noted; a file that cannot be understood costs the pins, and no more."""
        try:
            with self._path.open(encoding="utf-8") as file:
                found: dict[str, Any] = json.loads(file.read(FILE_BYTES_MAX))["pins"]
            noted = {name: [str(block) for block in blocks] for name, blocks in found.items()}
            if any(len(bytes.fromhex(block)) != HASH_BYTES for name, blocks in noted.items() for block in (name, *blocks)):
                raise ValueError(f"ids of namespaces and hashes of blocks have {2 * HASH_BYTES} digits")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("what was pinned is not known", path=self._path, reason=repr(error))
            return {}
        return noted


def pinned_bytes(arena: Arena) -> int:
    """Bytes of the segments that pins hold in a tier."""
    return len(arena.pool.pinned) * arena.geometry.total_bytes


def listed(space: Space) -> list[dict[str, Any]]:
    """The pins of a namespace: the last block of each chain, and how many of its copies are pinned by tier."""
    names = [arena.tier.name for arena in space.arenas]
    return [
        {"block": block, "blocks": {name: int((row >= 0).sum()) for name, row in zip(names, slots, strict=True)}}
        for block, slots in space.cache.pins.chains.items()
    ]

"""Which chains are pinned, over all namespaces: within what pins may hold, and over restarts.

A namespace's pins may be in `share` of the segments that it may have of a tier, those of all in `share` of its bytes, so that
the rest can change hands. What a client wants to be kept is pinned for a term, and is the first to give way. `pins.json` in the
state directory has the hashes of what is pinned: an operator's pin is in it before it is answered, a client's within a second,
one with a term within ten. A start pins again what it finds there and what is still whole.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tierd import clock
from tierd.block import HASH_BYTES
from tierd.core.pins import FOREVER, Term
from tierd.errors import Busy, Gone, TierdError
from tierd.keeper import Keeper
from tierd.log import get_logger
from tierd.notes import replace
from tierd.space import Arena, Space
from tierd.wire.messages import KEEP_MS_MAX, PRIORITY_MAX

log = get_logger("pinboard")
FILE = "pins.json"
FILE_BYTES_MAX = 1 << 30
"""Ten million pins; a longer file is none of ours."""
PINS_MAX = 256
"""Of one namespace: eviction looks at each of them when all that is warmer has gone."""
SAVE_SECONDS = 1.0
KEPT_SAVE_SECONDS = 10.0
"""Requests may keep something all the time: that alone is not noted more often."""
PATIENCE_SECONDS, WANTED_MAX = 10.0, 256
Noted = dict[str, dict[str, Term]]
"""Pins by namespace and by the hash of their chain's last block, all in hex."""


class Pinboard:
    """The pins of all spaces of a keeper."""

    def __init__(self, keeper: Keeper, state_dir: Path, share: float) -> None:
        self._keeper, self._path, self._share = keeper, state_dir / FILE, share
        self._saving = asyncio.Lock()
        self._saved: Noted = {}
        self._saved_at = 0.0
        self._wanted: dict[tuple[Space, bytes], tuple[Term, float]] = {}
        """Chains to keep once they have copies beneath the paged tiers, or at a time (monotonic seconds) all the same."""

    def pin(self, space: Space, block: bytes, term: Term = FOREVER) -> int:
        """Pin the chain that ends in a block; returns its blocks. Raises Gone and Busy, as Pins.pin."""
        space.cache.pins.lapse(clock.unix_milliseconds())
        segments_max = [self._segments_max(space, tier) for tier in range(len(space.arenas))]
        return space.cache.pins.pin(block, segments_max, PINS_MAX, term)

    def keep(self, space: Space, block: bytes, term: Term) -> int:
        """Pin a chain for a term, within PATIENCE_SECONDS: the copies of a paged tier's blocks are still under way when a
        request ends, and it is these that a pin should hold. Returns and raises as `pin`.
        """
        pins = space.cache.pins
        if block in pins.chains or pins.is_below(block):
            return self.pin(space, block, term)
        earlier, until = self._wanted.get((space, block), (term, clock.monotonic_seconds() + PATIENCE_SECONDS))
        waiting = sum(owner is space for owner, _ in self._wanted)
        if waiting >= WANTED_MAX and (space, block) not in self._wanted:
            raise Busy(f"keep: {WANTED_MAX} chains of the namespace wait for their copies, the maximum")
        self._wanted[space, block] = earlier.joined(term), until
        return pins.blocks_of(block)

    def _keep_wanted(self) -> None:
        """Pin what has its copies now, or has waited for long enough."""
        wanted, self._wanted = self._wanted, {}
        for (space, block), (term, until) in wanted.items():
            if self._keeper.spaces.get(space.namespace.id) is not space or term.until <= clock.unix_milliseconds():
                continue
            with suppress(Busy, Gone):
                if space.cache.pins.is_below(block) or clock.monotonic_seconds() >= until:
                    self.pin(space, block, term)
                else:
                    self._wanted[space, block] = term, until

    def _segments_max(self, space: Space, tier: int) -> int:
        """In how many segments of a tier the pins of a space may be."""
        arena = space.arenas[tier]
        others = sum(pinned_bytes(other.arenas[tier]) for other in self._keeper.spaces.values() if other is not space)
        budget = arena.tier.budget.most * self._share
        own = (arena.quota.most or arena.tier.budget.most) * self._share
        return max(0, int(min(own, budget - others) // arena.geometry.total_bytes))

    def restore(self) -> None:
        """Pin again what earlier lives had pinned, as far as it is whole; what is not is forgotten, and the log says so."""
        noted, now = self._read(), clock.unix_milliseconds()
        for name, terms in noted.items():
            space = self._keeper.spaces.get(bytes.fromhex(name))
            for block, term in terms.items():
                try:
                    if space is None:
                        raise Gone("nothing of its namespace is left")
                    if term != FOREVER:  # the clock may have been set back since
                        term = term._replace(until=min(term.until, now + KEEP_MS_MAX))
                    if term.until > now:
                        self.pin(space, bytes.fromhex(block), term)
                except TierdError as error:
                    if term == FOREVER:  # the others were wishes
                        log.warning("a pin is lost", namespace=name, block=block, reason=str(error))
        self._saved = noted

    async def save(self) -> None:
        """Note what is pinned now, if that has changed. Raises Busy when the medium does not take it."""
        async with self._saving:
            pinned = self._noted()
            if pinned != self._saved:
                try:
                    await asyncio.to_thread(replace, self._path, _to_json(pinned))
                except OSError as error:
                    raise Busy(f"{self._path} cannot be written ({error}): pins hold, but only in this life") from error
                self._saved, self._saved_at = pinned, clock.monotonic_seconds()

    async def close(self) -> None:
        """What is kept now is noted, for the next life."""
        self._keep_wanted()
        with suppress(Busy):
            await self.save()

    async def watch(self) -> None:
        """Until cancelled: end pins whose term is over, and note what clients pin and what a purge has unpinned."""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            self._keep_wanted()
            for space in self._spaces():
                space.cache.pins.lapse(clock.unix_milliseconds())
            is_due = clock.monotonic_seconds() >= self._saved_at + KEPT_SAVE_SECONDS
            if not is_due and _pinned(self._noted()) == _pinned(self._saved):
                continue
            try:
                await self.save()
            except Busy as error:
                log.warning("pins are not noted", reason=str(error))

    def _noted(self) -> Noted:
        terms = {space.namespace.id.hex(): space.cache.pins.terms for space in self._spaces()}
        return {name: {block.hex(): term for block, term in some.items()} for name, some in terms.items()}

    def _spaces(self) -> list[Space]:
        return [space for space in self._keeper.spaces.values() if space.cache.pins.chains]

    def _read(self) -> Noted:
        """What is noted; a file that cannot be understood costs the pins, and no more."""
        try:
            with self._path.open(encoding="utf-8") as file:
                noted = _from_json(json.loads(file.read(FILE_BYTES_MAX)))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("what was pinned is not known", path=self._path, reason=repr(error))
            return {}
        return noted


def _to_json(noted: Noted) -> dict[str, Any]:
    """`pins`: hashes by namespace; `kept`: those with a term, and `[priority, until]`."""
    kept = {name: {block: term for block, term in terms.items() if term != FOREVER} for name, terms in noted.items()}
    return {"pins": _pinned(noted), "kept": {name: terms for name, terms in kept.items() if terms}}


def _from_json(found: dict[str, Any]) -> Noted:
    """Raises ValueError, KeyError, TypeError or AttributeError for what `_to_json` did not make."""
    noted: Noted = {name: dict.fromkeys(map(str, blocks), FOREVER) for name, blocks in found["pins"].items()}
    for name, terms in found.get("kept", {}).items():
        for block, (priority, until) in terms.items():
            if not (type(priority) is type(until) is int and 0 <= priority <= PRIORITY_MAX and 0 < until < FOREVER.until):
                raise ValueError(f"{priority!r} and {until!r} are no priority and no Unix milliseconds")
            noted.setdefault(name, {}).setdefault(block, Term(priority, until))
    if any(len(bytes.fromhex(block)) != HASH_BYTES for name, blocks in noted.items() for block in (name, *blocks)):
        raise ValueError(f"ids of namespaces and hashes of blocks have {2 * HASH_BYTES} digits")
    return noted


def _pinned(noted: Noted) -> dict[str, list[str]]:
    """What is pinned until it is unpinned."""
    pinned = {name: [block for block, term in terms.items() if term == FOREVER] for name, terms in noted.items()}
    return {name: blocks for name, blocks in pinned.items() if blocks}


def pinned_bytes(arena: Arena) -> int:
    """Bytes of the segments that pins hold in a tier."""
    return len(arena.pool.pinned) * arena.geometry.total_bytes


def listed(space: Space) -> list[dict[str, Any]]:
    """The pins of a namespace: the last block of each chain, and how many of its copies are pinned by tier; of one with a term
    also its `priority`, and `until` when (Unix milliseconds) it lasts.
    """
    names = [arena.tier.name for arena in space.arenas]
    pins = space.cache.pins
    return [
        {
            "block": block,
            "blocks": {name: int((row >= 0).sum()) for name, row in zip(names, slots, strict=True)},
            **({} if pins.terms[block] == FOREVER else pins.terms[block]._asdict()),
        }
        for block, slots in pins.chains.items()
    ]

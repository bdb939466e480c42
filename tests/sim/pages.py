"""A world with a gpu tier: its clients reserve pages, compute in them, name them and let them go."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import numpy as np

from tests.sim.clients import Client, Page, Place
from tests.sim.tiers import PAGED, kind
from tests.sim.world import World
from tierd.block import ROOT
from tierd.core.plan import NAMED, UNNAMED
from tierd.core.pool import FILLING
from tierd.errors import Busy

Naming = tuple[Place, bytes, bytes]
"""A page, its parent and its hash."""
GPU = 0
"""The place of the first gpu tier where there is one."""


class PagedWorld(World):
    """A world whose clients of the gpu tier have pages."""

    def is_paged(self, client: Client) -> bool:
        """Whether a client lives in the gpu tier."""
        return kind(self.names[client.tier]) == PAGED

    def reserve(self, client: Client, count: int) -> list[Place]:
        """Reserve pages; fewer, or none, only when nothing more can be had."""
        try:
            slots = self.cache.reserve(client.id, count, self.now).tolist()
        except Busy:
            slots = []
        self.settle(evicts={client.tier})
        if len(slots) < count:
            self._assert_nothing_evictable(client.tier)
        places = [self._place(client.tier, slot) for slot in slots]
        for place in places:
            self._take(place)
            client.pages[place] = Page()
        return places

    def commit_pages(self, client: Client, naming: list[Naming], answered: bool = True) -> list[int]:
        """Compute blocks in pages and name them; `answered` says whether the client learns what came of it."""
        tier, numbers = client.tier, [self._number(client.tier, place) for place, _, _ in naming]
        for (segment, at), _, block in naming:
            segment.content[at] = block
        alive = [self.cache.pools[tier].state[number] == FILLING for number in numbers]
        expected = self._expected(tier, naming, numbers, alive)
        self.parents.update((block, parent) for _, parent, block in naming)
        parents, hashes = (b"".join(entry[part] for entry in naming) for part in (1, 2))
        codes = self.cache.commit_pages(client.id, np.array(numbers, np.int32), parents, hashes, self.now).tolist()
        assert codes == expected, f"commit_pages answered {codes}, not {expected}"
        entries = zip(naming, numbers, codes, alive, strict=True)
        adds = {(block, tier): slot for (_, _, block), slot, code, fills in entries if code == NAMED and fills}
        self.committed.update(block for block, _ in adds)
        self.settle(adds=adds)
        for (place, _, block), code in zip(naming, codes, strict=True):
            page = client.pages[place]
            if not answered:
                page.block = block
            elif code == NAMED:
                page.block, page.named = block, True
            else:
                page.block, page.named = b"", False
                if code != UNNAMED:
                    self._hold(client, self._place(tier, code), block)
        return codes

    def release_pages(self, client: Client, places: list[Place]) -> None:
        """Let go of pages, once for each time that they are there."""
        numbers = [self._number(client.tier, place) for place in places]
        self.cache.release_pages(client.id, np.array(numbers, np.int32))
        for place in places:
            client.pages[place].times -= 1
            if not client.pages[place].times:
                del client.pages[place]
        self.settle()

    def resume(self, client: Client, keep: Iterable[bool] = repeat(True)) -> int:
        """What a paged client still holds, it holds page by page from then on."""
        if not self.is_paged(client):
            return super().resume(client, keep)
        pages: dict[Place, Page] = {}
        for (place, page), stays in zip(self._all_pages(client), keep, strict=False):
            if stays and place in pages:
                pages[place].times += page.times
            elif stays:
                pages[place] = page
        held = [(self._number(client.tier, place), not page.named) for place, page in pages.items() for _ in range(page.times)]
        slots, writing = (np.array([entry[part] for entry in held], kind) for part, kind in ((0, np.int32), (1, np.bool_)))
        assert not self.cache.resume(client.id, slots, writing), "pages came with a lease"
        client.claims, client.pages, client.attached = {}, pages, True
        self.settle()
        return 0

    def _all_pages(self, client: Client) -> Iterable[tuple[Place, Page]]:
        """Pages, and the places of claims as such: what was to be stored is a reserved page."""
        yield from ((place, Page(page.times, page.block, page.named)) for place, page in client.pages.items())
        for claim in client.claims.values():
            for at, place in claim.places.items():
                yield place, Page(1, b"" if claim.writing else claim.hashes[at], not claim.writing)

    def _hold(self, client: Client, place: Place, block: bytes) -> None:
        segment, at = place
        assert segment.content[at] == block, "a duplicate was named that holds another block"
        page = client.pages.setdefault(place, Page(0))
        page.times, page.block, page.named = page.times + 1, block, True

    def _expected(self, tier: int, naming: list[Naming], numbers: list[int], alive: list[bool]) -> list[int]:
        """What the naive model answers, block by block; `alive` says which pages are reserved."""
        known = self.known | {ROOT}
        there = {block: at[tier] for block, at in self.where.items() if tier in at}
        codes, waiting = [UNNAMED] * len(naming), list(range(len(naming)))
        while True:
            left = []
            for at in waiting:
                _, parent, block = naming[at]
                if not alive[at]:
                    codes[at] = NAMED
                    if parent in known and _leads_on(naming, alive, at):
                        known.add(block)
                elif parent in known:
                    slot = there.setdefault(block, numbers[at])
                    codes[at] = NAMED if slot == numbers[at] else slot
                    known.add(block)
                else:
                    left.append(at)
            if len(left) == len(waiting):
                return codes
            waiting = left


def _leads_on(naming: list[Naming], alive: list[bool], at: int) -> bool:
    """Whether a reserved page follows in the same chain: then the tree knows what is before it, though it is nowhere."""
    for (_, _, block), (_, parent, _), fills in zip(naming[at:], naming[at + 1 :], alive[at + 1 :], strict=False):
        if parent != block:
            return False
        if fills:
            return True
    return False

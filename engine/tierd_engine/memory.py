"""Where KV pages come from: the seam between the scheduler and whatever owns the pages.

Nothing here waits. A call returns a ticket at once, and `poll` takes what has been answered since: the scheduler looks
at tickets once per step and never inside one. A page has one state: free, reserved (its user writes to it) or a block
(immutable; everybody may read it). `tensor` is what attention works on, and a page that is given out holds finite numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as List
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tierd.block import split
from tierd.layout import Layout
from tierd_engine.pages import Blocks, PagePool
from tierd_engine.request import Hints

NAMED, NAMELESS = -1, -2


class Lookup(Protocol):
    """A lease on the longest prefix that memory has; its pages are held until `release`.

    Once `done`, `blocks` leading blocks can be had; `ready` of them are in `pages` now, and `seconds` is an estimate
    of how long the others take. `starved`: they do not come for want of pages, which computing would want too.
    `stop` is for who would rather compute: `blocks` becomes `ready`, at once.
    """

    @property
    def done(self) -> bool: ...
    @property
    def blocks(self) -> int: ...
    @property
    def ready(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def starved(self) -> bool: ...
    @property
    def pages(self) -> List[int]: ...

    def stop(self) -> None: ...
    def release(self) -> None: ...


class Reservation(Protocol):
    """Once `done`, `pages` are the caller's to write to: as many as asked, or what there was."""

    @property
    def done(self) -> bool: ...
    @property
    def pages(self) -> List[int]: ...


class Commit(Protocol):
    """Once `done`, `codes` has one number a page: NAMED, NAMELESS (its parent is unknown), or the page that has the block.

    In the last case the caller now holds that page too, and its own stays reserved; NAMELESS leaves it reserved as well.
    """

    @property
    def done(self) -> bool: ...
    @property
    def codes(self) -> NDArray[np.int32]: ...


class Memory(Protocol):
    """Pages and prefixes. Hashes are packed, 32 bytes a block, head first; parents likewise, one a block.

    `count` pages are there whatever happens elsewhere: a sequence must fit them. The last page of `tensor` is one of them.
    """

    tensor: torch.Tensor
    layout: Layout
    count: int

    def lookup(self, hashes: bytes) -> Lookup: ...
    def reserve(self, count: int, urgent: bool = False) -> Reservation:
        """Pages to write to; `urgent`: nobody is left whose pages could be waited for."""

    def commit(self, pages: List[int], parents: bytes, hashes: bytes) -> Commit: ...
    def release(self, pages: List[int]) -> None: ...
    def ended(self, block: bytes, turn: str, hints: Hints) -> None:
        """Why a turn ended, whose last full block this is (ROOT: it has none), and what else was said of it."""

    def poll(self) -> None:
        """Take what has been answered; never blocks."""

    def wait(self, seconds: float) -> None:
        """Sleep until something may have been answered: for an engine that has nothing else to do."""

    def check(self) -> None:
        """Raise AssertionError unless every page is accounted for; to be called when no sequence holds any."""

    def statistics(self) -> dict[str, int]:
        """Numbers for /metrics: `pages_free`, and `hit_<tier>` blocks looked up by where they were."""

    def close(self) -> None: ...


class PrivateMemory:
    """A pool of the engine's own. Full blocks are shared as long as somebody holds them; nothing is kept after that."""

    def __init__(self, layout: Layout, pages: int, device: str = "cpu") -> None:
        self.layout = layout
        self.pool = PagePool(layout, pages, device)
        self.tensor = self.pool.tensor
        self.count = pages
        self.hits: Counter[str] = Counter()
        self.blocks = Blocks(self.pool)

    def lookup(self, hashes: bytes) -> Lookup:
        """What is in use just now, head first."""
        pages = self.blocks.share_prefix(hashes)
        self.hits["live"] += len(pages)
        return Shared(self, pages)

    def reserve(self, count: int, urgent: bool = False) -> Reservation:
        """As many pages as are free, at most `count`."""
        return Reserved(self.pool.allocate(min(count, self.pool.free_count)))

    def commit(self, pages: List[int], parents: bytes, hashes: bytes) -> Commit:
        """Name pages, or find their twins."""
        codes = np.full(len(pages), NAMED, np.int32)
        for at, (page, name) in enumerate(zip(pages, split(hashes), strict=True)):
            if (twin := self.blocks.put(page, name)) is not None:
                codes[at] = twin
        return Committed(codes)

    def release(self, pages: List[int]) -> None:
        """End the caller's hold; a block that nobody holds is forgotten."""
        self.blocks.release(pages)

    def ended(self, block: bytes, turn: str, hints: Hints) -> None:
        """Nobody learns from it here."""

    def poll(self) -> None:
        """Everything is answered at once."""

    def wait(self, seconds: float) -> None:
        """There is nothing to wait for."""

    def check(self) -> None:
        """Every page is free, and none has a name."""
        self.pool.check_idle()
        self.blocks.check_empty()

    def statistics(self) -> dict[str, int]:
        """Free pages, and blocks found by where they were."""
        return {"pages_free": self.pool.free_count} | {f"hit_{tier}": blocks for tier, blocks in self.hits.items()}

    def close(self) -> None:
        """Nothing to close."""


class Shared:
    """A lookup of PrivateMemory: complete from the start."""

    done = True
    starved = False
    seconds = 0.0

    def __init__(self, memory: PrivateMemory, pages: list[int]) -> None:
        self.pages = pages
        self.blocks = self.ready = len(pages)
        self._memory = memory

    def stop(self) -> None:
        """Nothing is under way."""

    def release(self) -> None:
        """Give the pages back, once."""
        pages, self.pages = self.pages, []
        self._memory.release(pages)


class Reserved:
    """Pages, at once."""

    done = True

    def __init__(self, pages: List[int]) -> None:
        self.pages = pages


class Committed:
    """Codes, at once."""

    done = True

    def __init__(self, codes: NDArray[np.int32]) -> None:
        self.codes = codes

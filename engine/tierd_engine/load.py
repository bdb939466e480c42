"""One lookup of CopyingMemory: which blocks are live, which the daemon has, and how far the copying is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tierd.block import HASH_BYTES

if TYPE_CHECKING:
    from tierd_engine.copying import CopyingMemory

HOLE = -1
NEWEST = 0.3
"""Weight of the newest measurement in an average; what declining a load takes off its estimate, so that it is tried again."""
PIECE_BLOCKS = 32
"""Blocks that are copied before the load looks whether it was given up."""

Target = tuple[int, int]
"""A block of the lookup and the page that it is copied to."""


class Load:
    """`pages[i]` holds block `i` or is a HOLE; every page that is not has us among its users.

    The daemon is asked for the blocks from `first` on. A worker reads `stopped`, everything else is the engine thread's.
    """

    def __init__(self, memory: CopyingMemory, hashes: bytes, pages: list[int]) -> None:
        self.pages = pages
        self.medium = "memory"
        self.stopped = False
        self.starved = False
        self._memory = memory
        self._hashes = hashes
        self._found: Any = None
        self._placed = 0
        self.first = self.ready = self.blocks = pages.index(HOLE) if HOLE in pages else len(pages)
        self.done = self.first == len(pages)

    @property
    def seconds(self) -> float:
        """How long the rest is expected to take."""
        return self._memory.speeds.estimate(self.blocks - self.ready, self.medium)

    def name(self, block: int) -> bytes:
        """Hash of a block."""
        return self._hashes[block * HASH_BYTES : (block + 1) * HASH_BYTES]

    def answered(self, found: Any) -> None:
        """The daemon has the first `found.blocks` of those that it was asked for."""
        if self.stopped:
            self._memory.end_lease(found)
            return
        self._memory.hits.update(found.tiers)
        self.medium = "memory" if found.told == found.blocks else "disk"
        self._found, self.done = found, True
        end = self.first + found.blocks
        while end < len(self.pages) and self.pages[end] != HOLE:
            end += 1
        self._cut(end)
        self._memory.enqueue(self)

    def start(self) -> bool:
        """Begin to copy if there are pages for it; returns False for as long as it should be tried again."""
        found = self._found
        if found is None:
            return True
        holes = [block for block in range(self.ready, self.blocks) if self.pages[block] == HOLE]
        for block in holes:  # what others have brought or computed since
            [self.pages[block]] = self._memory.live(self.name(block))
        holes = [block for block in holes if self.pages[block] == HOLE]
        if any(self.name(block) in self._memory.loading for block in holes):
            return False
        self.starved = len(holes) > self._memory.pool.free_count
        if self.starved:
            return False
        self._found = None
        self._advance()
        if holes:
            self._memory.copy(self, found, list(zip(holes, self._memory.pool.allocate(len(holes)), strict=True)))
        else:
            self._memory.end_lease(found)
        return True

    def arrived(self, targets: list[Target], count: int) -> None:
        """The next `count` targets are copied."""
        for block, page in targets[self._placed : self._placed + count] if not self.stopped else ():
            self.pages[block] = self._memory.place(self.name(block), page)
            self._placed += 1
        self._advance()

    def ended(self, targets: list[Target], seconds: float) -> None:
        """Nothing more will be copied; what did not arrive is a miss, and its pages are free again."""
        whole = not self.stopped
        self._memory.speeds.measured(self.medium, max(self._placed, 1) if whole else len(targets), seconds, whole)
        self._memory.pool.release(page for _, page in targets[self._placed :])
        if not self.stopped:
            self._cut(self.ready)

    def stop(self) -> None:
        """Be content with what is ready."""
        if not self.stopped and not (self.done and self.ready == self.blocks):
            self._memory.speeds.decline(self.medium)
            self._end()
        self._cut(self.ready)

    def release(self) -> None:
        """Give all pages back; the copy that is under way ends soon."""
        self._end()
        self.ready = 0
        self._cut(0)

    def _end(self) -> None:
        self.stopped = self.done = True
        self.starved = False
        if self._found is not None:
            self._memory.end_lease(self._found)
            self._found = None

    def _advance(self) -> None:
        while self.ready < self.blocks and self.pages[self.ready] != HOLE:
            self.ready += 1

    def _cut(self, blocks: int) -> None:
        """Keep the first `blocks` blocks."""
        self.blocks = blocks
        self.pages, rest = self.pages[:blocks], self.pages[blocks:]
        self._memory.release([page for page in rest if page != HOLE])


class Speeds:
    """What loads took: seconds per block from "memory" (another tier of it) and from "disk"."""

    def __init__(self) -> None:
        self._seconds_per_block = {"memory": 0.0, "disk": 0.0}

    def estimate(self, blocks: int, medium: str) -> float:
        """Seconds that a load of so many blocks will take, from what earlier ones took."""
        return blocks * self._seconds_per_block[medium]

    def decline(self, medium: str) -> None:
        """A load was not worth its time: the estimate ages, so that one day it is measured again."""
        self._seconds_per_block[medium] *= 1 - NEWEST

    def measured(self, medium: str, blocks: int, seconds: float, whole: bool) -> None:
        """Loading so many blocks took so long, or at least so long when the load was not `whole`."""
        before, now = self._seconds_per_block[medium], seconds / blocks
        if whole or now > before:
            self._seconds_per_block[medium] = before + NEWEST * (now - before) if before else now


def pieces(targets: list[Target]) -> Iterator[list[Target]]:
    """Runs of consecutive blocks, at most PIECE_BLOCKS long."""
    piece: list[Target] = []
    for target in targets:
        if piece and (target[0] != piece[-1][0] + 1 or len(piece) == PIECE_BLOCKS):
            yield piece
            piece = []
        piece.append(target)
    if piece:
        yield piece

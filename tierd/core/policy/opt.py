"""The best that any policy could do: Belady's rule over prefix chains, with bypass, for `tierd replay` alone.

The block that is wanted again last goes first, the deepest of those that are wanted again at the same time (Belady, IBM
Systems Journal 1966; Mattson et al., 1970). A block is wanted whenever one behind it is, so the deepest-first rule
keeps prefixes whole, and blocks that were kept for the same request are a prefix of it: a count for each future request
is all the state there is. With bypass a block need not be kept at all, which no order of eviction can beat. It has to
know the future, so it is a measure and not a policy: do not compare costs in time with it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.int32]
Segment = tuple[int, int]
"""The request that wants some consecutive blocks next, and where they end in the one that has them."""


class Best(NamedTuple):
    """What is possible: `hits[r]` leading blocks of request r (int64), and how many blocks have to be written for it."""

    hits: NDArray[np.int64]
    writes: int


def next_uses(requests: Sequence[Blocks], unique_blocks: int) -> list[list[Segment]]:
    """For each request, its blocks by the request that wants them next (`len(requests)`: none), head first."""
    never = len(requests)
    upcoming = np.full(unique_blocks, never, np.int64)
    segments: list[list[Segment]] = []
    for at in range(never - 1, -1, -1):
        blocks = requests[at]
        wanted = upcoming[blocks]
        upcoming[blocks] = at
        ends = [*(np.flatnonzero(wanted[1:] != wanted[:-1]) + 1).tolist(), len(blocks)] if len(blocks) else []
        segments.append([(int(wanted[end - 1]), end) for end in ends])
    return segments[::-1]


def best(uses: Iterable[list[Segment]], capacity: int, bypass: bool = True) -> Best:
    """Hits under the best choice with `capacity` slots; without `bypass` every block is kept when it is new."""
    uses = list(uses)
    never = len(uses)
    kept = [0] * (never + 1)
    latest: list[int] = []
    total = writes = 0
    hits = np.zeros(never, np.int64)
    for at, segments in enumerate(uses):
        hit, kept[at] = kept[at], 0
        hits[at] = hit
        total -= hit
        fresh: dict[int, int] = {}
        if not bypass:  # room is made before anything enters
            length = segments[-1][1] if segments else 0
            total -= _give_up(kept, latest, total + length - capacity, fresh)
        first = 0
        for wanted, end in segments:
            if wanted < never or not bypass:
                if not kept[wanted]:
                    heapq.heappush(latest, -wanted)
                kept[wanted] += end - first
                total += end - first
                fresh[wanted] = max(0, end - max(first, hit))
            first = end
        total -= _give_up(kept, latest, total - capacity, fresh)
        writes += sum(fresh.values())
    return Best(hits, writes)


def _give_up(kept: list[int], latest: list[int], count: int, fresh: dict[int, int]) -> int:
    """Give up `count` blocks, those that are wanted last and deepest; returns how many. `fresh` loses what was new."""
    left = count
    while left > 0 and latest:
        wanted = -latest[0]
        taken = min(left, kept[wanted])
        kept[wanted] -= taken
        left -= taken
        if wanted in fresh:
            fresh[wanted] = max(0, fresh[wanted] - taken)
        if not kept[wanted]:
            heapq.heappop(latest)
    return max(count, 0) - max(left, 0)

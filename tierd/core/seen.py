"""What a cache that never forgets would have found: every SAMPLE-th block hash is remembered, whatever became of the block.

Spatial sampling after SHARDS (Waldspurger et al., FAST 2015): a hash is in the sample or not for good, so that its reuse is
seen whenever it comes. There are CELLS cells, so it is an infinite cache only for the last CELLS * SAMPLE blocks or so (four
million); a hash that takes another's cell makes it forgotten, which can only make the estimate lower.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from tierd.core.ages import EVERYWHERE, GAP, SAMPLE, note_ages

CELLS = 1 << 16
_MASK = np.uint64(SAMPLE - 1)
_SHIFT = np.uint64(SAMPLE.bit_length() - 1)


class Seen:
    """Counts sampled blocks of lookups as seen before or new, and how long ago those were asked for.

    Its MiB is taken with the first of them: not every namespace that is stored is read.
    """

    def __init__(self, counters: Counter[tuple[str, ...]]) -> None:
        self._counters = counters
        self._hashes: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._when: NDArray[np.int64] = np.zeros(0, np.int64)

    def asked(self, hashes: bytes, now: int) -> None:
        """A lookup of packed 32-byte hashes at `now` (Unix milliseconds)."""
        words = np.frombuffer(hashes, "<u8")[::4]
        words = words[words & _MASK == 0]
        if not len(words):
            return
        if not len(self._hashes):
            self._hashes, self._when = np.zeros(CELLS, np.uint64), np.zeros(CELLS, np.int64)
        cells = (words >> _SHIFT & np.uint64(CELLS - 1)).astype(np.int64)
        known = self._hashes[cells] == words
        seen = int(np.count_nonzero(known))
        self._counters["sampled", "seen"] += seen
        self._counters["sampled", "new"] += len(words) - seen
        if seen:
            gaps = Counter((now - self._when[cells[known]]).tolist())
            note_ages(self._counters, GAP, EVERYWHERE, gaps.items())
        self._hashes[cells], self._when[cells] = words, now

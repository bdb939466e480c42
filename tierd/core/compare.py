"""Packed runs of 32-byte hashes, compared with one another a word at a time."""

from __future__ import annotations

import numpy as np

from tierd.block import HASH_BYTES


def offset_of(run: bytes, block: bytes) -> int:
    """Where a block hash is in a packed run, in blocks; -1: nowhere."""
    rows = np.frombuffer(run, np.uint64).reshape(-1, HASH_BYTES // 8)
    words = np.frombuffer(block, np.uint64)
    spots = np.flatnonzero(rows[:, 0] == words[0])
    spots = spots[(rows[spots] == words).all(1)]
    return int(spots[0]) if len(spots) else -1


def common(run: bytes, start: int, hashes: bytes, at: int) -> int:
    """How many whole hashes `run` from byte `start` and `hashes` from byte `at` have in common."""
    size = min(len(run) - start, len(hashes) - at)
    if size == 0:
        return 0
    left = np.frombuffer(run, np.uint64, size // 8, start)
    right = np.frombuffer(hashes, np.uint64, size // 8, at)
    differ = left != right
    first = int(differ.argmax())
    return first // 4 if differ[first] else size // HASH_BYTES

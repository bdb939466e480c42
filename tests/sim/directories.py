"""Segments without memory behind them: the real directory on a bytearray, and the content of each slot as one word."""

from __future__ import annotations

import hashlib

import numpy as np

from tierd.core.pool import Slots
from tierd.core.recovery import Rows
from tierd.layout import Layout, Namespace
from tierd.tiers.directory import Directory
from tierd.tiers.segment import Geometry, Header, Medium

NAMESPACE = Namespace("uid:1000", "sim", Layout(1, 1, 8, "float16"))
SOILED = b"half written"


class Segment:
    """A segment of `slots` slots; `content` is what was written last into each."""

    def __init__(self, slots: int) -> None:
        shape = Geometry(slots, NAMESPACE.layout.block_bytes)
        segment_id = hashlib.sha256(b"segment").digest()[:16]
        header = Header(Medium.MEMORY, segment_id, NAMESPACE, 0, 0, shape)
        self.directory = Directory(bytearray(shape.directory_bytes), header)
        self.content = [SOILED] * slots

    def held(self, bit: int) -> Slots:
        """Slots (in the segment) that carry a holder bit."""
        return np.flatnonzero(self.directory.holders & np.uint64(1 << bit)).astype(np.int32)


def rows_of(segments: dict[int, Segment], slots: int) -> Rows:
    """What a scan finds in a tier's segments (by ordinal); all else is reset, as a daemon does when it starts."""
    scans = [(ordinal, segment.directory.scan()) for ordinal, segment in segments.items()]
    for ordinal, scan in scans:
        segments[ordinal].directory.reset(scan.spare)
    return Rows(
        np.concatenate([np.empty(0, np.int32), *(scan.slots + np.int32(ordinal * slots) for ordinal, scan in scans)]),
        b"".join(scan.hashes for _, scan in scans),
        b"".join(scan.parents for _, scan in scans),
        np.concatenate([np.empty(0, np.uint64), *(scan.generations for _, scan in scans)]),
        np.concatenate([np.empty(0, np.uint64), *(scan.last_use for _, scan in scans)]),
        np.concatenate([np.empty(0, np.uint32), *(scan.use_counts for _, scan in scans)]),
    )

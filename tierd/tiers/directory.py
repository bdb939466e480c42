"""The directory of a segment: who lives in which slot, as columns of numpy rows on the segment's own bytes.

The directory is the truth; recovery is `scan` and nothing else. The rule of this file is the order of stores: FILLING
with a new generation, then the identity, then (elsewhere) the payload, then READY. Whoever sees READY sees all of it:
the stores are made in program order, which x86 keeps, and what another process is told reaches it through a system
call.
All methods take arrays of slot indexes and cost a fixed number of numpy calls, apart from one CRC per identity row.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierd.layout import PAGE_BYTES
from tierd.tiers.segment import Header

FREE, FILLING, READY = 0x00, 0x3C, 0xC3
DIGEST_NONE, DIGEST_XXH3_64 = 0, 1

IDENTITY = np.dtype(
    [
        ("hash", "V32"),
        ("parent", "V32"),
        ("digest", "<u8"),
        ("digest_rest", "<u8"),
        ("digest_kind", "<u4"),
        ("slot", "<u4"),
        ("generation", "<u8"),
        ("epoch", "<u8"),
        ("payload_bytes", "<u8"),
        ("reserved", "V12"),
        ("crc", "<u4"),
    ]
)
RECENCY = np.dtype([("last_use", "<u8"), ("use_count", "<u4"), ("reserved", "<u4")])

Slots = Sequence[int] | NDArray[np.integer]

_GENERATION_MASK = np.uint64((1 << 56) - 1)
_CODE_BITS = np.uint64(8)
_CODE_MASK = np.uint64(0xFF)


@dataclass(frozen=True)
class Scan:
    """What a directory holds: one entry per good READY row in the arrays, in order of their slots.

    hashes and parents are packed, 32 bytes each; digests are 0 where none was computed yet; last_use is Unix
    milliseconds.
    `held` lists all slots with holder bits, good or not; `spare` all slots that are not good, whatever their bits:
    hand them to `Directory.reset` before anything new is written. `damaged`, `stale` (of an older epoch) and
    `unfinished` count the rows that were given up.
    """

    slots: NDArray[np.int32]
    hashes: bytes
    parents: bytes
    digests: NDArray[np.uint64]
    generations: NDArray[np.uint64]
    last_use: NDArray[np.uint64]
    use_counts: NDArray[np.uint32]
    held: NDArray[np.int32]
    spare: NDArray[np.int32]
    damaged: int
    stale: int
    unfinished: int


class Directory:
    """The four columns `state`, `holders`, `identity` and `recency` of a segment, as views on a writable buffer.

    `buffer` holds header and columns (a mapping of the directory memfd, or the copy of a file's directory).
    """

    def __init__(self, buffer: bytearray | memoryview, header: Header) -> None:
        shape = self.geometry = header.geometry
        self.epoch = header.epoch
        count = shape.slot_count
        self.state: NDArray[np.uint64] = np.ndarray(count, "<u8", buffer, shape.state_offset)
        self.holders: NDArray[np.uint64] = np.ndarray(count, "<u8", buffer, shape.holders_offset)
        self.identity: NDArray[np.void] = np.ndarray(count, IDENTITY, buffer, shape.identity_offset)
        self.recency: NDArray[np.void] = np.ndarray(count, RECENCY, buffer, shape.recency_offset)

    def __repr__(self) -> str:
        codes = self.codes()
        ready, filling, held = ((codes == READY).sum(), (codes == FILLING).sum(), (self.holders != 0).sum())
        return f"<Directory of {len(codes)} slots: {ready} ready, {filling} filling, {held} held>"

    def begin(
        self, slots: Slots, hashes: bytes, parents: bytes, digests: NDArray[np.uint64] | None = None
    ) -> NDArray[np.uint64]:
        """Start to fill free slots with these blocks; returns their new generations.

        hashes and parents are packed; a digest of 0 (or None for all) means that none was computed yet.
        """
        at = _indexes(slots)
        assert len(hashes) == len(parents) == 32 * len(at), "one hash and one parent per slot"
        assert (self.codes()[at] == FREE).all(), "only a free slot can be filled"
        generations = (self.generations()[at] + np.uint64(1)) & _GENERATION_MASK
        self.state[at] = _word(generations, FILLING)
        rows = np.zeros(len(at), IDENTITY)
        rows["hash"] = np.frombuffer(hashes, "V32")
        rows["parent"] = np.frombuffer(parents, "V32")
        if digests is not None:
            rows["digest"] = digests
            rows["digest_kind"] = np.where(digests != 0, DIGEST_XXH3_64, DIGEST_NONE)
        rows["slot"] = at
        rows["generation"] = generations
        rows["epoch"] = self.epoch
        rows["payload_bytes"] = self.geometry.payload_bytes
        rows["crc"] = _crcs(rows)
        self.identity[at] = rows
        return generations

    def ready(self, slots: Slots) -> None:
        """Make filled slots visible: their payload is complete."""
        at = _indexes(slots)
        assert (self.codes()[at] == FILLING).all(), "only a slot that was begun can become ready"
        self.state[at] = _word(self.generations()[at], READY)

    def free(self, slots: Slots) -> None:
        """Give slots up; their holders' bits stay."""
        at = _indexes(slots)
        self.state[at] = _word(self.generations()[at], FREE)

    def reset(self, slots: Slots) -> None:
        """Free slots after a scan, at the segment's highest generation, so that new generations start above it."""
        at = _indexes(slots)
        known = np.isin(self.codes(), (FREE, FILLING, READY))
        highest = self.generations()[known].max(initial=0)
        self.state[at] = _word(np.full(len(at), highest, np.uint64), FREE)

    def touch(self, slots: Slots, last_use: NDArray[np.uint64] | int, use_counts: NDArray[np.uint32] | int) -> None:
        """Note when (Unix milliseconds) and how often blocks were used."""
        at = _indexes(slots)
        self.recency["last_use"][at] = last_use
        self.recency["use_count"][at] = use_counts

    def hashes(self, slots: Slots) -> bytes:
        """The packed hashes of the blocks in ready slots."""
        hashes: bytes = self.identity["hash"][_indexes(slots)].tobytes()
        return hashes

    def unhold_all(self, bit: int) -> int:
        """Clear a session's holder bit everywhere; returns how many slots had it."""
        mask = np.uint64(1 << bit)
        count = int(((self.holders & mask) != 0).sum())
        self.holders &= ~mask
        return count

    def codes(self) -> NDArray[np.uint64]:
        """FREE, FILLING or READY per slot; anything else is damage."""
        return self.state & _CODE_MASK

    def generations(self) -> NDArray[np.uint64]:
        """The generation per slot; it grows each time that a slot is filled."""
        return self.state >> _CODE_BITS

    def scan(self) -> Scan:
        """Read the whole directory without changing it: everything that recovery needs."""
        codes, generations = self.codes(), self.generations()
        ready = np.flatnonzero(codes == READY)
        rows = self.identity[ready]
        intact = (
            (rows["crc"] == _crcs(rows))
            & (rows["slot"] == ready)
            & (rows["generation"] == generations[ready])
            & (rows["payload_bytes"] == self.geometry.payload_bytes)
            & (rows["epoch"] <= self.epoch)
        )
        good = intact & (rows["epoch"] == self.epoch)
        slots, rows = ready[good].astype(np.int32), rows[good]
        unfinished = int((codes == FILLING).sum())
        spare = np.ones(len(codes), np.bool_)
        spare[slots] = False
        return Scan(
            slots=slots,
            hashes=rows["hash"].tobytes(),
            parents=rows["parent"].tobytes(),
            digests=np.where(rows["digest_kind"] == DIGEST_XXH3_64, rows["digest"], np.uint64(0)),
            generations=rows["generation"].copy(),
            last_use=self.recency["last_use"][slots],
            use_counts=self.recency["use_count"][slots],
            held=np.flatnonzero(self.holders).astype(np.int32),
            spare=np.flatnonzero(spare).astype(np.int32),
            damaged=len(codes) - unfinished - int((codes == FREE).sum()) - int(intact.sum()),
            stale=int(intact.sum()) - len(slots),
            unfinished=unfinished,
        )


def page_ranges(column_offset: int, row_bytes: int, slots: Slots) -> list[tuple[int, int]]:
    """The (offset, bytes) of the runs of whole pages that hold these rows of a column. No row crosses a page."""
    pages = np.unique(_indexes(slots) * row_bytes // PAGE_BYTES)
    runs = np.split(pages, np.flatnonzero(np.diff(pages) > 1) + 1)
    return [(column_offset + int(run[0]) * PAGE_BYTES, len(run) * PAGE_BYTES) for run in runs if len(run)]


def _indexes(slots: Slots) -> NDArray[np.int64]:
    return np.asarray(slots, dtype=np.int64)


def _word(generations: NDArray[np.uint64], code: int) -> NDArray[np.uint64]:
    return generations << _CODE_BITS | np.uint64(code)


def _crcs(rows: NDArray[np.void]) -> NDArray[np.uint32]:
    """The CRC that each identity row should have: over all its bytes but the last four."""
    size, data = IDENTITY.itemsize, memoryview(rows.tobytes())
    crcs = [zlib.crc32(data[start : start + size - 4]) for start in range(0, len(data), size)]
    return np.array(crcs, dtype=np.uint32)

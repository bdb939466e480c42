"""What a killed daemon left, read by hand from `docs/segment-format.md`: an oracle for recovery, and where the kill fell."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct

import numpy as np
import xxhash

from tierd.block import ROOT

NAMESPACE_BYTES = 32
FREE, FILLING, READY = 0x00, 0x3C, 0xC3
HEADER = Struct("<8s2I16s32s16s4Q2I6Q")
IDENTITY = Struct("<32s32s16s2I3Q12sI")
PLACES = (
    "recovery",
    "write-back: directory",
    "write-back: payload",
    "write-back: file grows",
    "promotion",
    "a client writes",
    "a client reads",
    "nothing under way",
)


@dataclass
class Remains:
    """Blocks by tier ("cpu", "nvme"): namespace + hash -> namespace + parent; and what was under way: slots by place."""

    blocks: dict[str, dict[bytes, bytes]] = field(default_factory=lambda: {"cpu": {}, "nvme": {}})
    places: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    """Slots by tier."""
    damaged: int = 0

    @property
    def moving(self) -> bool:
        """Whether a transfer between tiers was in flight."""
        return any(self.places[place] for place in ("write-back: directory", "write-back: payload", "promotion"))

    def survivors(self) -> dict[str, set[bytes]]:
        """Per tier, the blocks that recovery must keep: those whose chain reaches the root through blocks of any tier."""
        parents = self.blocks["cpu"] | self.blocks["nvme"]
        rooted = {block[:NAMESPACE_BYTES] + ROOT for block in parents}
        for block in parents:
            path = []
            while block not in rooted and block in parents:
                path.append(block)
                block = parents[block]
            if block in rooted:
                rooted.update(path)
        return {tier: rooted & blocks.keys() for tier, blocks in self.blocks.items()}


def examine(holder: int, nvme: Path) -> Remains:
    """Read every segment: those of memory through the holder's descriptors, files by name. No daemon may be running."""
    remains = Remains()
    for directory in memory_directories(holder):
        read_rows(remains, "cpu", directory, None)
    for path in sorted(nvme.glob("*/*.directory")):
        read_rows(remains, "nvme", path.read_bytes(), path.with_suffix(".slots"))
    remains.places["write-back: file grows"] += len(list(nvme.glob("*/*.new")))
    return remains


def memory_directories(holder: int) -> Iterator[bytes]:
    """The bytes of each directory that the holder keeps."""
    for name in sorted(os.listdir(f"/proc/{holder}/fd"), key=int):
        place = Path(f"/proc/{holder}/fd/{name}")
        with suppress(FileNotFoundError):
            target = os.readlink(place)
            if target.startswith("/memfd:tierd-") and "-directory" in target:
                yield place.read_bytes()


def read_rows(remains: Remains, tier: str, directory: bytes, path: Path | None) -> None:
    """Add the rows of one segment."""
    header = HEADER.unpack_from(directory)
    namespace, payload_bytes, slot_bytes, count = (header[at] for at in (4, 8, 9, 10))
    state_at, holders_at, identity_at = header[12:15]
    states = np.frombuffer(directory, "<u8", count, state_at)
    holders = np.frombuffer(directory, "<u8", count, holders_at)
    remains.rows[tier] += count
    for slot in np.flatnonzero(states & np.uint64(0xFF)).tolist():
        row = directory[identity_at + slot * IDENTITY.size :][: IDENTITY.size]
        block, parent, digest, _, own, generation, _, _, _, crc = IDENTITY.unpack(row)
        state = int(states[slot])
        whole = crc == zlib.crc32(row[:-4]) and own == slot and generation == state >> 8
        if state & 0xFF == READY:
            remains.damaged += not whole
            if whole:
                remains.blocks[tier][namespace + block] = namespace + parent
            remains.places["a client reads"] += bool(holders[slot])
        elif tier == "cpu":
            remains.places["a client writes" if holders[slot] else "promotion"] += 1
        else:
            assert path
            written = whole and digest_of(path, slot * slot_bytes, payload_bytes) == int.from_bytes(digest, "little")
            remains.places["write-back: payload" if whole and not written else "write-back: directory"] += 1


def digest_of(path: Path, offset: int, length: int) -> int:
    """The digest of the bytes that a file has in a slot."""
    with path.open("rb") as file:
        return xxhash.xxh3_64_intdigest(os.pread(file.fileno(), length, offset))

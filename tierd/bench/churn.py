"""Prompts that go through the index as fast as it takes them: what `tierd bench index` measures, in its own process.

`Tree` is the index alone. `Requests` is the whole core: the same prompts as requests of a session, with leases, pending
blocks, holders, and a write-back queue that is emptied after each. Neither has sockets, segments or bytes of blocks.
"""

from __future__ import annotations

import gc
import json
import os
import struct
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tierd.bench.report import Row
from tierd.block import HASH_BYTES, ROOT
from tierd.clock import monotonic_seconds
from tierd.core.cache import Cache
from tierd.core.index import Index, Piece
from tierd.core.ladder import Ladder
from tierd.core.policies import make_orders
from tierd.core.pool import Pool
from tierd.core.room import Room

CPU, NVME = 0, 1
CPU_SHARE = 4
SEGMENTS = 8
PROMPTS_AT_ONCE = 64
WARM_UP_BLOCKS = 4096
WRITE_BACK_BLOCKS = 128
SESSION = 1
LENGTH = struct.Struct("<I")


class Tree:
    """Index, pools and eviction of two tiers: nvme for all blocks, cpu for a quarter of them.

    Every new block gets a slot in both tiers, and what was there before makes room in both. `seconds` is the time that
    took, `inserted` how many blocks were new.
    """

    def __init__(self, blocks: int) -> None:
        self.inserted = 0
        self.seconds = 0.0
        self.pools = make_pools(blocks)
        ladder = Ladder(tiers(self.pools))
        self.index = Index(len(self.pools), orders=make_orders(ladder, {}))
        self._room = Room(self.index, ladder, Counter())

    def store(self, hashes: bytes, now: int) -> None:
        """Enter a prompt: find what is known of it, make it the most recently used, add the rest."""
        started = monotonic_seconds()
        pieces = self.index.match(hashes) or []
        known = sum([piece.blocks for piece in pieces])
        rest = hashes[known * HASH_BYTES :]
        pieces = self.index.touch(pieces, now, rest)
        node = pieces[-1].node if pieces else self.index.root
        new = len(hashes) // HASH_BYTES - known
        if pieces and node.slots[NVME, pieces[-1].end - 1] < 0:  # nvme is prefix-closed: a hole reaches to the end
            for piece in pieces:
                self._repair(piece)
        rows = np.full((len(self.pools), new), -1, np.int32)
        for tier, pool in enumerate(self.pools):
            slots = self._room.take(tier, new, behind=node)
            pool.enter(slots)
            rows[tier, : len(slots)] = slots
        if new:
            self.index.extend(node, rest, rows, now)
        self.seconds += monotonic_seconds() - started
        self.inserted += new

    def _repair(self, piece: Piece) -> None:
        """What only cpu still has is written down again, or nvme would have a hole."""
        here = piece.node.slots[NVME, piece.start : piece.end]
        if here.min() >= 0:
            return
        missing = np.flatnonzero(here < 0)
        slots = self._room.take(NVME, len(missing), behind=piece.node)
        self.pools[NVME].enter(slots)
        row = here.copy()
        row[missing[: len(slots)]] = slots
        self.index.assign(NVME, piece, row)


class Requests:
    """A cache of two such tiers, and one session that stores prompts."""

    def __init__(self, blocks: int) -> None:
        self.inserted = 0
        self.seconds = 0.0
        self.pools = make_pools(blocks)
        self._cache = Cache(tiers(self.pools))
        self._cache.open_session(SESSION, 0, CPU)
        self.index = self._cache.index

    def store(self, hashes: bytes, now: int) -> None:
        """Store and commit a prompt, then write back all that it queued."""
        started = monotonic_seconds()
        placed = self._cache.store(SESSION, hashes, ROOT, now)
        if placed.lease:
            self.inserted += self._cache.commit(SESSION, placed.lease, None, now).committed
        while self._cache.plan_write_back(NVME, WRITE_BACK_BLOCKS):
            for transfer in list(self._cache.planned):
                self._cache.finish(transfer, np.zeros(len(transfer), np.uint8), now)
            self._cache.planned.clear()
        self.seconds += monotonic_seconds() - started


class Nowhere:
    """The directory of a segment that does not exist."""

    def __init__(self, slots: int) -> None:
        self.holders = np.zeros(slots, np.uint64)

    def begin(self, *_: object) -> None:
        """Nothing is written."""

    ready = free = touch = begin

    def hashes(self, slots: object) -> bytes:
        """Nothing was written."""
        return b""


WAYS: dict[str, type[Tree] | type[Requests]] = {"tree": Tree, "requests": Requests}


def measure(way: str, blocks: int, turnovers: list[int], traced: bool, prompts: Iterator[bytes]) -> Iterator[Row]:
    """A row each time that `turnovers` times `blocks` blocks were new; `traced` counts bytes by tracemalloc (slow)."""
    warm = WAYS[way](WARM_UP_BLOCKS)  # modules, numpy's and the allocator's caches, before anything is measured
    push(warm, prompts, 0)
    del warm
    gc.collect()
    if traced:
        tracemalloc.start()
    before = allocated_bytes(traced)
    load, now = WAYS[way](blocks), 0
    for turnover in turnovers:
        inserted, seconds = load.inserted, load.seconds
        while load.inserted < turnover * blocks:
            now = push(load, prompts, now)
        gc.collect()
        cached = load.index.blocks
        yield {
            "blocks": cached,
            "turnover": turnover,
            "bytes_per_block": (allocated_bytes(traced) - before) / cached,
            "blocks_per_second": (load.inserted - inserted) / (load.seconds - seconds),
            "pool_bytes_per_block": pool_bytes(load.pools) / cached,
            "nodes": sum(1 for _ in load.index.nodes()),
        }


def push(load: Tree | Requests, prompts: Iterator[bytes], now: int) -> int:
    """The next few prompts, read before they are stored; returns the time."""
    for prompt in list(islice(prompts, PROMPTS_AT_ONCE)):
        now += 1
        load.store(prompt, now)
    return now


def make_pools(blocks: int) -> list[Pool]:
    """Slots for a quarter of the blocks in cpu, for all in nvme."""
    pools = [Pool(count // SEGMENTS) for count in (blocks // CPU_SHARE, blocks)]
    for pool in pools:
        for _ in range(SEGMENTS):
            pool.add_segment(Nowhere(pool.slots_per_segment), 0)
    return pools


def tiers(pools: list[Pool]) -> dict[str, Pool]:
    """These pools by the names of their tiers."""
    return dict(zip(("cpu", "nvme"), pools, strict=True))


def pool_bytes(pools: list[Pool]) -> int:
    """Bytes of the slots' accounting, which a tier has whether blocks are in it or not."""
    arrays = [value for pool in pools for value in vars(pool).values() if isinstance(value, np.ndarray)]
    return sum(array.nbytes for array in arrays)


def allocated_bytes(traced: bool) -> int:
    """Traced or resident bytes of this process."""
    if traced:
        return tracemalloc.get_traced_memory()[0]
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def prompts_from(stream: BinaryIO) -> Iterator[bytes]:
    """Prompts, each behind its LENGTH, so that this process's memory holds none but those it works on."""
    while len(head := stream.read(LENGTH.size)) == LENGTH.size:
        yield stream.read(*LENGTH.unpack(head))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    json.dump(list(measure(**asked, prompts=prompts_from(sys.stdin.buffer))), sys.stdout)

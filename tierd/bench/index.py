"""What a cached block costs in memory, and how many blocks a second come into the index while as many leave it.

Everything that the core does for a block is in it: tree, mid-chain table, both tiers' slots, order of eviction,
leases, the write-back queue and the accounting of slots; nothing else is: no socket, no segment, no byte of a block.
nvme has room for the blocks, cpu for a quarter of them. Each run is a process of its own (this module) that reads its
prompts from standard input, so that all its memory is the index's.
"""

from __future__ import annotations

import gc
import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tierd.bench.prompts import KINDS
from tierd.bench.report import Column, Result, Row, Task, at_least, at_most
from tierd.block import HASH_BYTES, ROOT
from tierd.clock import monotonic_seconds
from tierd.core.cache import Cache
from tierd.core.pool import Pool
from tierd.errors import Closed

BLOCKS, BLOCKS_QUICK = 1_000_000, 30_000
TURNOVERS = (1, 10)
"""Measured when this many times the blocks that fit have been stored."""
BYTES_PER_BLOCK_MAX = 100
BLOCKS_PER_SECOND_MIN = 1_000_000
CPU_SHARE = 4
SEGMENTS = 8
PROMPTS_AT_ONCE = 64
WRITE_BACK_BLOCKS = 128
SESSION = 1
SEED = 1
LENGTH = struct.Struct("<I")
CHILD_SECONDS_MAX = 600


def run(task: Task) -> Result:
    """Both kinds of prompts; speeds one after the other, then traced memory side by side."""
    blocks = BLOCKS_QUICK if task.quick else BLOCKS
    found = []
    for kind in KINDS:
        task.say(f"index: {kind} prompts, speed")
        found.append(in_child(kind, blocks, traced=False))
    task.say("index: memory")
    with ThreadPoolExecutor() as pool:
        traced = list(pool.map(lambda kind: in_child(kind, blocks, traced=True), KINDS))
    rows = [
        {**row, "traced_bytes_per_block": other["traced_bytes_per_block"]}
        for rows, others in zip(found, traced, strict=True)
        for row, other in zip(rows, others, strict=True)
    ]
    verdicts = []
    for row in rows:
        where = f"{row['prompts']}, {row['turnover']}x the capacity"
        verdicts.append(at_most(f"{where}: bytes per block", row["bytes_per_block"], BYTES_PER_BLOCK_MAX))
        verdicts.append(at_least(f"{where}: blocks/s", row["insert_blocks_per_second"], BLOCKS_PER_SECOND_MIN))
    notes = [
        "insert: new blocks by the seconds of store, commit, write-back's decisions and both tiers' evictions",
        "bytes: growth of the process (RSS); traced: as Python and numpy count it; pools: the slots' part of it",
    ]
    return Result("index", rows, COLUMNS, verdicts, notes)


def in_child(kind: str, blocks: int, traced: bool) -> list[Row]:
    """One row for each of TURNOVERS, measured in a process of its own."""
    command = [sys.executable, "-m", "tierd.bench.index", kind, str(blocks), "traced" if traced else "plain"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        with suppress(BrokenPipeError):  # it has read enough
            for prompt in KINDS[kind](SEED):
                child.stdin.write(LENGTH.pack(len(prompt)) + prompt)
        answer = child.stdout.read()
        if child.wait(CHILD_SECONDS_MAX):
            raise Closed(f"the measuring process ended with {child.returncode}: see what it printed above")
    rows: list[Row] = json.loads(answer)
    return rows


def prompts_from(stream: BinaryIO) -> Iterator[bytes]:
    """What `in_child` writes."""
    while True:
        (length,) = LENGTH.unpack(stream.read(LENGTH.size))
        yield stream.read(length)


def measure(kind: str, blocks: int, traced: bool, prompts: Iterator[bytes]) -> Iterator[Row]:
    """Rows as time goes on; `traced` measures with tracemalloc (slow), else the process's resident memory."""
    warm = Load(BLOCKS_QUICK // 10, prompts)  # modules, numpy's and the allocator's caches, before anything is measured
    warm.store(PROMPTS_AT_ONCE)
    del warm
    gc.collect()
    if traced:
        tracemalloc.start()
    before = allocated_bytes(traced)
    load = Load(blocks, prompts)
    for turnover in TURNOVERS:
        start = load.progress()
        while load.inserted < turnover * blocks:
            load.store(PROMPTS_AT_ONCE)
        gc.collect()
        cached = load.cache.index.blocks
        per_block = (allocated_bytes(traced) - before) / cached
        row = {"blocks": cached, "tiers": 2, "prompts": kind, "turnover": turnover, **load.rates(start)}
        yield row | {
            "traced_bytes_per_block" if traced else "bytes_per_block": per_block,
            "pool_bytes_per_block": load.pool_bytes() / cached,
        }


class Load:
    """A cache of two tiers without media, and the prompts that go through it."""

    def __init__(self, blocks: int, prompts: Iterator[bytes]) -> None:
        self.inserted = 0
        self._prompts = prompts
        self._store_seconds = self._write_back_seconds = 0.0
        self._now = 0
        pools = [Pool(share // SEGMENTS) for share in (blocks // CPU_SHARE, blocks)]
        for pool in pools:
            for _ in range(SEGMENTS):
                pool.add_segment(Nowhere(pool.slots_per_segment), 0)
        self.cache = Cache(*pools)
        self.cache.open_session(SESSION, 0)

    def store(self, prompts: int) -> None:
        """Store prompts and write them back; only the cache's own work is timed."""
        for prompt in list(islice(self._prompts, prompts)):
            self._now += 1
            started = monotonic_seconds()
            self._store(prompt)
            stored = monotonic_seconds()
            self._write_back()
            self._store_seconds += stored - started
            self._write_back_seconds += monotonic_seconds() - stored

    def _store(self, hashes: bytes) -> None:
        parent, total = ROOT, len(hashes) // HASH_BYTES
        placed = self.cache.store(SESSION, hashes, parent, self._now)
        if placed.lease:
            done = self.cache.commit(SESSION, placed.lease, None, self._now)
            assert done.dropped == 0 and done.committed <= total
            self.inserted += done.committed

    def _write_back(self) -> None:
        cache = self.cache
        while cache.plan_write_back(WRITE_BACK_BLOCKS):
            for transfer in cache.planned:
                cache.finish(transfer, np.zeros(len(transfer), np.uint8), self._now)
            cache.planned.clear()

    def progress(self) -> tuple[int, float, float]:
        """What `rates` counts from."""
        return self.inserted, self._store_seconds, self._write_back_seconds

    def rates(self, start: tuple[int, float, float]) -> dict[str, float]:
        """New blocks per second since `start`."""
        blocks, store, write_back = (now - then for now, then in zip(self.progress(), start, strict=True))
        return {
            "insert_blocks_per_second": blocks / (store + write_back),
            "store_blocks_per_second": blocks / store,
            "write_back_blocks_per_second": blocks / write_back,
        }

    def pool_bytes(self) -> int:
        """Bytes of the slots' accounting, which a tier has whether blocks are in it or not."""
        arrays = [value for pool in self.cache.pools for value in vars(pool).values() if isinstance(value, np.ndarray)]
        return sum(array.nbytes for array in arrays)


class Nowhere:
    """The directory of a segment that does not exist."""

    def __init__(self, slots: int) -> None:
        self.holders = np.zeros(slots, np.uint64)

    def begin(self, *_: object) -> None:
        """Nothing is written."""

    ready = free = hold = unhold = touch = begin


def allocated_bytes(traced: bool) -> int:
    """Traced or resident bytes of this process."""
    if traced:
        return tracemalloc.get_traced_memory()[0]
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


COLUMNS = (
    Column("blocks", lambda row: f"{row['blocks']:,}"),
    Column("prompts", lambda row: str(row["prompts"])),
    Column("stored", lambda row: f"{row['turnover']}x"),
    Column("bytes/block", lambda row: f"{row['bytes_per_block']:.0f}"),
    Column("traced", lambda row: f"{row['traced_bytes_per_block']:.0f}"),
    Column("pools", lambda row: f"{row['pool_bytes_per_block']:.0f}"),
    Column("insert blocks/s", lambda row: f"{row['insert_blocks_per_second']:,.0f}"),
    Column("store alone", lambda row: f"{row['store_blocks_per_second']:,.0f}"),
    Column("write-back alone", lambda row: f"{row['write_back_blocks_per_second']:,.0f}"),
)

if __name__ == "__main__":
    _, chosen, count, how = sys.argv
    json.dump(list(measure(chosen, int(count), how == "traced", prompts_from(sys.stdin.buffer))), sys.stdout)

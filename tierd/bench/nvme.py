"""How fast blocks reach the disk and come back through tierd, against raw O_DIRECT with the same block size and depth.

Chains are stored faster than a disk takes them. Writing is what write-back puts on disk from the end of the last store
until `sync` says that all is there, by the kernel's own count of the daemon's bytes; what is under way when the store
ends does not count. How long all took since the first store, with the engine's copies on the same cores, stands beside
it. Reading is `load` of a chain that is in nvme only, into an
engine's pool, promotion through the cpu tier and digests included. All files were written once before, as in a tier
that is full, and O_DIRECT bypasses the page cache. The four measurements take turns, because disks drift.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from tierd.bench.raw import RawFile, in_huge_pages
from tierd.bench.report import Column, Result, Row, Task, at_least, share, size, speed
from tierd.bench.scratch import LAYOUTS, Daemon, scratch_daemon, scratch_folder
from tierd.block import HASH_BYTES
from tierd.client import Client
from tierd.clock import monotonic_seconds
from tierd.errors import Busy
from tierd.layout import Namespace
from tierd.tiers.host import HostSegment
from tierd.values import KIB, MIB

BLOCK_BYTES = (64 * KIB, 360 * KIB, 2 * MIB)
FLOOR_BLOCK_BYTES = (360 * KIB, 2 * MIB)
RATIO_MIN = 0.85
ROUNDS = 11
IO_THREADS = 8
WRITE_CHAINS = 6
"""Chains that are stored before a sync."""
CPU_CHAINS, NVME_CHAINS, READ_CHAIN = 8, 14, 11
"""Chains that each tier holds, and which one is read, counted from the last used: it is in nvme and not in cpu."""
SYNC_SECONDS_MAX = 60.0
DEADLINE_SECONDS = 30.0


def run(task: Task) -> Result:
    """Measure every block size."""
    rows, io = [], {"engine": "none", "path": "none", "memory": "none"}
    for block_bytes in BLOCK_BYTES:
        task.say(f"nvme: {size(block_bytes)}")
        row, io = measure(task, block_bytes)
        rows.append(row)
    verdicts = [
        at_least(f"{size(row['block_bytes'])}, {verb} / raw", row[f"{verb}_ratio"], RATIO_MIN)
        for row in rows
        for verb in ("write", "read")
        if row["block_bytes"] in FLOOR_BLOCK_BYTES
    ]
    notes = [
        f"raw: preadv and pwritev with O_DIRECT, {IO_THREADS} threads with a list of blocks each, same directory",
        f"write: from the end of {WRITE_CHAINS} stores until sync has answered; store to sync: from the start of the first",
        "read: load of chains that are in nvme only",
        f"raw's memory is like the cpu tier's slots: {io['memory']}; huge: raw with memory in huge pages",
        f"medians of {rows[0]['rounds']} interleaved rounds of {size(rows[0]['bytes_per_round'])}",
    ]
    if io["path"] != "direct":
        notes.append(f"this file system does not take O_DIRECT (io path {io['path']}): the page cache was measured")
    facts = {"io_engine": io["engine"], "io_path": io["path"], "slot_pages": io["memory"]}
    return Result("nvme", rows, COLUMNS, verdicts, notes, facts)


def measure(task: Task, block_bytes: int) -> tuple[Row, dict[str, str]]:
    """One row: bytes per second of both directions, raw and through tierd; and how the daemon reaches the disk."""
    blocks = (8 * MIB if task.quick else 256 * MIB) // block_bytes
    chain_bytes = blocks * block_bytes
    segment_bytes = (4 if task.quick else 64) * MIB
    layout = LAYOUTS[block_bytes]
    slots = HostSegment.create(Namespace("bench", "raw", layout), chain_bytes + segment_bytes, epoch=1)
    shared, huge = slots.slots[:blocks, :block_bytes], in_huge_pages(blocks, block_bytes)
    shared[:] = 1
    with (
        scratch_folder(task.directory, 2 * NVME_CHAINS * chain_bytes) as folder,
        RawFile(folder / "raw", NVME_CHAINS * blocks, huge, IO_THREADS) as raw,
        scratch_daemon(
            task.directory,
            cpu__bytes=fitting(CPU_CHAINS * chain_bytes, segment_bytes),
            cpu__segment_bytes=segment_bytes,
            nvme__bytes=fitting(NVME_CHAINS * chain_bytes, segment_bytes),
            nvme__segment_bytes=segment_bytes,
            nvme__io_threads=IO_THREADS,
        ) as daemon,
        Client(daemon.socket, model="bench", layout=layout, deadline_seconds=DEADLINE_SECONDS) as client,
    ):
        chains = Chains(daemon, client, blocks, block_bytes)
        for _ in range(NVME_CHAINS // WRITE_CHAINS):
            chains.write()
        chains.read()
        calls: dict[str, Callable[[], float]] = {
            "raw_write": partial(repeated, raw.write, shared),
            "store_to_sync": chains.write,
            "raw_huge_write": partial(repeated, raw.write, huge),
            "raw_read": partial(read_raw, raw, shared),
            "read": chains.read,
            "raw_huge_read": partial(read_raw, raw, huge),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(2 if task.quick else ROUNDS):
            for name, call in calls.items():
                seconds[name].append(call())
        io = daemon.status()["io"] | {"memory": slots.page_kind}
    row: dict[str, Any] = {"block_bytes": block_bytes, "io_engine": io["engine"], "io_threads": IO_THREADS}
    for name, taken in seconds.items():
        row[f"{name}_bytes_per_second"] = chain_bytes / median(taken)
    seconds["write"] = chains.draining[-len(seconds["read"]) :]
    row["write_bytes_per_second"] = chain_bytes / median(seconds["write"])
    for name in ("write", "read"):
        pairs = list(zip(seconds[f"raw_{name}"], seconds[name], strict=True))
        row[f"{name}_ratio"] = median(plain for plain, _ in pairs) / median(ours for _, ours in pairs)
        row[f"{name}_ratio_pairwise"] = median(plain / ours for plain, ours in pairs)
    return {**row, "rounds": len(seconds["read"]), "bytes_per_round": chain_bytes}, io


def fitting(payload_bytes: int, segment_bytes: int) -> int:
    """Bytes of whole segments that have room for so many bytes of blocks beside their directories."""
    return (payload_bytes // segment_bytes + 1) * segment_bytes


def read_raw(raw: RawFile, memory: Any) -> float:
    """A read into memory that was just cleared, as in `Chains.read`: a disk that was idle meanwhile is slower at first."""
    memory[:] = 0
    return raw.read(memory)


def repeated(write: Callable[[Any], float], memory: Any) -> float:
    """As much as `Chains.write` writes; the mean of one."""
    return sum(write(memory) for _ in range(WRITE_CHAINS)) / WRITE_CHAINS


class Chains:
    """Chains of `blocks` blocks in the daemon, the least recently used first; each call returns its seconds."""

    def __init__(self, daemon: Daemon, client: Client, blocks: int, block_bytes: int) -> None:
        self._daemon, self._client, self._blocks = daemon, client, blocks
        self._source, self._target = in_huge_pages(blocks, block_bytes), in_huge_pages(blocks, block_bytes)
        self._source.view(np.uint64)[:] = np.arange(self._source.nbytes // 8, dtype=np.uint64).reshape(blocks, -1)
        self._pages = np.random.default_rng(1).permutation(blocks)
        self._used: deque[bytes] = deque(maxlen=NVME_CHAINS)
        self.draining: list[float] = []
        """Seconds that each `write` took for the bytes of one chain once its stores had ended."""

    def write(self) -> float:
        """New chains, from the first store until they are on NVMe; the mean of one."""
        new = [os.urandom(self._blocks * HASH_BYTES) for _ in range(WRITE_CHAINS)]
        started = monotonic_seconds()
        stored = [self._client.store(hashes, self._source, self._pages).stored for hashes in new]
        stored_at, written = monotonic_seconds(), self._daemon.written_bytes()
        self._daemon.sync(SYNC_SECONDS_MAX)
        ended = monotonic_seconds()
        self._check(min(stored), "stored")
        self._used.extend(new)
        drained = max(1, self._daemon.written_bytes() - written)
        self.draining.append((ended - stored_at) * self._source.nbytes / drained)
        return (ended - started) / WRITE_CHAINS

    def read(self) -> float:
        """A chain that has left the cpu tier."""
        hashes = self._used[-READ_CHAIN]
        before = self._from_nvme()
        self._target[:] = 0
        started = monotonic_seconds()
        loaded = self._client.load(hashes, self._target, self._pages)
        seconds = monotonic_seconds() - started
        self._check(loaded, "loaded")
        self._check(self._from_nvme() - before, "loaded from nvme")
        assert np.array_equal(self._target, self._source), "a hit with wrong bytes"
        self._used.remove(hashes)
        self._used.append(hashes)
        return seconds

    def _from_nvme(self) -> int:
        return int(self._daemon.status()["lookup_blocks"]["nvme"])

    def _check(self, blocks: int, what: str) -> None:
        if blocks != self._blocks:
            raise Busy(f"only {blocks} of {self._blocks} blocks were {what}: is another load on this machine or disk?")


COLUMNS = (
    Column("block", lambda row: size(row["block_bytes"])),
    Column("io engine", lambda row: str(row["io_engine"])),
    Column("write", lambda row: speed(row["write_bytes_per_second"])),
    Column("raw write", lambda row: speed(row["raw_write_bytes_per_second"])),
    Column("huge", lambda row: speed(row["raw_huge_write_bytes_per_second"])),
    Column("write / raw", lambda row: share(row["write_ratio"])),
    Column("store to sync", lambda row: speed(row["store_to_sync_bytes_per_second"])),
    Column("pairwise", lambda row: share(row["write_ratio_pairwise"])),
    Column("read", lambda row: speed(row["read_bytes_per_second"])),
    Column("raw read", lambda row: speed(row["raw_read_bytes_per_second"])),
    Column("huge", lambda row: speed(row["raw_huge_read_bytes_per_second"])),
    Column("read / raw", lambda row: share(row["read_ratio"])),
    Column("pairwise", lambda row: share(row["read_ratio_pairwise"])),
)

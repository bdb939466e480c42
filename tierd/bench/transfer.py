"""How fast blocks get from an engine's pool into tierd and back, against plain memcpy of as many with the same threads.

Each round copies, stores and loads the same number of blocks, taking turns. The pools, and what lies in tierd between
a store and the load of the same chain, are several times the last-level cache; every page was touched before; pages
are in shuffled order, as in an engine that has run for a while.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.bench.machine import last_level_cache_bytes
from tierd.bench.raw import in_huge_pages
from tierd.bench.report import Column, Result, Row, Task, at_least, share, size, speed
from tierd.bench.scratch import LAYOUTS, Daemon, scratch_daemon
from tierd.block import HASH_BYTES, ROOT
from tierd.client import Client
from tierd.client.store import BATCH_BLOCKS, BATCH_BYTES
from tierd.clock import monotonic_seconds
from tierd.errors import Busy
from tierd.values import GIB, KIB, MIB

BLOCK_BYTES = (360 * KIB, 2 * MIB)
RATIO_MIN = 0.8
ROUNDS = 15
CACHES = 8
"""Each pool is at least this many last-level caches: the chain of a prompt of 12,000 tokens in the smaller blocks."""
CALL_BLOCKS = 32
CHAINS_BETWEEN = 2
"""A chain is loaded when this many younger ones have been stored."""
SEGMENT_BYTES = 64 * MIB
SYNC_SECONDS_MAX = 60.0
DEADLINE_SECONDS = 10.0
THREADS = (1, 2)

Pages = NDArray[np.int64]


def run(task: Task) -> Result:
    """Measure every block size as a client does it by default; variants: threads, short calls, write-back."""
    rows = []
    for block_bytes in BLOCK_BYTES:
        task.say(f"transfer: {size(block_bytes)}")
        default = default_threads(block_bytes)
        head = measure(task, block_bytes, default)
        variants = [measure(task, block_bytes, default, call_blocks=CALL_BLOCKS)]
        variants += [measure(task, block_bytes, other) for other in THREADS if other != default and not task.quick]
        variants.append(measure(task, block_bytes, default, write_back=True))
        rows.append({**head, "variants": variants})
    verdicts = [
        at_least(f"{size(row['block_bytes'])}, {verb} / memcpy", row[f"{verb}_ratio"], RATIO_MIN)
        for row in rows
        for verb in ("store", "load")
    ]
    notes = [
        "a call copies all blocks of a round unless it says how many; commits and leases are included",
        f"memcpy: np.copyto per block, same threads; pools of {size(rows[0]['bytes_per_round'])}, shuffled, prefaulted",
        f"medians of {rows[0]['rounds']} interleaved rounds; every store evicts; nvme is off unless write-back is on",
    ]
    return Result("transfer", rows, COLUMNS, verdicts, notes)


def default_threads(block_bytes: int) -> int:
    """How many threads a client copies with when it is not told."""
    return Client("/nonexistent", model="bench", layout=LAYOUTS[block_bytes]).copier.threads


def batch_blocks(block_bytes: int, call_blocks: int) -> int:
    """How many blocks a client stores with one request."""
    batch = max(BATCH_BLOCKS, BATCH_BYTES // block_bytes)
    return min(batch, call_blocks) if call_blocks else batch


def pool_bytes(task: Task, block_bytes: int) -> int:
    """Bytes of each pool: whole batches, more than CACHES caches."""
    batch_bytes = CALL_BLOCKS * block_bytes
    wanted = batch_bytes if task.quick else CACHES * last_level_cache_bytes()
    return -(-wanted // batch_bytes) * batch_bytes


def measure(task: Task, block_bytes: int, threads: int, call_blocks: int = 0, write_back: bool = False) -> Row:
    """One row: bytes per second of store, load and memcpy; `call_blocks` in each call of the client, 0: all."""
    chain_bytes = pool_bytes(task, block_bytes)
    # Room for all chains that are stored or loaded between the store and the load of one, and not for many more.
    tier_bytes = max((2 * CHAINS_BETWEEN + 4) * chain_bytes, 0 if task.quick else GIB)
    tier_bytes = -(-tier_bytes // SEGMENT_BYTES) * SEGMENT_BYTES
    nvme_bytes = 2 * tier_bytes if write_back else 0
    with (
        scratch_daemon(
            task.directory, cpu__bytes=tier_bytes, nvme__bytes=nvme_bytes, cpu__segment_bytes=SEGMENT_BYTES
        ) as daemon,
        Client(
            daemon.socket,
            model="bench",
            layout=LAYOUTS[block_bytes],
            deadline_seconds=DEADLINE_SECONDS,
            copy_threads=threads,
        ) as client,
        Copies(client, chain_bytes // block_bytes, block_bytes, threads, call_blocks) as copies,
    ):
        for _ in range(tier_bytes // chain_bytes + 2):  # until it evicts, and the client has touched every page
            copies.store()
        copies.load()
        seconds: dict[str, list[float]] = {"memcpy": [], "store": [], "load": []}
        for _ in range(2 if task.quick else ROUNDS):
            for name, taken in seconds.items():
                taken.append(getattr(copies, name)())
            if write_back:
                daemon.sync(SYNC_SECONDS_MAX)
        facts = evictions(daemon)
    row: dict[str, Any] = {
        "block_bytes": block_bytes,
        "batch_blocks": batch_blocks(block_bytes, call_blocks),
        "call_blocks": call_blocks or chain_bytes // block_bytes,
        "copy_threads": threads,
        "write_back": write_back,
    }
    for name in ("store", "load", "memcpy"):
        row[f"{name}_bytes_per_second"] = chain_bytes / median(seconds[name])
    for name in ("store", "load"):
        row[f"{name}_ratio"] = median(seconds["memcpy"]) / median(seconds[name])
        row[f"{name}_ratio_pairwise"] = median(m / taken for m, taken in zip(seconds["memcpy"], seconds[name], strict=True))
    return {
        **row,
        "rounds": len(seconds["load"]),
        "bytes_per_round": chain_bytes,
        **facts,
    }


def evictions(daemon: Daemon) -> dict[str, int]:
    """How many blocks had to go for those that were stored."""
    return {"evicted_blocks": sum(daemon.status()["evicted_blocks"].values())}


class Copies:
    """Two pools of `blocks` pages each, and the three ways to copy all blocks of one; each returns its seconds."""

    def __init__(self, client: Client, blocks: int, block_bytes: int, threads: int, call_blocks: int) -> None:
        self._client, self._blocks, self._threads = client, blocks, threads
        self._call_blocks = call_blocks or blocks
        self._order = np.random.default_rng(1)
        self._source, self._target = in_huge_pages(blocks, block_bytes), in_huge_pages(blocks, block_bytes)
        self._source.view(np.uint64)[:] = np.arange(self._source.nbytes // 8, dtype=np.uint64).reshape(blocks, -1)
        self._chains: deque[tuple[bytes, Pages]] = deque(maxlen=CHAINS_BETWEEN + 1)
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def memcpy(self) -> float:
        """What numpy alone needs, each thread with its share of the blocks."""
        pairs = list(zip(self._pages().tolist(), self._pages().tolist(), strict=True))
        shares = [pairs[at :: self._threads] for at in range(self._threads)]
        started = monotonic_seconds()
        if self._threads == 1:
            self._copy(pairs)
        else:
            list(self._pool.map(self._copy, shares))
        return monotonic_seconds() - started

    def store(self) -> float:
        """A new chain from the source pool."""
        hashes, pages = os.urandom(self._blocks * HASH_BYTES), self._pages()
        started = monotonic_seconds()
        stored = 0
        for parent, part, some in self._calls(hashes, pages):
            stored += self._client.store(part, self._source, some, parent).stored
        seconds = monotonic_seconds() - started
        if stored != self._blocks:
            raise Busy(f"only {stored} of {self._blocks} blocks were stored: the scratch daemon is overloaded")
        self._chains.append((hashes, pages))
        return seconds

    def load(self) -> float:
        """The oldest chain that we remember, to the target pool."""
        hashes, stored_from = self._chains[0]
        pages = self._pages()
        started = monotonic_seconds()
        loaded = 0
        for parent, part, some in self._calls(hashes, pages):
            loaded += self._client.load(part, self._target, some, parent)
        seconds = monotonic_seconds() - started
        if loaded != self._blocks:
            raise Busy(f"only {loaded} of {self._blocks} blocks were hits: the scratch daemon is overloaded")
        for at in (0, -1):
            assert np.array_equal(self._target[pages[at]], self._source[stored_from[at]]), "a hit with wrong bytes"
        return seconds

    def _calls(self, hashes: bytes, pages: Pages) -> Iterator[tuple[bytes, bytes, Pages]]:
        """A chain as the client's calls get it: (parent, hashes, pages)."""
        parent = ROOT
        for first in range(0, self._blocks, self._call_blocks):
            part = hashes[first * HASH_BYTES : (first + self._call_blocks) * HASH_BYTES]
            yield parent, part, pages[first : first + self._call_blocks]
            parent = part[-HASH_BYTES:]

    def _pages(self) -> Pages:
        return self._order.permutation(self._blocks)

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        for target, source in pairs:
            np.copyto(self._target[target], self._source[source])


COLUMNS = (
    Column("block", lambda row: size(row["block_bytes"])),
    Column("call", lambda row: f"{row['call_blocks']} blocks"),
    Column("batch", lambda row: str(row["batch_blocks"])),
    Column("threads", lambda row: str(row["copy_threads"])),
    Column("write-back", lambda row: "on" if row["write_back"] else "off"),
    Column("store", lambda row: speed(row["store_bytes_per_second"])),
    Column("load", lambda row: speed(row["load_bytes_per_second"])),
    Column("memcpy", lambda row: speed(row["memcpy_bytes_per_second"])),
    Column("store / memcpy", lambda row: share(row["store_ratio"])),
    Column("load / memcpy", lambda row: share(row["load_ratio"])),
    Column("evicted", lambda row: f"{row['evicted_blocks']:,}"),
)

"""How long a lookup takes, from the client's call to the released lease: of prefixes that are there, and that are not.

The ceiling is a bare socket round trip of the same bytes between two processes. Hits, misses and round trips take
turns in groups of `GROUP`: within a group each meets the daemon as a client in a loop would.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from tierd.bench.echo import Echo
from tierd.bench.report import Column, Result, Row, Task, at_most, size
from tierd.bench.scratch import LAYOUTS, scratch_daemon
from tierd.block import HASH_BYTES, ROOT
from tierd.client import Client
from tierd.clock import monotonic_seconds
from tierd.errors import Busy
from tierd.values import KIB
from tierd.wire.framing import encode

BLOCK_BYTES = 4 * KIB
"""Small, so that 8,192 blocks fit; no byte of a block is touched by a lookup."""
ITERATIONS = {32: 2000, 512: 1000, 8192: 300}
HIT_US_P50_MAX = {32: 150.0, 8192: 500.0}
GROUP = 20
WARM_UP_GROUPS = 3
DEADLINE_SECONDS = 10.0
PAGES = 32


def run(task: Task) -> Result:
    """Measure every length against one daemon without an nvme tier."""
    rows = []
    with (
        scratch_daemon(task.directory, cpu__bytes="256MiB", nvme__bytes=0) as daemon,
        Client(daemon.socket, model="bench", layout=LAYOUTS[BLOCK_BYTES], deadline_seconds=DEADLINE_SECONDS) as client,
        Echo() as echo,
    ):
        for blocks, iterations in ITERATIONS.items():
            task.say(f"lookup: {blocks} blocks")
            rows.append(measure(client, echo, blocks, GROUP if task.quick else iterations))
    verdicts = [
        at_most(f"{row['blocks']:,} blocks, hit p50", row["hit_us_p50"], HIT_US_P50_MAX[row["blocks"]], " us")
        for row in rows
        if row["blocks"] in HIT_US_P50_MAX
    ]
    verdicts += [
        at_most(f"{row['blocks']:,} blocks, miss p50 / hit p50", row["miss_us_p50"] / row["hit_us_p50"], 1.0) for row in rows
    ]
    notes = [
        "a hit is the round trip of a lookup, which waits for the release before it",
        f"blocks of {size(BLOCK_BYTES)}, which a lookup does not touch; nvme is off",
        "ceiling: a bare socket round trip of as many bytes between two processes",
    ]
    return Result("lookup", rows, COLUMNS, verdicts, notes)


def measure(client: Client, echo: Echo, blocks: int, iterations: int) -> Row:
    """One row: microseconds of hits, misses and bare round trips of `blocks` blocks."""
    hashes = os.urandom(blocks * HASH_BYTES)
    store(client, hashes)
    unknown = os.urandom(blocks * HASH_BYTES)
    request, reply_bytes = wire_bytes(hashes)
    hit: list[tuple[float, float]] = []
    miss: list[tuple[float, float]] = []
    bare: list[float] = []
    for _ in range(WARM_UP_GROUPS + -(-iterations // GROUP)):
        hit += [look_up(client, hashes, blocks) for _ in range(GROUP)]
        bare += [echo.round_trip(request, reply_bytes) for _ in range(GROUP)]
        miss += [look_up(client, unknown, 0) for _ in range(GROUP)]
    skipped = WARM_UP_GROUPS * GROUP
    hits, cycles = np.array(hit[skipped:]).T * 1e6
    misses = np.array(miss[skipped:])[:, 0] * 1e6
    bares = np.array(bare[skipped:]) * 1e6
    return {
        "blocks": blocks,
        "block_bytes": BLOCK_BYTES,
        "iterations": len(hits),
        "hit_us_p50": percentile(hits, 50),
        "hit_us_p99": percentile(hits, 99),
        "hit_and_release_us_p50": percentile(cycles, 50),
        "miss_us_p50": percentile(misses, 50),
        "miss_us_p99": percentile(misses, 99),
        "socket_us_p50": percentile(bares, 50),
        "socket_us_p99": percentile(bares, 99),
        "hit_ratio": percentile(hits, 50) / percentile(bares, 50),
    }


def look_up(client: Client, hashes: bytes, expected: int) -> tuple[float, float]:
    """Seconds of a lookup's round trip, and of it with the sending of its release; raises Busy for another answer."""
    started = monotonic_seconds()
    found = client.lookup(hashes)
    answered = monotonic_seconds()
    blocks = found.blocks
    found.release()
    released = monotonic_seconds()
    if blocks != expected:
        raise Busy(f"a lookup found {blocks} of {expected} blocks: the scratch daemon is overloaded, run it again")
    return answered - started, released - started


def store(client: Client, hashes: bytes) -> None:
    """Put a chain into the cpu tier."""
    pool = np.zeros((PAGES, BLOCK_BYTES), np.uint8)
    blocks = len(hashes) // HASH_BYTES
    stored = client.store(hashes, pool, np.arange(blocks) % PAGES).stored
    if stored != blocks:
        raise Busy(f"only {stored} of {blocks} blocks were stored: the scratch daemon is overloaded, run it again")


def wire_bytes(hashes: bytes) -> tuple[bytes, int]:
    """A lookup's frame, and the length of the frame that answers it."""
    blocks = len(hashes) // HASH_BYTES
    tiers = dict.fromkeys(("gpu", "cpu", "nvme", "remote", "pending", "miss"), blocks)
    request = {"id": 1 << 16, "verb": "lookup", "deadline_ms": 1000, "hashes": hashes, "parent": ROOT}
    reply = {"id": 1 << 16, "ok": True, "lease": 1 << 16, "blocks": blocks, "told": blocks, "tiers": tiers}
    return encode(request), len(encode({**reply, "slots": bytes(4 * blocks)}))


def percentile(values: NDArray[np.float64], rank: float) -> float:
    """The value below which `rank` percent lie."""
    return float(np.percentile(values, rank))


COLUMNS = (
    Column("blocks", lambda row: f"{row['blocks']:,}"),
    Column("hit p50", lambda row: f"{row['hit_us_p50']:.0f} us"),
    Column("hit p99", lambda row: f"{row['hit_us_p99']:.0f} us"),
    Column("with release", lambda row: f"{row['hit_and_release_us_p50']:.0f} us"),
    Column("miss p50", lambda row: f"{row['miss_us_p50']:.0f} us"),
    Column("miss p99", lambda row: f"{row['miss_us_p99']:.0f} us"),
    Column("socket p50", lambda row: f"{row['socket_us_p50']:.0f} us"),
    Column("hit / socket", lambda row: f"{row['hit_ratio']:.1f}"),
)

"""How old blocks are, what an endless cache would find, and how late the loop is: counted right, by bucket and by sample."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter

import numpy as np
from prometheus_client import CollectorRegistry, Histogram

from tierd import lag
from tierd.core.ages import BOUNDS, BUCKETS, EVERYWHERE, GAP, IDLE, SAMPLE, SUM, note_ages
from tierd.core.index import Index, Piece
from tierd.core.seen import CELLS, Seen

SECOND = 1000


def block(word: int) -> bytes:
    """A hash that begins with this number."""
    return word.to_bytes(8, "little") + bytes(24)


def test_ages_one_by_one_and_together_come_to_the_same() -> None:
    """Every edge of every bucket, below, on and above it; an age below zero is none."""
    ages = [SECOND * bound + step for bound in BOUNDS for step in (-1, 0, 1)] + [-5, 0, 10**12]
    one: Counter[tuple[str, ...]] = Counter()
    all_at_once: Counter[tuple[str, ...]] = Counter()
    for age in ages:
        note_ages(one, IDLE, "cpu", [(age, 3)])
    for _ in range(3):
        note_ages(all_at_once, IDLE, "cpu", [(age, 1) for age in ages])
    assert one == all_at_once
    assert [one[IDLE, "cpu", bucket] for bucket in BUCKETS] == [12, 9, 9, 9, 9, 9, 9, 6]
    assert one[IDLE, "cpu", SUM] == 3 * sum(max(age, 0) for age in ages)


def test_a_hash_of_the_sample_is_new_once_and_seen_ever_after() -> None:
    """Hashes outside of the sample are not followed; the gap is the time since the last request, hit or not."""
    counters: Counter[tuple[str, ...]] = Counter()
    seen = Seen(counters)
    followed = b"".join(block(SAMPLE * at) for at in range(1, 11))
    others = b"".join(block(SAMPLE * at + 1) for at in range(1, 11))
    for now in (5 * SECOND, 7 * SECOND, 400 * SECOND):
        seen.asked(followed + others, now)
        seen.asked(others, now)
    assert (counters["sampled", "new"], counters["sampled", "seen"]) == (10, 20)
    assert (counters[GAP, EVERYWHERE, "10"], counters[GAP, EVERYWHERE, "600"]) == (10, 10)
    assert counters[GAP, EVERYWHERE, SUM] == 10 * 395 * SECOND


def test_a_hash_in_the_cell_of_another_makes_it_forgotten() -> None:
    """Memory is bounded: what is forgotten is new again, never seen by mistake."""
    counters: Counter[tuple[str, ...]] = Counter()
    seen = Seen(counters)
    for _ in range(2):
        seen.asked(block(SAMPLE), 1)
        seen.asked(block(SAMPLE + SAMPLE * CELLS), 2)
    assert (counters["sampled", "new"], counters["sampled", "seen"]) == (4, 0)


def test_about_one_hash_in_64_is_followed() -> None:
    """Hashes are random, so the share of those followed is known."""
    counters: Counter[tuple[str, ...]] = Counter()
    Seen(counters).asked(os.urandom(32 * 64_000), 1)
    assert 800 < counters["sampled", "new"] < 1200


def test_a_run_knows_when_it_was_stored_through_uses_splits_and_joins() -> None:
    """Uses do not make it younger, both halves of a split are as old, and what is joined has the mean of its blocks."""
    index = Index(1)
    hashes = os.urandom(32 * 30)
    node = index.extend(index.root, hashes[: 32 * 20], np.arange(20, dtype=np.int32)[None], 100)
    [piece] = index.touch([Piece(node, 0, 10)], 200)
    assert (len(piece.node), piece.node.born, node.born) == (10, 100, 100)
    index.touch(index.match(hashes) or [], 300)
    [whole] = index.nodes()
    index.extend(whole, hashes[32 * 20 : 32 * 25], np.arange(20, 25, dtype=np.int32)[None], 300)
    assert whole.born == (20 * 100 + 5 * 300) // 25
    index.extend(whole, hashes[32 * 25 :], np.arange(25, 30, dtype=np.int32)[None], 400)
    index.touch(index.match(hashes) or [], 500)
    [whole] = index.nodes()
    assert (len(whole), whole.born) == (30, (25 * 140 + 5 * 400) // 30)


def test_a_loop_that_is_held_up_is_late() -> None:
    """What holds the loop for a while shows as a lag of about that time; without it there is next to none."""
    histogram = Histogram("lag", "", buckets=(0.1, 10), registry=CollectorRegistry())

    def values() -> dict[str, float]:
        return {sample.name: sample.value for sample in histogram.collect()[0].samples}

    async def hold_up() -> None:
        watching = asyncio.create_task(lag.watch(histogram))
        await asyncio.sleep(lag.PAUSE_SECONDS / 2)
        time.sleep(lag.PAUSE_SECONDS / 2 + 0.2)  # the loop stands still: this is what is measured
        while not values()["lag_count"]:
            await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(hold_up())
    assert values()["lag_sum"] >= 0.15

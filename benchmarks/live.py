"""A trace against a running daemon, beside its replay: `python -m benchmarks.live TRACE [cpu/nvme/admission] ...`.

A scratch daemon gets a hundredth of the trace's unique blocks as slots in cpu and a tenth in nvme, of 4 KiB each. One client
loads what it has of each prompt, stores the rest, and waits for write-back before the next one, since a trace of an hour is
over in a minute. The daemon's clock is the trace's (`trace_clock.py`), so that chd sees the ages that it would have seen.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.trace_clock import TraceClock
from tierd.bench.scratch import LAYOUTS, scratch_daemon
from tierd.block import HASH_BYTES, ROOT
from tierd.client import Client
from tierd.clock import unix_milliseconds
from tierd.replay.house import House
from tierd.replay.run import parse_setting, slots_of
from tierd.replay.trace import read_trace
from tierd.tiers.segment import Geometry
from tierd.values import KIB

SHARES = {"cpu": 0.01, "nvme": 0.1}
SEGMENT_BYTES = 256 * KIB
LAYOUT = LAYOUTS[4 * KIB]
SYNC_SECONDS_MAX = 60.0


def main() -> None:
    """Hit rates of both, for each setting."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("settings", nargs="*", default=["lru", "chd"], help="cpu/nvme/admission, or one policy for both")
    parser.add_argument("--requests", type=int, help="only the first so many")
    options = parser.parse_args()
    trace = read_trace(options.trace)
    chains = list(trace.hashes())[: options.requests]
    times = times_of([request.now for request in trace.requests][: options.requests])
    asked = sum(map(len, chains)) // HASH_BYTES
    for setting in options.settings:
        policies, admission = parse_setting(setting, SHARES)
        segments = {tier: segments_for(slots_of(trace, share)) for tier, share in SHARES.items()}
        hits = live(chains, times, segments, policies, admission)
        again = replayed(chains, times, segments, policies, admission)
        figures = f"live {hits / asked:.2%}, replay {again / asked:.2%}"
        print(f"{trace.name}, {len(chains):,} requests, {setting}: {figures}", flush=True)


def segments_for(slots: int) -> int:
    """How many segments have about so many slots."""
    return max(1, round(slots / Geometry.fit(LAYOUT, SEGMENT_BYTES).slot_count))


def times_of(offsets: Sequence[int]) -> list[int]:
    """Milliseconds since a trace began as Unix milliseconds, of a trace that begins now."""
    began = unix_milliseconds()
    return [began + offset for offset in offsets]


def live(
    chains: Sequence[bytes],
    times: Sequence[int],
    segments: Mapping[str, int],
    policies: Mapping[str, str],
    admission: str,
) -> int:
    """Blocks that a daemon had of prompts which came at these times (Unix milliseconds)."""
    longest = max(map(len, chains)) // HASH_BYTES
    pool, pages = np.zeros((longest, LAYOUT.block_bytes), np.uint8), np.arange(longest)
    settings: dict[str, str | int] = {"nvme__admission": admission}
    for tier, number in segments.items():
        settings |= {f"{tier}__bytes": number * SEGMENT_BYTES, f"{tier}__segment_bytes": SEGMENT_BYTES}
        settings[f"{tier}__policy"] = policies[tier]
    hits = 0
    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        clock = TraceClock(folder / "clock", "w+")
        clock.set(times[0])
        program = str(Path(__file__).with_name("trace_clock.py")), str(folder / "clock")
        daemon = ending.enter_context(scratch_daemon(folder, program=program, cpu__huge_pages="off", **settings))
        client = ending.enter_context(Client(daemon.socket, model="trace", layout=LAYOUT, deadline_seconds=SYNC_SECONDS_MAX))
        for chain, now in zip(chains, times, strict=True):
            clock.set(now)
            blocks = len(chain) // HASH_BYTES
            hit = client.load(chain, pool, pages[:blocks])
            if hit < blocks:
                parent = chain[(hit - 1) * HASH_BYTES : hit * HASH_BYTES] if hit else ROOT
                client.store(chain[hit * HASH_BYTES :], pool, pages[hit:blocks], parent)
            if "nvme" in segments:
                daemon.sync(SYNC_SECONDS_MAX)
            hits += hit
    return hits


def replayed(
    chains: Sequence[bytes],
    times: Sequence[int],
    segments: Mapping[str, int],
    policies: Mapping[str, str],
    admission: str,
) -> int:
    """Blocks that a replay of the same prompts at the same times has."""
    slots = Geometry.fit(LAYOUT, SEGMENT_BYTES).slot_count
    house = House({tier: number * slots for tier, number in segments.items()}, policies, admission)
    return sum(house.request(chain, now) for chain, now in zip(chains, times, strict=True))


if __name__ == "__main__":
    main()

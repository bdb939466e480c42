"""A real daemon with a gpu tier so small that little of the work fits, and engines whose pages are its slots."""

from __future__ import annotations

import select
from pathlib import Path
from typing import Any

from tests.daemon.harness import Daemon, settings
from tierd.client.pages import PageClient
from tierd.clock import monotonic_seconds
from tierd.layout import Layout
from tierd.tiers.segment import Geometry
from tierd_engine.engine import Engine
from tierd_engine.tier import TierMemory

SEGMENT_BYTES = 160 << 10
SEGMENTS = 2
PATIENCE_SECONDS = 20.0


def gpu_daemon(folder: Path, held: bool = False, environ: dict[str, str] | None = None, **values: Any) -> Daemon:
    """A daemon, not started yet, with two segments of gpu tier above two of cpu and many of nvme."""
    sizes = {"gpu": SEGMENTS, "cpu": 2, "nvme": 64}
    flags = {f"{tier}_bytes": count * SEGMENT_BYTES for tier, count in sizes.items()}
    flags |= {f"{tier}_segment_bytes": SEGMENT_BYTES for tier in sizes}
    return Daemon(folder, settings(**(flags | {"cpu_huge_pages": "off"} | values)), held, **(environ or {}))


def slots(layout: Layout) -> int:
    """How many slots the gpu tier of such a daemon has."""
    return SEGMENTS * Geometry.fit(layout, SEGMENT_BYTES).slot_count


def tier_memory(daemon: Daemon, layout: Layout, pages: int, model: str = "m", device: str = "cpu") -> TierMemory:
    """The daemon's slots as pages, and `pages` private ones."""
    sizes = {"pages_max": slots(layout), "private_pages": pages}
    client = PageClient(daemon.socket, model=model, layout=layout, deadline_seconds=2.0, device=device, **sizes)
    memory = TierMemory(layout, client)
    assert client.alive, client.trouble
    return memory


def check_nothing_is_held(daemon: Daemon, *engines: Engine) -> None:
    """Neither an engine nor the daemon thinks that a page is in use."""
    for engine in engines:
        engine.check()
    deadline = monotonic_seconds() + PATIENCE_SECONDS
    while daemon.slots("gpu")["filling"]:
        assert monotonic_seconds() < deadline, f"reserved slots that nobody has: {daemon.slots('gpu')}"
        select.select([], [], [], 0.01)
    for engine in engines:
        reserve_all(engine.memory)
        engine.check()


def reserve_all(memory: Any) -> None:
    """Reserve the whole tier, which works only when nobody holds any of it, and give it back."""
    deadline, wanted = monotonic_seconds() + PATIENCE_SECONDS, slots(memory.layout)
    got: list[int] = []
    while monotonic_seconds() < deadline and len(got) < wanted:
        memory.release(got)
        asked = memory.reserve(wanted)
        while not asked.done:
            memory.wait(0.01)
            memory.poll()
        got = list(asked.pages)
    memory.release(got)
    assert len(got) == wanted and max(got) < wanted, f"only {len(got)} of {wanted} slots can be had"

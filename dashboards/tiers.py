"""Tiers and I/O: what is where, how old it gets, and what moves between tiers."""

from __future__ import annotations

from typing import Any

from dashboards.panels import Panel, by, graph, only, quantile, rate, total
from dashboards.panels import dashboard as make

WAY = "source, target"


def dashboard() -> dict[str, Any]:
    """For who sizes tiers and disks."""
    rows = [("Room", room()), ("How old blocks get", ages()), ("Between tiers", transfers()), ("Writing back", writing())]
    text = "What the tiers hold, how long blocks stay, and what moves between them."
    return make("tierd-tiers", "tierd / Tiers and I/O", text, rows)


def room() -> list[Panel]:
    """Bytes, slots and what had to go."""
    return [
        graph(
            "Bytes of segments",
            "bytes",
            "What tiers have taken of their media, and what they may take.",
            (total("tier", only("tierd_tier_used_bytes")), "{{tier}} used"),
            (total("tier", only("tierd_tier_limit_bytes")), "{{tier}} limit"),
        ),
        graph(
            "Slots by state",
            "short",
            "ready: a block can be found; filling: being written, or an engine's page; retired: gone, and still being read; "
            "quarantined: the medium lied about it.",
            by("tier, state", only("tierd_slots")),
            stack=True,
        ),
        graph(
            "Evicted blocks",
            "short",
            "Blocks a second that made room. clean: another tier has them; drop: they are lost, and the next lookup is a miss.",
            by("tier, kind", rate("tierd_evicted_blocks_total")),
        ),
        graph(
            "Growth refused",
            "none",
            "1 while a tier's medium does not give the segment that was last asked for: a full disk, no memory.",
            (f"max by (tier) ({only('tierd_tier_growth_refused')})", "{{tier}}"),
        ),
        graph(
            "Segments handed over",
            "short",
            "Segments a second that were taken from one namespace for another.",
            (total("", rate("tierd_segment_handovers_total")), "segments"),
        ),
        graph("Blocks known", "short", "Blocks in the prefix trees.", (total("", only("tierd_index_blocks")), "blocks")),
    ]


def ages() -> list[Panel]:
    """Whether what is evicted would have been used again."""
    return [
        graph(
            "Idle before eviction",
            "s",
            "How long ago evicted blocks had been used, median by tier. Compare with the time between uses.",
            (quantile(0.5, "tier", "tierd_eviction_idle_seconds"), "{{tier}}"),
        ),
        graph(
            "Life in a tier",
            "s",
            "How long evicted blocks had been in their tier, median, of every 64th slot.",
            (quantile(0.5, "tier", "tierd_block_lifetime_seconds"), "{{tier}}"),
        ),
        graph(
            "Time between uses",
            "s",
            "Time between two lookups of the same block, hit or not. A tier that evicts sooner than most blocks come back is "
            "too small.",
            (quantile(0.5, "", "tierd_reuse_gap_seconds"), "median"),
            (quantile(0.9, "", "tierd_reuse_gap_seconds"), "90 %"),
        ),
    ]


def transfers() -> list[Panel]:
    """Bytes, seconds and queues."""
    moved, busy = rate("tierd_transfer_bytes_total"), rate("tierd_transfer_thread_seconds_total")
    return [
        graph(
            "Bytes moved",
            "Bps",
            "Payload bytes that arrived, by why and where. demand: somebody waits for them.",
            (total(f"reason, {WAY}", moved), "{{reason}} {{source}} to {{target}}"),
            stack=True,
        ),
        graph(
            "Busy io threads",
            "short",
            "Threads at work on average. Near nvme.io_threads the medium or the threads are the limit.",
            (total(f"reason, {WAY}", busy), "{{reason}} {{source}} to {{target}}"),
            stack=True,
        ),
        graph(
            "Speed of one io thread",
            "Bps",
            "Bytes by busy second. Falls where the medium is slow or shared.",
            (f"{total(WAY, moved)} / ({total(WAY, busy)} > 0)", "{{source}} to {{target}}"),
        ),
        graph(
            "Prefetched blocks",
            "short",
            "What became of them. useful: used before they left their tier; late: somebody waited for them; wasted: not used.",
            by("outcome", rate("tierd_prefetched_blocks_total")),
            stack=True,
        ),
        graph(
            "Transfers under way",
            "short",
            "Started and not ended, by reason.",
            by("reason", only("tierd_transfers_in_flight")),
        ),
        graph(
            "Parts that wait for a thread",
            "short",
            "Demand goes before prefetch before write-back.",
            by("instance", only("tierd_transfer_parts_queued")),
        ),
        graph(
            "Paths taken",
            "Bps",
            "direct: past the page cache; buffered: the medium could not do that; memory: between tiers in memory.",
            by("path", moved),
        ),
        graph(
            "Ways to NVMe",
            "Bps",
            "Payload bytes written, and read and found right. posix, kvikio-host: host memory; gds: straight between a GPU and "
            "NVMe; bounce: a GPU's, through host memory.",
            by("path, direction", rate("tierd_io_path_bytes_total")),
            stack=True,
        ),
        graph(
            "What cuFile did",
            "iops",
            "Reads and writes of GPU memory, as cuFile counts them; 0 without GPUDirect Storage. posix: copied through host "
            "memory, so gds is not what it seems.",
            by("way, direction", rate("tierd_cufile_operations_total")),
        ),
    ]


def writing() -> list[Panel]:
    """Whether lower tiers keep up."""
    return [
        graph(
            "Runs not written yet",
            "short",
            "Runs of committed blocks that wait for a lower tier. 0: a stop now would lose nothing.",
            by("instance", only("tierd_write_back_runs")),
        ),
        graph(
            "Written, and given up",
            "short",
            "Blocks a second that came to NVMe (written), and those that did not: dropped, orphans, short.",
            by("event", rate("tierd_events_total", 'event=~"written|write_back_.+"')),
        ),
        graph(
            "Blocks that were not to be had",
            "short",
            "Events a second where all memory was held by leases: lookups and loads offered less, stores got fewer slots.",
            by("event", rate("tierd_events_total", 'event=~".+_(busy|short)"')),
        ),
    ]

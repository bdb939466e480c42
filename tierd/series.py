"""Every series that tierd exports, declared once: name, type, unit, labels, what it means and what always holds.

`metrics` fills them; `docs/metrics.md`, and the check that dashboards and alerts use no other, are made from this list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.utils import floatToGoString

Sample = tuple[tuple[str, ...], float]
COUNTER, GAUGE, HISTOGRAM, INFO = "counter", "gauge", "histogram", "info"


class Series(NamedTuple):
    """One family. `name` is without the suffix that its type appends; `text` is its help and `holds` what to rely on."""

    name: str
    type: str
    unit: str
    labels: tuple[str, ...]
    text: str
    holds: str

    @property
    def exported(self) -> str:
        """Its name as Prometheus shows it after `# TYPE`."""
        return self.name + {COUNTER: "_total", INFO: "_info"}.get(self.type, "")

    def of(self, samples: Iterable[Sample]) -> Metric:
        """The family with samples: label values and a number each."""
        make = CounterMetricFamily if self.type == COUNTER else GaugeMetricFamily
        family = make(self.name, self.text, labels=list(self.labels))
        for labels, value in samples:
            family.add_metric(list(labels), value)
        return family

    def one(self, value: float) -> Metric:
        """The family of a series without labels."""
        return self.of([((), value)])

    def info(self, *rows: Mapping[str, str]) -> Metric:
        """The family of an info series: a sample of 1 for each row of labels."""
        family = InfoMetricFamily(self.name, self.text)
        for row in rows:
            family.add_metric([], dict(row))
        return family

    def buckets(self, rows: Iterable[tuple[tuple[str, ...], list[tuple[str, float]], float]]) -> Metric:
        """The family of a histogram: label values, (upper bound, how many are in the bucket) and the sum of all, each."""
        family = HistogramMetricFamily(self.name, self.text, labels=list(self.labels))
        for labels, parts, total in rows:
            below, at_most = 0.0, []
            for bound, number in parts:
                below += number
                at_most.append((floatToGoString(bound), below))
            family.add_metric(list(labels), at_most, total)
        return family


LOOKUP_BLOCKS = Series(
    "tierd_lookup_blocks",
    COUNTER,
    "blocks",
    ("tier",),
    "Blocks asked for by lookups, by where they were.",
    "Summed over `tier` (gpu, cpu, nvme, remote, pending, miss) it is the number of blocks asked for. pending: another session "
    "is "
    "storing it.",
)
SAMPLED_BLOCKS = Series(
    "tierd_sampled_lookup_blocks",
    COUNTER,
    "blocks",
    ("outcome",),
    "Blocks asked for that are in the sample of one hash in 64, by whether they had been asked for before.",
    "seen / (seen + new) estimates the hit rate of a cache that never forgets: no size of the tiers does better. It remembers "
    "about "
    "the last four million blocks of a namespace, since the daemon's start; what it has forgotten makes the estimate lower.",
)
SAVED_TOKENS = Series(
    "tierd_saved_prefill_tokens",
    COUNTER,
    "tokens",
    (),
    "Tokens of the blocks that lookups leased: engines need not compute them.",
    "At most `block_tokens` times the blocks found by `tierd_lookup_blocks_total`. What an engine does not use after all, or "
    "what "
    "fails on its way up, is in it too.",
)
EVICTED_BLOCKS = Series(
    "tierd_evicted_blocks",
    COUNTER,
    "blocks",
    ("tier", "kind"),
    "Blocks that left a tier to make room: clean where another tier has them, drop where none has.",
    "A block that was dropped is a miss until it is stored again.",
)
IDLE = Series(
    "tierd_eviction_idle_seconds",
    HISTOGRAM,
    "seconds",
    ("tier",),
    "How long ago blocks had been used when they left a tier to make room.",
    "Its count is that of evicted blocks, without those that left with their whole segment. What is evicted young is missed "
    "soon.",
)
LIFETIME = Series(
    "tierd_block_lifetime_seconds",
    HISTOGRAM,
    "seconds",
    ("tier",),
    "How long ago blocks had been stored when they left a tier to make room.",
    "Its count is that of `tierd_eviction_idle_seconds`. Blocks that were used together count as stored at the mean of their "
    "times; those of an earlier life of the daemon at their last use in it.",
)
REUSE_GAP = Series(
    "tierd_reuse_gap_seconds",
    HISTOGRAM,
    "seconds",
    (),
    "Time between two lookups of the same block, hit or not, of the sample of one hash in 64.",
    "Its count is `tierd_sampled_lookup_blocks_total` with outcome seen. A tier that evicts blocks younger than most gaps is "
    "too small.",
)
CHECKSUM_FAILURES = Series(
    "tierd_checksum_failures",
    COUNTER,
    "blocks",
    (),
    "Blocks whose bytes on NVMe were not those that were written.",
    "Each is a miss, and its slot is not used again. Equals `tierd_transfer_failed_blocks_total` and "
    "`tierd_scrubbed_blocks_total` with outcome mismatch.",
)
FAILED_BLOCKS = Series(
    "tierd_transfer_failed_blocks",
    COUNTER,
    "blocks",
    ("outcome", "reason"),
    "Blocks whose transfer failed; io_error: the medium refused, mismatch: it returned other bytes.",
    "They are not in `tierd_transfer_bytes_total`; those with outcome mismatch are in `tierd_checksum_failures_total`.",
)
SCRUBBED_BLOCKS = Series(
    "tierd_scrubbed_blocks",
    COUNTER,
    "blocks",
    ("outcome",),
    "Blocks on NVMe that `tierd scrub` has read; ok: they are what was written; io_error and mismatch as above.",
    "Grows only while a pass runs, by at most `nvme.scrub_bytes_per_second`.",
)
PREFETCHED_BLOCKS = Series(
    "tierd_prefetched_blocks",
    COUNTER,
    "blocks",
    ("outcome",),
    "Blocks that prefetches have moved, by what became of them.",
    "late: somebody waited for it before it had come; useful: used in its tier before it left it; wasted: it left unused, or "
    "was not needed any more when it came. What still waits in a tier is in none of them.",
)
INDEX_BLOCKS = Series(
    "tierd_index_blocks",
    GAUGE,
    "blocks",
    (),
    "Blocks known to the prefix trees.",
    "At most the ready slots of all tiers; a block in two tiers counts once.",
)
TURNS = Series(
    "tierd_turns",
    COUNTER,
    "turns",
    ("turn",),
    "Turns that engines said have ended, by why: tool_use, end_turn, stop, length, abort.",
    "Turns of engines that do not say so are not in it.",
)
EVENTS = Series(
    "tierd_events",
    COUNTER,
    "events",
    ("event",),
    "Decisions worth watching, by name.",
    "One that never happened has no sample.",
)

TRANSFER_BYTES = Series(
    "tierd_transfer_bytes",
    COUNTER,
    "bytes",
    ("reason", "source", "target", "path"),
    "Payload bytes that have arrived in another tier.",
    "Failed blocks are not in it. demand: a client waits for it; prefetch; write_back. `path`: direct (O_DIRECT) or buffered "
    "where "
    "one of the tiers is nvme, memory between the others.",
)
TRANSFER_SECONDS = Series(
    "tierd_transfer_thread_seconds",
    COUNTER,
    "seconds",
    ("reason", "source", "target", "path"),
    "Time that io threads were busy with transfers, failed ones included.",
    "Has the labels of `tierd_transfer_bytes_total`: their quotient is the speed of one thread. Its rate, summed, is at most "
    "`nvme.io_threads`.",
)
IO_PATH_BYTES = Series(
    "tierd_io_path_bytes",
    COUNTER,
    "bytes",
    ("path", "direction"),
    "Payload bytes that were written to NVMe (write) or read from it and found right (read), by the way that they took.",
    "posix: host memory, by system calls; kvikio-host: host memory, by kvikio; gds: straight between a GPU and NVMe; bounce: a "
    "GPU's, through a buffer of host memory. Summed over `path` it is what `tierd_transfer_bytes_total` says of "
    "transfers to and "
    "from nvme.",
)
CUFILE_OPERATIONS = Series(
    "tierd_cufile_operations",
    COUNTER,
    "operations",
    ("way", "direction"),
    "Reads and writes of GPU memory that cuFile itself counts, by the way that they took.",
    "0 where GPUDirect Storage is not in use. p2p: the kernel's PCI peer-to-peer DMA; nvfs: nvidia-fs; posix: copied "
    "through host "
    "memory, so gds is not what it seems.",
)
IN_FLIGHT = Series(
    "tierd_transfers_in_flight",
    GAUGE,
    "transfers",
    ("reason",),
    "Transfers that were started and have not ended.",
    "0 when nothing moves. Where it stays up and `tierd_transfer_bytes_total` does not grow, a medium hangs.",
)
PARTS_QUEUED = Series(
    "tierd_transfer_parts_queued",
    GAUGE,
    "parts",
    (),
    "Parts of transfers that wait for an io thread.",
    "Demand goes before prefetch before write-back.",
)
WRITE_BACK_RUNS = Series(
    "tierd_write_back_runs",
    GAUGE,
    "runs",
    (),
    "Runs of committed blocks that wait for a lower tier or are being written to it.",
    "0: everything that was admitted is on NVMe.",
)

USED_BYTES = Series(
    "tierd_tier_used_bytes",
    GAUGE,
    "bytes",
    ("tier",),
    "Bytes of segments that exist, growing or dying ones, directories and padding included.",
    "Counted from before a segment is made until after it is gone; never over the limit.",
)
LIMIT_BYTES = Series(
    "tierd_tier_limit_bytes",
    GAUGE,
    "bytes",
    ("tier",),
    "Bytes that the tier may have: `gpu.bytes`, `cpu.bytes`, `nvme.bytes`. Of several devices each is a tier: gpu0, gpu1.",
    "Constant until the next start; `tierd_tier_used_bytes` is never over it.",
)
REFUSED = Series(
    "tierd_tier_growth_refused",
    GAUGE,
    "0 or 1",
    ("tier",),
    "1 while the tier's medium does not give the segment that was last asked for: a full disk, no memory.",
    "It is tried again every few seconds as long as somebody needs room. New blocks take the place of the coldest meanwhile.",
)
SLOTS = Series(
    "tierd_slots",
    GAUGE,
    "slots",
    ("tier", "state"),
    "Slots of existing segments, by state.",
    "Summed over `state` (free, filling, ready, retired, quarantined) it is the number of slots. filling: being written, or "
    "reserved "
    "as a page; retired: the block is gone from the index and somebody still reads it; quarantined: the medium lied about it.",
)
NVME_FAILURES = Series(
    "tierd_nvme_failures",
    COUNTER,
    "accesses",
    ("reason",),
    "Failed accesses to segment files, by operation and error, such as `read: EIO`, `write: ENOSPC`, `read: digest "
    "differs`; `gpu: EIO` where a GPU did not copy blocks on their way.",
    "One that never happened has no sample.",
)
HANDOVERS = Series(
    "tierd_segment_handovers",
    COUNTER,
    "segments",
    (),
    "Segments that were taken from one namespace and made anew for another.",
    "Blocks that left with them are in `tierd_evicted_blocks_total`, but not in `tierd_eviction_idle_seconds`.",
)
NOT_KEPT = Series(
    "tierd_descriptors_not_kept",
    COUNTER,
    "descriptors",
    ("kind",),
    "Descriptors that the service manager did not take, so that they end with the daemon.",
    "Of a memory segment (two each), which is lost with the daemon, or of a session, whose slots stay held after it.",
)
RECOVERED_ROWS = Series(
    "tierd_recovered_rows",
    GAUGE,
    "rows",
    ("outcome",),
    "Directory rows found at start, by what became of them: kept, or damaged, stale, unfinished, duplicates, orphans.",
    "Constant after the start.",
)

NAMESPACES = Series(
    "tierd_namespaces",
    GAUGE,
    "namespaces",
    (),
    "Namespaces being served.",
    "No client begins one that would make them more than `limits.namespaces_max`.",
)
SESSIONS = Series(
    "tierd_sessions",
    GAUGE,
    "sessions",
    (),
    "Sessions: attached processes, and those of an earlier life that may resume.",
    "At most 64 in each namespace; a session ends with its process.",
)
SESSIONS_OPENED = Series(
    "tierd_sessions_opened",
    COUNTER,
    "sessions",
    (),
    "Sessions opened.",
    "At least `tierd_sessions`, without those of an earlier life; a session that is resumed is not opened again.",
)
LEASES = Series(
    "tierd_leases",
    GAUGE,
    "leases",
    ("kind",),
    "Leases held by sessions, for reading or writing.",
    "0 where `tierd_sessions` is 0. A session that holds `limits.leases_per_session_max` of them is refused another.",
)
REQUESTS = Series(
    "tierd_request_duration_seconds",
    HISTOGRAM,
    "seconds",
    ("verb",),
    "Time from a request's last byte to its answer, waiting included, by verb.",
    "Its count is the number of requests that were understood, without those that were refused at once.",
)
REQUEST_ERRORS = Series(
    "tierd_request_errors",
    COUNTER,
    "requests",
    ("verb", "error"),
    "Requests that were understood and answered with an error (invalid, busy, gone, closed), or not by their deadline (late).",
    "One that never happened has no sample.",
)

NAMESPACE = Series(
    "tierd_namespace",
    INFO,
    "1",
    ("namespace", "domain", "model"),
    "A namespace being served: the beginning of its id, its trust domain and its model.",
    "As many samples as `tierd_namespaces` says, where `metrics.per_namespace` is on; none where it is off.",
)
NAMESPACE_LOOKUPS = Series(
    "tierd_namespace_lookup_blocks",
    COUNTER,
    "blocks",
    ("namespace", "tier"),
    "Blocks asked for by a namespace's lookups, by where they were.",
    "Summed over namespaces at most `tierd_lookup_blocks_total`, which goes on counting those that are forgotten.",
)
NAMESPACE_TOKENS = Series(
    "tierd_namespace_saved_prefill_tokens",
    COUNTER,
    "tokens",
    ("namespace",),
    "Tokens of the blocks that a namespace's lookups leased.",
    "Summed over namespaces at most `tierd_saved_prefill_tokens_total`, which goes on counting those that are forgotten.",
)
NAMESPACE_BYTES = Series(
    "tierd_namespace_used_bytes",
    GAUGE,
    "bytes",
    ("namespace", "tier"),
    "Bytes of a namespace's segments.",
    "Summed over namespaces it is `tierd_tier_used_bytes`, but for segments that are being made or removed.",
)
NAMESPACE_QUOTA = Series(
    "tierd_namespace_quota_bytes",
    GAUGE,
    "bytes",
    ("namespace", "tier", "bound"),
    "What a namespace is promised (min) and the most that it may have (max) of a tier, where it has a quota.",
    "`tierd_namespace_used_bytes` is over `max` only while what was over a new one is being given up.",
)
NAMESPACE_SESSIONS = Series(
    "tierd_namespace_sessions",
    GAUGE,
    "sessions",
    ("namespace",),
    "Sessions of a namespace.",
    "Summed over namespaces it is `tierd_sessions`.",
)

BUILD = Series("tierd_build", INFO, "1", ("version",), "Version of the daemon.", "One sample, constant.")
IO = Series(
    "tierd_io",
    INFO,
    "1",
    ("engine", "path", "gpu"),
    "How NVMe is reached: the io engine (kvikio, posix, none), the path that bytes take (direct, buffered, none) and "
    "the best way "
    "from a GPU (gds, bounce, none).",
    "One sample.",
)
START_TIME = Series(
    "tierd_start_time_seconds", GAUGE, "Unix seconds", (), "When the daemon began to serve.", "All counters begin at 0 with it."
)
LOOP_LAG = Series(
    "tierd_loop_lag_seconds",
    HISTOGRAM,
    "seconds",
    (),
    "How much later than it asked for a callback of the event loop runs, four times a second.",
    "Every request waits as long. Where it is long, the loop's thread has too much to do or gets no processor.",
)
SCRAPES = Series(
    "tierd_scrapes", COUNTER, "scrapes", (), "Scrapes that were answered before this one.", "By the port or by the Unix socket."
)
SCRAPE_SECONDS = Series(
    "tierd_scrape_cpu_seconds",
    COUNTER,
    "CPU seconds",
    (),
    "Processor time of the scrapes that were answered before this one.",
    "Divided by `tierd_scrapes_total` it is what a scrape costs.",
)

BLOCK_SERIES = (
    LOOKUP_BLOCKS,
    SAMPLED_BLOCKS,
    SAVED_TOKENS,
    REUSE_GAP,
    EVICTED_BLOCKS,
    IDLE,
    LIFETIME,
    CHECKSUM_FAILURES,
    FAILED_BLOCKS,
    SCRUBBED_BLOCKS,
    PREFETCHED_BLOCKS,
    INDEX_BLOCKS,
    TURNS,
    EVENTS,
)
TRANSFER_SERIES = (TRANSFER_BYTES, TRANSFER_SECONDS, IO_PATH_BYTES, CUFILE_OPERATIONS, IN_FLIGHT, PARTS_QUEUED, WRITE_BACK_RUNS)
TIER_SERIES = (USED_BYTES, LIMIT_BYTES, REFUSED, SLOTS, NVME_FAILURES, HANDOVERS, NOT_KEPT, RECOVERED_ROWS)
CLIENT_SERIES = (NAMESPACES, SESSIONS, SESSIONS_OPENED, LEASES, REQUESTS, REQUEST_ERRORS)
NAMESPACE_SERIES = (NAMESPACE, NAMESPACE_LOOKUPS, NAMESPACE_TOKENS, NAMESPACE_BYTES, NAMESPACE_QUOTA, NAMESPACE_SESSIONS)
DAEMON_SERIES = (BUILD, IO, START_TIME, LOOP_LAG, SCRAPES, SCRAPE_SECONDS)
SECTIONS = {
    "Blocks": BLOCK_SERIES,
    "Transfers": TRANSFER_SERIES,
    "Tiers": TIER_SERIES,
    "Clients": CLIENT_SERIES,
    "Namespaces": NAMESPACE_SERIES,
    "The daemon": DAEMON_SERIES,
}
SERIES = tuple(series for group in SECTIONS.values() for series in group)

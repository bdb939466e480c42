"""Integrity and clients: what went wrong, who is there, and how the daemon itself is."""

from __future__ import annotations

from typing import Any

from dashboards.panels import Panel, by, graph, only, quantile, rate, stat, total
from dashboards.panels import dashboard as make

REQUESTS = "tierd_request_duration_seconds"
NAMESPACE_LOOKUPS = "tierd_namespace_lookup_blocks_total"


def dashboard() -> dict[str, Any]:
    """For who is called at night."""
    rows = [
        ("Integrity", integrity()),
        ("Clients", clients()),
        ("The daemon", daemon()),
        ("Namespaces (metrics.per_namespace = true)", namespaces()),
    ]
    text = "What went wrong, who is there and what they hold, and how the daemon itself is."
    return make("tierd-clients", "tierd / Integrity and clients", text, rows)


def integrity() -> list[Panel]:
    """Zero is the good value of all of these."""
    return [
        graph(
            "Wrong bytes",
            "short",
            "Blocks a second whose bytes on NVMe were not those that were written. Each was a miss; none was served.",
            by("instance", rate("tierd_checksum_failures_total")),
        ),
        graph(
            "Scrubbed",
            "short",
            "Blocks a second that `tierd scrub` has read, by what it found.",
            by("outcome", rate("tierd_scrubbed_blocks_total")),
        ),
        graph(
            "Failed transfers",
            "short",
            "Blocks a second whose transfer failed. io_error: the medium refused; mismatch: it returned other bytes.",
            by("outcome, reason", rate("tierd_transfer_failed_blocks_total")),
        ),
        graph(
            "Failed accesses to NVMe",
            "short",
            "Accesses a second to segment files that failed, by operation and error. No data: none ever did.",
            by("reason", rate("tierd_nvme_failures_total")),
        ),
        graph(
            "Quarantined slots",
            "short",
            "Slots whose medium lied: not used again until the next start.",
            by("tier", only("tierd_slots", 'state="quarantined"')),
        ),
        graph(
            "Descriptors not kept",
            "short",
            "A second, those that the service manager did not take: memory that the next crash would lose.",
            by("kind", rate("tierd_descriptors_not_kept_total")),
        ),
        graph(
            "Copies found at the last start",
            "short",
            "Of blocks, in kept memory and on NVMe. kept: a hit again; all others were given up, by why.",
            by("outcome", only("tierd_recovered_rows")),
        ),
        graph(
            "Blocks without a place",
            "short",
            "Blocks a second that were committed and not entered, because their parent or their segment had gone meanwhile. "
            "Rare is "
            "normal. No data: none ever was.",
            (total("event", rate("tierd_events_total", 'event=~"commit_.+"')) + " or vector(0)", "{{event}}"),
        ),
    ]


def clients() -> list[Panel]:
    """Who is there, what they ask and what they hold."""
    return [
        graph("Sessions", "short", "Attached engines.", by("instance", only("tierd_sessions")), stack=True),
        graph(
            "Sessions opened",
            "short",
            "A second. Many with few attached: engines crash, or lose the daemon.",
            by("instance", rate("tierd_sessions_opened_total")),
        ),
        graph(
            "Leases",
            "short",
            "Held now. Blocks under a lease can't be evicted; a line that only climbs is an engine that does not let go.",
            by("kind", only("tierd_leases")),
        ),
        graph("Requests", "reqps", "By verb.", by("verb", rate(f"{REQUESTS}_count")), stack=True),
        graph(
            "Latency by verb, 99th percentile",
            "s",
            "Waiting included. A load waits for NVMe; other verbs should not wait.",
            (quantile(0.99, "verb", REQUESTS), "{{verb}}"),
        ),
        graph(
            "Refused requests",
            "reqps",
            "busy: all memory is held; gone: evicted or ended; late: not answered by the client's deadline. Each is a miss, no "
            "failure.",
            by("verb, error", rate("tierd_request_errors_total")),
        ),
        graph(
            "Turns by their end",
            "short",
            "Turns a second whose pages engines let go of (gpu tier), by why they ended.",
            by("turn", rate("tierd_turns_total")),
        ),
    ]


def daemon() -> list[Panel]:
    """The process."""
    return [
        graph(
            "Event-loop lag",
            "s",
            "How much later than asked for a callback runs: every request waits as long.",
            (quantile(0.5, "", "tierd_loop_lag_seconds"), "median"),
            (quantile(0.99, "", "tierd_loop_lag_seconds"), "99 %"),
        ),
        graph(
            "Cost of a scrape",
            "s",
            "Processor time of the daemon for each scrape.",
            (f"{total('', rate('tierd_scrape_cpu_seconds_total'))} / {total('', rate('tierd_scrapes_total'))}", "scrape"),
        ),
        stat(
            "Up since",
            "s",
            "Time since the daemon began to serve; the shortest of the chosen instances.",
            f"min(time() - {only('tierd_start_time_seconds')})",
        ),
        stat(
            "Versions",
            "none",
            "How many daemons of each version.",
            f"count by (version) ({only('tierd_build_info')})",
            "{{version}}",
        ),
        stat(
            "Paths to NVMe",
            "none",
            "How many daemons reach NVMe by which io engine, and past the page cache (direct) or not.",
            f"count by (engine, path) ({only('tierd_io_info')})",
            "{{engine}} {{path}}",
        ),
    ]


def namespaces() -> list[Panel]:
    """Who uses the cache; without the option there is no data, except for their number."""
    hits = total("namespace", rate(NAMESPACE_LOOKUPS, 'tier=~"gpu|cpu|nvme"'))
    return [
        graph("Namespaces", "short", "Being served.", by("instance", only("tierd_namespaces"))),
        graph(
            "Hit rate by namespace",
            "percentunit",
            "Share of the blocks asked for that were in a tier.",
            (f"{hits} / {total('namespace', rate(NAMESPACE_LOOKUPS))}", "{{namespace}}"),
        ),
        graph(
            "Prefill tokens saved by namespace",
            "short",
            "Tokens a second that engines need not compute.",
            by("namespace", rate("tierd_namespace_saved_prefill_tokens_total")),
            stack=True,
        ),
        graph(
            "Bytes by namespace",
            "bytes",
            "Segments that it has, by tier.",
            by("namespace, tier", only("tierd_namespace_used_bytes")),
            stack=True,
        ),
        graph(
            "Quotas by namespace",
            "bytes",
            "What it is promised (min) and may have at most (max), by tier; `tierd quota` sets them.",
            by("namespace, tier, bound", only("tierd_namespace_quota_bytes")),
        ),
        graph(
            "Sessions by namespace and model",
            "short",
            "Attached engines.",
            (
                f"sum by (namespace, model) ({only('tierd_namespace_sessions')} * on (job, instance, namespace) "
                f"group_left (model) {only('tierd_namespace_info')})",
                "{{model}} {{namespace}}",
            ),
        ),
    ]

"""Recording and alert rules for Prometheus.

An alert says what is wrong (summary), what it means (description) and where to read on: a section of dashboards/runbook.md, at
the place where the Debian package puts it.
Nothing here names a job but the two that ask whether a daemon is there: they expect `job="tierd"`, as in prometheus/scrape.yml.
"""

from __future__ import annotations

from typing import Any, NamedTuple

RUNBOOK = "/usr/share/tierd/dashboards/runbook.md"
BY = "job, instance"
HIT = 'tier=~"gpu|cpu|nvme"'
RECORDED = {
    "instance_tier:tierd_lookup_blocks:rate5m": f"sum by ({BY}, tier) (rate(tierd_lookup_blocks_total[5m]))",
    "instance:tierd_lookup_blocks:rate5m": f"sum by ({BY}) (rate(tierd_lookup_blocks_total[5m]))",
    "instance:tierd_hit:ratio_rate5m": f"sum by ({BY}) (rate(tierd_lookup_blocks_total{{{HIT}}}[5m])) "
    f"/ (sum by ({BY}) (rate(tierd_lookup_blocks_total[5m])) > 0)",
    "instance:tierd_hit:ratio_rate1h": f"sum by ({BY}) (rate(tierd_lookup_blocks_total{{{HIT}}}[1h])) "
    f"/ (sum by ({BY}) (rate(tierd_lookup_blocks_total[1h])) > 0)",
    "instance:tierd_possible_hit:ratio_rate1h": f"sum by ({BY}) "
    '(rate(tierd_sampled_lookup_blocks_total{outcome="seen"}[1h])) '
    f"/ (sum by ({BY}) (rate(tierd_sampled_lookup_blocks_total[1h])) > 0)",
    "instance:tierd_saved_prefill_tokens:rate5m": f"sum by ({BY}) (rate(tierd_saved_prefill_tokens_total[5m]))",
    "instance_verb:tierd_request_seconds:p99_5m": f"histogram_quantile(0.99, sum by ({BY}, verb, le) "
    "(rate(tierd_request_duration_seconds_bucket[5m])))",
    "instance:tierd_loop_lag_seconds:p99_5m": f"histogram_quantile(0.99, sum by ({BY}, le) "
    "(rate(tierd_loop_lag_seconds_bucket[5m])))",
    "instance_tier:tierd_used:ratio": f"sum by ({BY}, tier) (tierd_tier_used_bytes) "
    f"/ (sum by ({BY}, tier) (tierd_tier_limit_bytes) > 0)",
    "instance_way:tierd_transfer_bytes:rate5m": f"sum by ({BY}, reason, source, target) (rate(tierd_transfer_bytes_total[5m]))",
}


class Alert(NamedTuple):
    """One alert. `wait` is how long its expression must be true."""

    name: str
    severity: str
    expression: str
    wait: str
    summary: str
    description: str


ALERTS = (
    Alert(
        "TierdDown",
        "critical",
        'up{job="tierd"} == 0',
        "1m",
        "tierd on {{ $labels.instance }} does not answer.",
        "Prometheus could not scrape it for a minute. Engines go on as if every lookup missed: requests are slower, none "
        "fails.",
    ),
    Alert(
        "TierdAbsent",
        "warning",
        'absent(up{job="tierd"})',
        "10m",
        "Prometheus knows no tierd.",
        "No target has the job tierd. Nothing else here can fire.",
    ),
    Alert(
        "TierdRestarts",
        "warning",
        "changes(tierd_start_time_seconds[15m]) > 2",
        "0m",
        "tierd on {{ $labels.instance }} has started {{ $value }} times in 15 minutes.",
        "It crashes or is killed again and again. Each time blocks that are not on NVMe may be lost.",
    ),
    Alert(
        "TierdTierCannotGrow",
        "warning",
        "tierd_tier_growth_refused == 1",
        "1m",
        "The {{ $labels.tier }} tier of {{ $labels.instance }} does not get the room that it was configured for.",
        "Its medium refuses segments below the tier's limit: the disk is full, or there is no memory. What it has goes on to "
        "work.",
    ),
    Alert(
        "TierdNvmeFailures",
        "warning",
        "sum by (job, instance, reason) (increase(tierd_nvme_failures_total[10m])) > 0",
        "5m",
        "Accesses to NVMe fail on {{ $labels.instance }}: {{ $labels.reason }}.",
        "Each is a miss or a block that is not written. The disk, its file system or its cable may be failing.",
    ),
    Alert(
        "TierdWrongBytes",
        "critical",
        "increase(tierd_checksum_failures_total[1h]) > 0",
        "0m",
        "NVMe of {{ $labels.instance }} returned other bytes than were written.",
        "No wrong byte was served: each was a miss and its slot is quarantined. A disk or memory that does so is failing.",
    ),
    Alert(
        "TierdQuarantine",
        "warning",
        f'sum by ({BY}, tier) (tierd_slots{{state="quarantined"}}) / (sum by ({BY}, tier) (tierd_slots) > 0) > 0.01',
        "5m",
        "{{ $value | humanizePercentage }} of the {{ $labels.tier }} slots of {{ $labels.instance }} are quarantined.",
        "Its medium has lied about more than one slot in a hundred since the start.",
    ),
    Alert(
        "TierdDropsBlocks",
        "warning",
        f'sum by ({BY}) (rate(tierd_evicted_blocks_total{{tier!="nvme", kind="drop"}}[10m])) '
        f'/ (sum by ({BY}) (rate(tierd_evicted_blocks_total{{tier!="nvme"}}[10m])) > 0) > 0.2 '
        f'and on ({BY}) tierd_tier_limit_bytes{{tier="nvme"}} > 0',
        "15m",
        "{{ $value | humanizePercentage }} of the blocks evicted from memory on {{ $labels.instance }} are lost.",
        "They leave memory before they are on NVMe: more is stored than the disk can take.",
    ),
    Alert(
        "TierdSlowLookups",
        "warning",
        'instance_verb:tierd_request_seconds:p99_5m{verb="lookup"} > 0.05',
        "10m",
        "Lookups on {{ $labels.instance }} take up to {{ $value | humanizeDuration }}.",
        "The 99th percentile is over 50 ms, where 1 ms is usual. Every request of an engine begins with one.",
    ),
    Alert(
        "TierdLoopLag",
        "warning",
        "instance:tierd_loop_lag_seconds:p99_5m > 0.1",
        "10m",
        "The event loop of {{ $labels.instance }} runs {{ $value | humanizeDuration }} late.",
        "Every request waits as long. The daemon's thread has too much to do or gets no processor.",
    ),
    Alert(
        "TierdRefusesWork",
        "warning",
        f'sum by ({BY}) (rate(tierd_request_errors_total{{error=~"busy|late"}}[10m])) '
        f"/ (sum by ({BY}) (rate(tierd_request_duration_seconds_count[10m])) > 0) > 0.05",
        "10m",
        "{{ $value | humanizePercentage }} of the requests on {{ $labels.instance }} are refused as busy or late.",
        "All memory is held by leases, or a limit is reached. Engines take it as misses.",
    ),
    Alert(
        "TierdTooSmall",
        "info",
        f"instance:tierd_hit:ratio_rate1h < 0.5 * instance:tierd_possible_hit:ratio_rate1h "
        f"and on ({BY}) instance:tierd_possible_hit:ratio_rate1h > 0.2 "
        f"and on ({BY}) instance:tierd_lookup_blocks:rate5m > 10",
        "2h",
        "tierd on {{ $labels.instance }} finds {{ $value | humanizePercentage }}, less than half of what is possible.",
        "More than half of the blocks that were seen before had been evicted. Larger tiers would find them.",
    ),
    Alert(
        "TierdNotKept",
        "warning",
        "increase(tierd_descriptors_not_kept_total[1h]) > 0",
        "0m",
        "The service manager does not keep all memory of {{ $labels.instance }}.",
        "What it did not take ({{ $labels.kind }}) is lost when the daemon ends: FileDescriptorStoreMax= is too low.",
    ),
)


def rules() -> dict[str, Any]:
    """The rule file."""
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": alert.wait,
            "labels": {"severity": alert.severity},
            "annotations": shown(alert),
        }
        for alert in ALERTS
    ]
    recorded = [{"record": name, "expr": expression} for name, expression in RECORDED.items()]
    return {"groups": [{"name": "tierd-records", "rules": recorded}, {"name": "tierd-alerts", "rules": alerts}]}


def shown(alert: Alert) -> dict[str, str]:
    """What is shown with it."""
    return {
        "summary": alert.summary,
        "description": alert.description,
        "runbook": f"{RUNBOOK}#{alert.name.lower()}",
    }

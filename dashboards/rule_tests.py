"""Unit tests of the alert rules for `promtool test rules`: each alert is quiet while all is well, fires, and resolves.

A case is what Prometheus sees, minute by minute in promtool's notation, when nothing must fire (where the alert has to wait:
while it does), when the alert must fire and with which labels, and when it must be over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dashboards.rules import ALERTS, shown

AT = 'job="tierd", instance="box:9475"'
WHERE = {"job": "tierd", "instance": "box:9475"}


class Case(NamedTuple):
    """One alert. `quiet`, `fires` and `over` are minutes; `value` is what its text shows."""

    series: dict[str, str]
    quiet: int
    fires: int
    over: int
    labels: dict[str, str] = WHERE
    value: str = ""


def of(name: str, *labels: str) -> str:
    """A series of the one daemon."""
    return f"{name}{{{', '.join((AT, *labels))}}}"


def lookups(hits: str, misses: str, seen: str, new: str) -> dict[str, str]:
    """Blocks asked for, and those of the sample."""
    return {
        of("tierd_lookup_blocks_total", 'tier="cpu"'): hits,
        of("tierd_lookup_blocks_total", 'tier="miss"'): misses,
        of("tierd_sampled_lookup_blocks_total", 'outcome="seen"'): seen,
        of("tierd_sampled_lookup_blocks_total", 'outcome="new"'): new,
    }


def slow(bucket: str, name: str, *labels: str) -> dict[str, str]:
    """A histogram whose observations are all below 1 ms for half an hour, then all in a higher bucket, then below again."""
    low = "0+600x30 18000+0x40 18000+600x60"
    return {
        of(name, *labels, 'le="0.001"'): low,
        of(name, *labels, f'le="{bucket}"'): "0+600x130",
        of(name, *labels, 'le="+Inf"'): "0+600x130",
    }


CASES = {
    "TierdDown": Case({f"up{{{AT}}}": "1x4 0x5 1x9"}, 5, 7, 11),
    "TierdAbsent": Case({f"up{{{AT}}}": "1x4 _x25 1x20"}, 12, 25, 35, {"job": "tierd"}),
    "TierdRestarts": Case({of("tierd_start_time_seconds"): "1x20 2 3 4 4x40"}, 21, 25, 50, value="3"),
    "TierdTierCannotGrow": Case(
        {
            of("tierd_tier_growth_refused", 'tier="nvme"'): "0x5 1x9 0x9",
            of("tierd_tier_growth_refused", 'tier="cpu"'): "0x30",
        },
        6,
        10,
        17,
        {**WHERE, "tier": "nvme"},
    ),
    "TierdNvmeFailures": Case(
        {of("tierd_nvme_failures_total", 'reason="read: EIO"'): "3x10 4 5 6 7 8 9 9x40"},
        14,
        18,
        40,
        {**WHERE, "reason": "read: EIO"},
    ),
    "TierdWrongBytes": Case({of("tierd_checksum_failures_total"): "0x10 1x100"}, 10, 30, 75),
    "TierdQuarantine": Case(
        {
            of("tierd_slots", 'tier="nvme", state="ready"'): "96x60",
            of("tierd_slots", 'tier="nvme", state="quarantined"'): "0x10 4x20 0x30",
        },
        12,
        20,
        35,
        {**WHERE, "tier": "nvme"},
        "4%",
    ),
    "TierdDropsBlocks": Case(
        {
            of("tierd_tier_limit_bytes", 'tier="nvme"'): "1000x120",
            of("tierd_evicted_blocks_total", 'tier="cpu", kind="clean"'): "0+600x120",
            of("tierd_evicted_blocks_total", 'tier="cpu", kind="drop"'): "0x10 0+600x40 24000x70",
        },
        14,
        40,
        65,
        value="50%",
    ),
    "TierdSlowLookups": Case(
        slow("0.1", "tierd_request_duration_seconds_bucket", 'verb="lookup"'),
        38,
        55,
        90,
        {**WHERE, "verb": "lookup"},
        "99.01ms",
    ),
    "TierdLoopLag": Case(slow("0.5", "tierd_loop_lag_seconds_bucket"), 38, 55, 90, value="495ms"),
    "TierdRefusesWork": Case(
        {
            of("tierd_request_errors_total", 'verb="store", error="busy"'): "0x10 0+100x40 4000x60",
            of("tierd_request_errors_total", 'verb="load", error="gone"'): "0+500x120",
            of("tierd_request_duration_seconds_count", 'verb="store"'): "0+1000x120",
        },
        22,
        40,
        65,
        value="10%",
    ),
    "TierdTooSmall": Case(
        lookups("0+6000x60 360000+600x300 540000+6000x240", "0+600x60 36000+6000x300 1836000+600x240", "0+90x600", "0+10x600"),
        120,
        300,
        480,
        value="9.091%",
    ),
    "TierdNotKept": Case(
        {of("tierd_descriptors_not_kept_total", 'kind="segment"'): "0x10 2x100"}, 10, 30, 75, {**WHERE, "kind": "segment"}
    ),
}


def rule_tests() -> dict[str, Any]:
    """promtool's test file."""
    by_name = {alert.name: alert for alert in ALERTS}
    tests = []
    for name, case in CASES.items():
        alert = by_name[name]
        texts = {
            label: filled(text, case.labels, case.value) if label != "runbook" else text for label, text in shown(alert).items()
        }
        fired = {"exp_labels": {"severity": alert.severity, **case.labels}, "exp_annotations": texts}
        expected: tuple[tuple[int, list[dict[str, Any]]], ...] = ((case.quiet, []), (case.fires, [fired]), (case.over, []))
        tests.append(
            {
                "name": name,
                "interval": "1m",
                "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
                "alert_rule_test": [
                    {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": alerts} for minute, alerts in expected
                ],
            }
        )
    return {"rule_files": ["tierd-rules.yml"], "evaluation_interval": "1m", "tests": tests}


def filled(text: str, labels: dict[str, str], value: str) -> str:
    """An annotation as Prometheus shows it."""
    for name, text_of in labels.items():
        text = text.replace(f"{{{{ $labels.{name} }}}}", text_of)
    for show in ("$value", "$value | humanizePercentage", "$value | humanizeDuration"):
        text = text.replace(f"{{{{ {show} }}}}", value)
    return text

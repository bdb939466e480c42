"""What the connector counts, on vLLM's own `/metrics` and in its log. Each series is declared once, in SERIES."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter

from tierd_engine.connectors.vllm.api import KVConnectorPromMetrics, KVConnectorStats

SERIES = {
    "lookups": ("vllm:tierd_lookups", "Prefixes looked up in tierd.", None),
    "lookup_seconds": ("vllm:tierd_lookup_seconds", "Time the scheduler waited for look-ups.", None),
    "lookup_blocks": ("vllm:tierd_lookup_blocks", "Full blocks of prompts that were looked up: hit + miss.", "result"),
    "load_blocks": ("vllm:tierd_load_blocks", "Blocks that requests waited for: loaded + failed.", "result"),
    "load_seconds": ("vllm:tierd_load_seconds", "Time of worker threads in loads.", None),
    "save_blocks": (
        "vllm:tierd_save_blocks",
        "Full blocks, each time they are offered: stored + present + refused + skipped.",
        "result",
    ),
    "save_seconds": ("vllm:tierd_save_seconds", "Time of worker threads in saves.", None),
    "copied_bytes": ("vllm:tierd_copied_bytes", "Bytes copied: loaded + stored.", "direction"),
}
"""By the name used here: name of the counter, help, and the label that its amounts have."""


class TierdStats(KVConnectorStats):
    """Amounts of one interval, by (name in SERIES, value of its label or ""), as `name/value` since it crosses processes."""

    def count(self, name: str, amount: float = 1, value: str = "") -> None:
        """Add to one amount."""
        if amount:
            key = f"{name}/{value}"
            self.data[key] = self.data.get(key, 0) + amount

    def reset(self) -> None:
        """Begin anew."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> TierdStats:
        """Add another's amounts."""
        for key, amount in other.data.items():
            self.data[key] = self.data.get(key, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        return {f"tierd {key.rstrip('/')}": round(amount, 4) for key, amount in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.data


class TierdMetrics(KVConnectorPromMetrics):
    """The counters of SERIES, one child for each engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._counters = {
            name: counter(name=series, documentation=text, labelnames=[*labelnames, *([label] if label else [])])
            for name, (series, text, label) in SERIES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval's amounts."""
        for key, amount in transfer_stats_data.items():
            name, _, value = key.partition("/")
            labels = [*self.per_engine_labelvalues[engine_idx], *([value] if value else [])]
            self._counters[name].labels(*labels).inc(amount)

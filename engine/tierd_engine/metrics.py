"""What /metrics shows: every series is declared here, and read from the engine's own counts when somebody asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tierd_engine.engine import Engine

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
COUNTERS = {
    "steps": ("steps", "Forward passes."),
    "steps_waited": ("steps_waited", "Steps in which a sequence had no page for its next token."),
    "preemptions": ("preemptions", "Sequences that gave their pages to older ones and waited again."),
    "loads_declined": ("loads_declined", "Loads that would have taken longer than computing, or did."),
    "prefill_tokens": ("prefill_tokens", "Prompt tokens computed."),
    "decode_tokens": ("decode_tokens", "Generated tokens whose KV was computed."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that ran."),
    "hit_tokens": ("hit_tokens", "Prompt tokens whose KV was there when their request ran."),
}


class EngineCollector(Collector):
    """Reads an engine from another thread: single numbers, each true at some moment of late."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All series."""
        scheduler, memory = self._engine.scheduler, self._engine.memory.statistics()
        for name, (attribute, text) in COUNTERS.items():
            yield CounterMetricFamily(f"tierd_engine_{name}", text, getattr(scheduler.counts, attribute))
        ended = CounterMetricFamily("tierd_engine_sequences", "Sequences that ended, by reason.", labels=["reason"])
        for reason, count in dict(scheduler.counts.sequences).items():
            ended.add_metric([reason], count)
        yield ended
        hits = CounterMetricFamily("tierd_engine_blocks_looked_up", "Blocks looked up, by where they were.", labels=["tier"])
        for key, count in memory.items():
            if key.startswith("hit_"):
                hits.add_metric([key.removeprefix("hit_")], count)
        yield hits
        gauges = {
            "sequences_waiting": ("Sequences in the queue.", len(scheduler.waiting)),
            "sequences_running": ("Sequences in the batch.", len(scheduler.running)),
            "pages": ("KV pages of the engine's own.", self._engine.memory.count),
            "pages_free": ("Own KV pages that nobody holds.", memory["pages_free"]),
            "prefill_tokens_per_second": ("Measured speed of prefill.", scheduler.prefill_tokens_per_second),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"tierd_engine_{name}", text, value)


class Metrics:
    """The registry, and what is observed rather than counted."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self.first_token_seconds = Histogram(
            "tierd_engine_first_token_seconds", "From arrival to first token.", buckets=SECONDS, registry=self.registry
        )
        self.request_seconds = Histogram(
            "tierd_engine_request_seconds", "From arrival to the end of an answer.", buckets=SECONDS, registry=self.registry
        )

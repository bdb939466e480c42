"""Every series that tierd exports: declared once, here, with unit and help.

Counters live where the work is done; a scrape only reads them. Lookups by tier sum to the blocks asked for; slots by state sum
to the slots of a tier; bytes are counted when they have arrived.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from tierd import __version__
from tierd.keeper import Keeper
from tierd.space import Space

REQUEST_BUCKETS = (2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0, 5.0, 10.0)
LOOKUP_TIERS = ("gpu", "cpu", "nvme", "remote", "pending", "miss")


class Metrics(Collector):
    """The daemon's registry. `failures()` gives counts of failed medium accesses by reason, `io` the engine and its path."""

    def __init__(self, keeper: Keeper, io: tuple[str, str], adopted: dict[str, int]) -> None:
        self._keeper, self._io, self._adopted = keeper, io, adopted
        self.ended: Counter[tuple[str, ...]] = Counter()
        """Counters of spaces that are gone, so that nothing ever counts down."""
        self.errors: Counter[tuple[str, str]] = Counter()
        self.sessions_total = 0
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.requests = Histogram(
            "tierd_request_duration_seconds",
            "Time from a request's last byte to its answer, by verb.",
            ["verb"],
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )

    def counters(self) -> Counter[tuple[str, ...]]:
        """The sums of all spaces' counters."""
        total = Counter(self.ended)
        for space in list(self._keeper.spaces.values()):
            total.update(dict(space.cache.counters))
        return total

    def collect(self) -> Iterable[Metric]:
        """Called by a scrape, in the exporter's thread."""
        counters = self.counters()
        spaces = list(self._keeper.spaces.values())
        yield InfoMetricFamily("tierd_build", "Version of the daemon.", value={"version": __version__})
        yield InfoMetricFamily("tierd_io", "How NVMe is reached.", value={"engine": self._io[0], "path": self._io[1]})
        yield from _from_counters(counters)
        yield from self._moved()
        yield from self._tiers(spaces)
        yield from self._clients(spaces)

    def _moved(self) -> Iterable[Metric]:
        mover = self._keeper.mover
        moved = CounterMetricFamily(
            "tierd_transfer_bytes", "Payload bytes moved between tiers.", labels=["reason", "source", "target", "path"]
        )
        for (reason, source, target), count in list(mover.moved.items()):
            moved.add_metric([reason, source, target, self._io[1]], count)
        yield moved
        seconds = CounterMetricFamily("tierd_transfer_thread_seconds", "Time io threads were busy.", labels=["reason"])
        flying = GaugeMetricFamily("tierd_transfers_in_flight", "Transfers under way.", labels=["reason"])
        for reason, number in list(mover.in_flight.items()):
            flying.add_metric([reason], number)
            seconds.add_metric([reason], mover.seconds[reason])
        yield seconds
        yield flying
        yield GaugeMetricFamily("tierd_transfer_parts_queued", "Parts of transfers waiting for an io thread.", mover.queued)
        yield GaugeMetricFamily(
            "tierd_write_back_runs", "Runs to be written or being written to NVMe.", self._keeper.unwritten()
        )

    def _tiers(self, spaces: list[Space]) -> Iterable[Metric]:
        used = GaugeMetricFamily(
            "tierd_tier_used_bytes", "Bytes of segments that exist, growing or dying ones included.", labels=["tier"]
        )
        most = GaugeMetricFamily("tierd_tier_limit_bytes", "Bytes that the tier may have.", labels=["tier"])
        slots = GaugeMetricFamily("tierd_slots", "Slots by state.", labels=["tier", "state"])
        for at, tier in enumerate(self._keeper.tiers):
            used.add_metric([tier.name], tier.budget.used)
            most.add_metric([tier.name], tier.budget.most)
            states: Counter[str] = Counter()
            for space in spaces:
                states.update(space.arenas[at].pool.counts())
            for state, number in states.items():
                slots.add_metric([tier.name, state], number)
        yield from (used, most, slots)
        failures: Counter[str] = Counter()
        for space in spaces:
            for segment in list(space.lower.segments.values()) if space.lower else ():
                failures.update(segment.failures)
        failed = CounterMetricFamily("tierd_nvme_failures", "Failed accesses to NVMe segments, by reason.", labels=["reason"])
        for reason, number in failures.items():
            failed.add_metric([reason], number)
        yield failed
        recovered = CounterMetricFamily(
            "tierd_recovered_rows", "Directory rows found at start, by what became of them.", labels=["outcome"]
        )
        for outcome, number in self._adopted.items():
            recovered.add_metric([outcome], number)
        yield recovered
        yield CounterMetricFamily("tierd_segment_handovers", "Segments that changed their namespace.", self._keeper.handovers)

    def _clients(self, spaces: list[Space]) -> Iterable[Metric]:
        sessions = [session for space in spaces for session in list(space.cache.sessions.values())]
        leases = [lease for session in sessions for lease in list(session.leases.values())]
        yield GaugeMetricFamily("tierd_namespaces", "Namespaces being served.", len(spaces))
        yield GaugeMetricFamily("tierd_sessions", "Attached sessions.", len(sessions))
        yield CounterMetricFamily("tierd_sessions_opened", "Sessions opened.", self.sessions_total)
        held = GaugeMetricFamily("tierd_leases", "Leases held.", labels=["kind"])
        held.add_metric(["writing"], sum(lease.writing for lease in leases))
        held.add_metric(["reading"], sum(not lease.writing for lease in leases))
        yield held
        yield GaugeMetricFamily("tierd_index_blocks", "Blocks in the prefix trees.", sum(s.cache.index.blocks for s in spaces))
        errors = CounterMetricFamily("tierd_request_errors", "Requests answered with an error.", labels=["verb", "error"])
        for (verb, error), number in list(self.errors.items()):
            errors.add_metric([verb, error], number)
        yield errors


def _from_counters(counters: Counter[tuple[str, ...]]) -> Iterable[Metric]:
    lookups = CounterMetricFamily("tierd_lookup_blocks", "Blocks asked for by lookups, by where they were.", labels=["tier"])
    for tier in LOOKUP_TIERS:
        lookups.add_metric([tier], counters["lookup", tier])
    evicted = CounterMetricFamily(
        "tierd_evicted_blocks", "Blocks evicted: clean where another tier has them.", labels=["tier", "kind"]
    )
    failed = CounterMetricFamily("tierd_transfer_failed_blocks", "Blocks whose transfer failed.", labels=["outcome", "reason"])
    events = CounterMetricFamily("tierd_events", "Decisions worth watching, by name.", labels=["event"])
    mismatches = 0
    for name, number in counters.items():
        match name:
            case ("evicted", tier, kind):
                evicted.add_metric([tier, kind], number)
            case ("failed", outcome, reason):
                failed.add_metric([outcome, reason], number)
                mismatches += number if outcome == "mismatch" else 0
            case (event,):
                events.add_metric([event], number)
    yield from (lookups, evicted, failed, events)
    yield CounterMetricFamily("tierd_checksum_failures", "Blocks whose bytes were not those that were written.", mismatches)

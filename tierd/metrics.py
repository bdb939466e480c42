"""Every series that tierd exports: declared once, here, with unit and help; `docs/metrics.md` says what each is good for.

Counters live where the work is done; a scrape only reads them. Lookups by tier sum to the blocks asked for; slots by state sum
to the slots of a tier; bytes are counted when they have arrived. A series whose labels are known beforehand begins at 0, so
that its first event is an increase.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations, permutations
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from tierd import __version__
from tierd.core.ladder import CLOSED, TIERS
from tierd.core.plan import REASONS, WRITE_BACK
from tierd.keeper import Keeper
from tierd.space import Space
from tierd.tiers.io import Io, cufile
from tierd.tiers.paths import DIRECTIONS, GDS
from tierd.tiers.tier import MemoryTier, NvmeTier
from tierd.wire.messages import TURN_ENDS

REQUEST_BUCKETS = (2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0, 5.0, 10.0)
LOOKUP_TIERS = (*TIERS, "remote", "pending", "miss")
EVICTIONS = ("clean", "drop")
FAILURES = ("io_error", "mismatch")
Sample = tuple[tuple[str, ...], float]

disable_created_metrics()  # when a counter was made says nothing: all of them begin with the daemon


class Metrics(Collector):
    """The daemon's registry. `io` names the engine and path to NVMe, `adopted` counts what became of an earlier life's rows."""

    def __init__(self, keeper: Keeper, io: Io, adopted: Mapping[str, int]) -> None:
        self._keeper, self._io, self._adopted = keeper, io, adopted
        self.errors: Counter[tuple[str, str]] = Counter()
        """Refused requests by verb and error."""
        self.sessions_total = 0
        self.sessions_not_kept = 0
        """Sessions whose process the service manager did not take."""
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
        total = Counter(self._keeper.forgotten)
        for space in list(self._keeper.spaces.values()):
            total.update(dict(space.cache.counters))
        return total

    def collect(self) -> Iterable[Metric]:
        """Called by a scrape, in the exporter's thread."""
        spaces = list(self._keeper.spaces.values())
        yield InfoMetricFamily("tierd_build", "Version of the daemon.", value={"version": __version__})
        yield InfoMetricFamily("tierd_io", "How NVMe is reached.", value=self._io._asdict())
        yield from self._blocks(self.counters())
        yield from self._moved()
        yield from self._tiers(spaces)
        yield from self._clients(spaces)

    def _blocks(self, counters: Counter[tuple[str, ...]]) -> Iterable[Metric]:
        """What was asked for, what had to go and what failed, in blocks."""
        tiers = [tier.name for tier in self._keeper.tiers]
        lookups = [((tier,), counters["lookup", tier]) for tier in LOOKUP_TIERS]
        evicted = [((tier, kind), counters["evicted", tier, kind]) for tier in tiers for kind in EVICTIONS]
        failed = [((kind, reason), counters["failed", kind, reason]) for kind in FAILURES for reason in REASONS]
        events = [(name, number) for name, number in counters.items() if len(name) == 1]
        turns = [((turn,), counters["turn", turn]) for turn in TURN_ENDS]
        yield counter("tierd_lookup_blocks", "Blocks asked for by lookups, by where they were.", ["tier"], lookups)
        text = "Blocks evicted: clean where another tier has them, drop where none has."
        yield counter("tierd_evicted_blocks", text, ["tier", "kind"], evicted)
        yield counter("tierd_transfer_failed_blocks", "Blocks whose transfer failed.", ["outcome", "reason"], failed)
        wrong = sum(number for (kind, _), number in failed if kind == "mismatch")
        text = "Blocks whose bytes were not those that were written."
        yield counter("tierd_checksum_failures", text, [], [((), wrong)])
        yield counter("tierd_turns", "Turns that engines said have ended, by why.", ["turn"], turns)
        yield counter("tierd_events", "Decisions worth watching, by name.", ["event"], events)

    def _moved(self) -> Iterable[Metric]:
        """What the io threads did and do."""
        mover, path = self._keeper.mover, self._io.path
        names = [tier.name for tier in self._keeper.tiers]
        down = [(WRITE_BACK, *way) for way in combinations(names, 2)]
        ways = [(reason, *way) for reason in REASONS if reason != WRITE_BACK for way in permutations(names, 2)]
        ways = down + [way for way in ways if way[2] != CLOSED]
        moved = [((*way, path if CLOSED in way else "memory"), mover.moved[way]) for way in ways]
        paths = [tier.paths for tier in self._keeper.tiers if isinstance(tier, NvmeTier)]
        taken = [((path, way), one.bytes[path, way]) for one in paths for path in one.names for way in DIRECTIONS]
        seconds = [((reason,), mover.seconds.get(reason, 0.0)) for reason in REASONS]
        flying = [((reason,), mover.in_flight[reason]) for reason in REASONS]
        text = "Payload bytes that have arrived in another tier."
        yield counter("tierd_transfer_bytes", text, ["reason", "source", "target", "path"], moved)
        text = "Payload bytes that were read from and written to NVMe, by the way that they took."
        yield counter("tierd_io_path_bytes", text, ["path", "direction"], taken)
        counted = (cufile.operations() if self._io.gpu == GDS else None) or Counter()
        operations = [((way, direction), counted[way, direction]) for way in cufile.WAYS for direction in DIRECTIONS]
        text = "Reads and writes of GPU memory, by the way that cuFile says they took."
        yield counter("tierd_cufile_operations", text, ["way", "direction"], operations)
        yield counter("tierd_transfer_thread_seconds", "Time that io threads were busy.", ["reason"], seconds)
        yield gauge("tierd_transfers_in_flight", "Transfers under way.", ["reason"], flying)
        text = "Parts of transfers that wait for an io thread."
        yield gauge("tierd_transfer_parts_queued", text, [], [((), mover.queued)])
        text = "Runs of blocks that wait for NVMe or are being written to it."
        yield gauge("tierd_write_back_runs", text, [], [((), self._keeper.unwritten())])

    def _tiers(self, spaces: list[Space]) -> Iterable[Metric]:
        """How full the tiers are, and how their media do."""
        keeper = self._keeper
        used = [((tier.name,), tier.budget.used) for tier in keeper.tiers]
        most = [((tier.name,), tier.budget.most) for tier in keeper.tiers]
        slots = [
            ((tier.name, state), number)
            for at, tier in enumerate(keeper.tiers)
            for state, number in slots_by_state(spaces, at).items()
        ]
        failures = [((reason,), number) for reason, number in keeper.nvme_failures().items()]
        adopted = [((outcome,), number) for outcome, number in self._adopted.items()]
        text = "Bytes of segments that exist, growing or dying ones included."
        yield gauge("tierd_tier_used_bytes", text, ["tier"], used)
        yield gauge("tierd_tier_limit_bytes", "Bytes that the tier may have.", ["tier"], most)
        yield gauge("tierd_slots", "Slots of existing segments, by state.", ["tier", "state"], slots)
        yield counter("tierd_nvme_failures", "Failed accesses to NVMe segments, by reason.", ["reason"], failures)
        text = "Directory rows found at start, by what became of them."
        yield counter("tierd_recovered_rows", text, ["outcome"], adopted)
        segments = sum(tier.not_kept for tier in keeper.tiers if isinstance(tier, MemoryTier))
        not_kept = [(("segment",), segments), (("session",), self.sessions_not_kept)]
        text = "Descriptors that the service manager did not take, so that they end with the daemon."
        yield counter("tierd_descriptors_not_kept", text, ["kind"], not_kept)
        text = "Segments that were taken from one namespace for another."
        yield counter("tierd_segment_handovers", text, [], [((), keeper.handovers)])

    def _clients(self, spaces: list[Space]) -> Iterable[Metric]:
        """Who is there, and what they hold."""
        sessions = [session for space in spaces for session in list(space.cache.sessions.values())]
        leases = [lease for session in sessions for lease in list(session.leases.values())]
        writing = sum(lease.writing for lease in leases)
        held = [(("writing",), writing), (("reading",), len(leases) - writing)]
        blocks = sum(space.cache.index.blocks for space in spaces)
        yield gauge("tierd_namespaces", "Namespaces being served.", [], [((), len(spaces))])
        yield gauge("tierd_sessions", "Attached sessions.", [], [((), len(sessions))])
        yield counter("tierd_sessions_opened", "Sessions opened.", [], [((), self.sessions_total)])
        yield gauge("tierd_leases", "Leases held.", ["kind"], held)
        yield gauge("tierd_index_blocks", "Blocks in the prefix trees.", [], [((), blocks)])
        text = "Requests that were understood and answered with an error."
        yield counter("tierd_request_errors", text, ["verb", "error"], list(self.errors.items()))


def slots_by_state(spaces: Iterable[Space], tier: int) -> dict[str, int]:
    """Slots of a tier (by its place among the tiers), summed over spaces."""
    total: Counter[str] = Counter()
    for space in spaces:
        total.update(space.arenas[tier].pool.counts())
    return dict(total)


def counter(name: str, text: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
    """A family that only grows; `_total` is appended to its name."""
    return _filled(CounterMetricFamily(name, text, labels=labels), samples)


def gauge(name: str, text: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
    """A family that goes up and down."""
    return _filled(GaugeMetricFamily(name, text, labels=labels), samples)


def _filled(family: Any, samples: Iterable[Sample]) -> Metric:
    for labels, value in samples:
        family.add_metric(list(labels), value)
    return family  # type: ignore[no-any-return]

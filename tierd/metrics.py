"""What `/metrics` shows: the numbers of every series that `series` declares.

Counters live where the work is done; a scrape only reads them. Lookups by tier sum to the blocks asked for; slots by state sum
to the slots of a tier; bytes are counted when they have arrived. A series whose labels are known beforehand begins at 0, so
that its first event is an increase.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations, permutations

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tierd import __version__, series
from tierd.core.ages import BUCKETS, EVERYWHERE, GAP, IDLE, LIVED, SUM
from tierd.core.ahead import FATES, PREFETCHED
from tierd.core.ladder import CLOSED, PAGED, TIERS, kind_of
from tierd.core.plan import REASONS, WRITE_BACK
from tierd.core.scrub import OUTCOMES
from tierd.keeper import Keeper
from tierd.series import Series
from tierd.space import Space
from tierd.tiers.io import Io, cufile
from tierd.tiers.paths import DIRECTIONS, GDS
from tierd.tiers.tier import MemoryTier, NvmeTier
from tierd.wire.messages import TURN_ENDS

REQUEST_BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 5e-2, 0.1, 0.5, 2.5, 10.0)
LAG_BUCKETS = (1e-3, 5e-3, 2.5e-2, 0.1, 0.5, 2.5)
LOOKUP_TIERS = (*TIERS, "remote", "pending", "miss")
EVICTIONS = ("clean", "drop")
FAILURES = ("io_error", "mismatch")
NAMESPACE_CHARACTERS = 16
"""Of a namespace's id in labels: as many as its folder on disk is named by."""
Counts = Mapping[tuple[str, ...], int]

disable_created_metrics()  # when a counter was made says nothing: all of them begin with the daemon


class Metrics(Collector):
    """The daemon's registry. `io` names the engine and path to NVMe, `adopted` counts what became of an earlier life's rows,
    `started` (Unix seconds) is when it began; with `per_namespace` there are series for each namespace too.
    """

    def __init__(
        self,
        keeper: Keeper,
        io: Io,
        adopted: Mapping[str, int],
        started: float,
        per_namespace: bool = False,
    ) -> None:
        self._keeper, self._io, self._adopted, self._started = keeper, io, adopted, started
        self._per_namespace = per_namespace
        self.errors: Counter[tuple[str, str]] = Counter()
        """Refused requests by verb and error."""
        self.sessions_total = 0
        self.sessions_not_kept = 0
        """Sessions whose process the service manager did not take."""
        self._scrapes, self._scrape_seconds = 0, 0.0
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.requests = self._histogram(series.REQUESTS, REQUEST_BUCKETS)
        self.lag = self._histogram(series.LOOP_LAG, LAG_BUCKETS)

    def _histogram(self, declared: Series, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(declared.name, declared.text, declared.labels, buckets=buckets, registry=self.registry)

    def counters(self) -> Counter[tuple[str, ...]]:
        """The sums of all spaces' counters."""
        total = Counter(self._keeper.forgotten)
        for space in list(self._keeper.spaces.values()):
            total.update(dict(space.cache.counters))
        return total

    def scraped(self, seconds: float) -> None:
        """A scrape was answered, and took so much time of the processor."""
        self._scrapes, self._scrape_seconds = self._scrapes + 1, self._scrape_seconds + seconds

    def collect(self) -> Iterable[Metric]:
        """Called by a scrape, in the exporter's thread."""
        spaces = list(self._keeper.spaces.values())
        yield series.BUILD.info({"version": __version__})
        yield series.IO.info(self._io._asdict())
        yield series.START_TIME.one(self._started)
        yield series.SCRAPES.one(self._scrapes)
        yield series.SCRAPE_SECONDS.one(self._scrape_seconds)
        counters = self.counters()
        yield from self._blocks(counters)
        yield from self._ages(counters)
        yield from self._moved()
        yield from self._tiers(spaces)
        yield from self._clients(spaces)
        yield from self._namespaces(spaces if self._per_namespace else [])

    def _blocks(self, counters: Counts) -> Iterable[Metric]:
        """What was asked for, what had to go and what failed, in blocks."""
        tiers = [tier.name for tier in self._keeper.tiers]
        failed = [((kind, reason), counters["failed", kind, reason]) for kind in FAILURES for reason in REASONS]
        evicted = [((tier, kind), counters["evicted", tier, kind]) for tier in tiers for kind in EVICTIONS]
        yield series.LOOKUP_BLOCKS.of(by("lookup", LOOKUP_TIERS, counters))
        yield series.SAMPLED_BLOCKS.of(by("sampled", ("seen", "new"), counters))
        yield series.SAVED_TOKENS.one(counters["saved", "tokens"])
        yield series.EVICTED_BLOCKS.of(evicted)
        yield series.FAILED_BLOCKS.of(failed)
        yield series.SCRUBBED_BLOCKS.of(by("scrubbed", OUTCOMES, counters))
        yield series.PREFETCHED_BLOCKS.of(by(PREFETCHED, FATES, counters))
        yield series.CHECKSUM_FAILURES.one(mismatches(counters))
        yield series.TURNS.of(by("turn", TURN_ENDS, counters))
        yield series.EVENTS.of((name, number) for name, number in counters.items() if len(name) == 1)

    def _ages(self, counters: Counts) -> Iterable[Metric]:
        """How old blocks were when they were evicted or asked for again."""

        def row(kind: str, tier: str) -> tuple[list[tuple[str, float]], float]:
            return [(bound, counters[kind, tier, bound]) for bound in BUCKETS], counters[kind, tier, SUM] / 1000

        tiers = [tier.name for tier in self._keeper.tiers]
        yield series.IDLE.buckets(((tier,), *row(IDLE, tier)) for tier in tiers)
        yield series.LIFETIME.buckets(((tier,), *row(LIVED, tier)) for tier in tiers)
        yield series.REUSE_GAP.buckets([((), *row(GAP, EVERYWHERE))])

    def _moved(self) -> Iterable[Metric]:
        """What the io threads did and do."""
        mover, path = self._keeper.mover, self._io.path
        names = [tier.name for tier in self._keeper.tiers]
        down = [(WRITE_BACK, *way) for way in combinations(names, 2) if kind_of(way[1]) != PAGED]
        ways = [(reason, *way) for reason in REASONS if reason != WRITE_BACK for way in permutations(names, 2)]
        ways = down + [way for way in ways if way[2] != CLOSED]
        labelled = [(way, (*way, path if CLOSED in way else "memory")) for way in ways]
        yield series.TRANSFER_BYTES.of((labels, mover.moved[way]) for way, labels in labelled)
        yield series.TRANSFER_SECONDS.of((labels, mover.seconds.get(way, 0.0)) for way, labels in labelled)
        paths = [tier.paths for tier in self._keeper.tiers if isinstance(tier, NvmeTier)]
        taken = [((path, way), one.bytes[path, way]) for one in paths for path in one.names for way in DIRECTIONS]
        counted = (cufile.operations() if self._io.gpu == GDS else None) or Counter()
        operations = [((way, direction), counted[way, direction]) for way in cufile.WAYS for direction in DIRECTIONS]
        yield series.IO_PATH_BYTES.of(taken)
        yield series.CUFILE_OPERATIONS.of(operations)
        yield series.IN_FLIGHT.of(((reason,), mover.in_flight[reason]) for reason in REASONS)
        yield series.PARTS_QUEUED.one(mover.queued)
        yield series.WRITE_BACK_RUNS.one(self._keeper.unwritten())

    def _tiers(self, spaces: list[Space]) -> Iterable[Metric]:
        """How full the tiers are, and how their media do."""
        keeper = self._keeper
        slots = [
            ((tier.name, state), number)
            for at, tier in enumerate(keeper.tiers)
            for state, number in slots_by_state(spaces, at).items()
        ]
        segments = sum(tier.not_kept for tier in keeper.tiers if isinstance(tier, MemoryTier))
        yield series.USED_BYTES.of(((tier.name,), tier.budget.used) for tier in keeper.tiers)
        yield series.LIMIT_BYTES.of(((tier.name,), tier.budget.most) for tier in keeper.tiers)
        yield series.REFUSED.of(((tier.name,), keeper.is_refused(at)) for at, tier in enumerate(keeper.tiers))
        yield series.SLOTS.of(slots)
        yield series.NVME_FAILURES.of(((reason,), number) for reason, number in keeper.nvme_failures().items())
        yield series.RECOVERED_ROWS.of(((outcome,), number) for outcome, number in self._adopted.items())
        yield series.NOT_KEPT.of([(("segment",), segments), (("session",), self.sessions_not_kept)])
        yield series.HANDOVERS.one(keeper.handovers)

    def _clients(self, spaces: list[Space]) -> Iterable[Metric]:
        """Who is there, and what they hold."""
        sessions = [session for space in spaces for session in list(space.cache.sessions.values())]
        leases = [lease for session in sessions for lease in list(session.leases.values())]
        writing = sum(lease.writing for lease in leases)
        yield series.NAMESPACES.one(len(spaces))
        yield series.SESSIONS.one(len(sessions))
        yield series.SESSIONS_OPENED.one(self.sessions_total)
        yield series.LEASES.of([(("writing",), writing), (("reading",), len(leases) - writing)])
        yield series.INDEX_BLOCKS.one(sum(space.cache.index.blocks for space in spaces))
        yield series.REQUEST_ERRORS.of(list(self.errors.items()))

    def _namespaces(self, spaces: list[Space]) -> Iterable[Metric]:
        """The same by namespace, where it is wanted; without samples where not."""
        names = {space: space.namespace.id.hex()[:NAMESPACE_CHARACTERS] for space in spaces}
        counts = {space: space.cache.counters for space in spaces}
        arenas = [(space, arena) for space in spaces for arena in space.arenas]
        about = [(name, space.namespace) for space, name in names.items()]
        yield series.NAMESPACE.info(*({"namespace": name, "domain": it.domain, "model": it.model} for name, it in about))
        yield series.NAMESPACE_LOOKUPS.of(
            ((names[space], tier), counts[space]["lookup", tier]) for space in spaces for tier in LOOKUP_TIERS
        )
        yield series.NAMESPACE_TOKENS.of(((names[space],), counts[space]["saved", "tokens"]) for space in spaces)
        yield series.NAMESPACE_BYTES.of(
            ((names[space], arena.tier.name), len(arena.segments) * arena.geometry.total_bytes) for space, arena in arenas
        )
        yield series.NAMESPACE_QUOTA.of(
            ((names[space], arena.tier.name, bound), value)
            for space, arena in arenas
            for bound, value in zip(("min", "max"), arena.quota, strict=True)
            if value
        )
        yield series.NAMESPACE_SESSIONS.of(((names[space],), len(space.sessions)) for space in spaces)


def by(kind: str, values: Iterable[str], counters: Counts) -> list[series.Sample]:
    """Samples of one kind of counter by its last name."""
    return [((value,), counters[kind, value]) for value in values]


def mismatches(counters: Counts) -> int:
    """Blocks that were read from NVMe and were not what was written."""
    return counters["scrubbed", "mismatch"] + sum(counters["failed", "mismatch", reason] for reason in REASONS)


def slots_by_state(spaces: Iterable[Space], tier: int) -> dict[str, int]:
    """Slots of a tier (by its place among the tiers), summed over spaces."""
    total: Counter[str] = Counter()
    for space in spaces:
        total.update(space.arenas[tier].pool.counts())
    return dict(total)

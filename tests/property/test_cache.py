"""The cache against a naive model: any sequence of requests, transfers, faults and lives.

`World` compares every answer with the model; here are only the steps, and that everything is checked after each.
"""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.sim.clients import Client, chain
from tests.sim.forget import forget_all
from tests.sim.pages import PagedWorld
from tierd.block import ROOT
from tierd.core.admission import ADMISSIONS
from tierd.core.ladder import TIERS
from tierd.core.plan import IO_ERROR, MISMATCH, OK, Hint, Wait
from tierd.core.policies import SERVING

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=14)
PICK = st.integers(0, 1 << 16)


class CacheMachine(RuleBasedStateMachine):
    """Up to four tiers of a few slots, up to four clients, chains over an alphabet of three."""

    @initialize(
        gpu=st.integers(0, 2),
        devices=st.integers(1, 2),
        upper=st.integers(1, 3),
        lower=st.integers(0, 4),
        share=st.sampled_from((0.1, 0.25, 1.0)),
        policies=st.fixed_dictionaries({tier: st.sampled_from(SERVING) for tier in TIERS}),
        admission=st.sampled_from(ADMISSIONS),
    )
    def start(
        self, gpu: int, devices: int, upper: int, lower: int, share: float, policies: dict[str, str], admission: str
    ) -> None:
        """An empty cache with one client; sometimes without nvme or without a gpu tier."""
        self.world = PagedWorld(upper, lower, 4, share, gpu, policies, admission, devices)
        self.world.open(0)

    # -- who ----------------------------------------------------------------------------------------------------------

    def client(self, pick: int) -> Client:
        """One of the attached clients."""
        there = [client for client in self.world.clients.values() if client.attached]
        return there[pick % len(there)]

    def somebody(self) -> bool:
        """Whether any client is attached."""
        return any(client.attached for client in self.world.clients.values())

    def holds(self, writing: bool) -> bool:
        """Whether the attached clients have a lease of this kind."""
        return any(client.attached and client.leases(writing) for client in self.world.clients.values())

    def lease(self, pick: int, writing: bool) -> tuple[Client, int]:
        """One of their leases of this kind."""
        clients = [client for client in self.world.clients.values() if client.attached]
        leases = [(client, lease) for client in clients for lease in client.leases(writing)]
        return leases[pick % len(leases)]

    @precondition(lambda self: len(self.world.clients) < 4)
    @rule(tier=st.integers(0, 2))
    def open(self, tier: int) -> None:
        """One client more, in any tier in memory."""
        self.world.open(min(tier, self.world.closed - 1))

    @precondition(lambda self: self.world.clients)
    @rule(pick=PICK)
    def kill(self, pick: int) -> None:
        """A client's process dies, whatever it was doing."""
        clients = list(self.world.clients.values())
        self.world.kill(clients[pick % len(clients)])

    # -- reading ------------------------------------------------------------------------------------------------------

    @precondition(somebody)
    @rule(pick=PICK, tokens=TOKENS, skip=st.integers(0, 5))
    def lookup(self, pick: int, tokens: list[int], skip: int) -> None:
        """From the root or from the middle of a chain, known or not."""
        hashes = chain(tokens)
        skip %= len(hashes)
        self.world.lookup(self.client(pick), hashes[skip:], hashes[skip - 1] if skip else ROOT)

    @precondition(lambda self: self.holds(writing=False))
    @rule(pick=PICK, first=st.integers(0, 13), count=st.integers(1, 14), patient=st.booleans())
    def load(self, pick: int, first: int, count: int, patient: bool) -> None:
        """What was not released, at once or after waiting for the transfers that it needs."""
        client, lease = self.lease(pick, writing=False)
        held = self.world.cache.sessions[client.id].leases[lease]
        released = held.slots.max(0) < 0
        if first >= held.blocks or released[first : first + count].any() or -lease in client.claims:
            return
        answer = self.world.load(client, lease, first, count)
        if patient and isinstance(answer, Wait):
            for transfer in [transfer for transfer in self.world.running if transfer.id in answer.transfers]:
                self.world.finish(transfer)
            assert self.world.load(client, lease, first, count), "the block is not up after its transfer"

    @precondition(lambda self: self.holds(writing=False))
    @rule(pick=PICK, part=st.none() | st.tuples(st.integers(0, 13), st.integers(1, 14)))
    def release(self, pick: int, part: tuple[int, int] | None) -> None:
        """All of a lease, or a part of it."""
        client, lease = self.lease(pick, writing=False)
        if part and -lease not in client.claims:
            self.world.release(client, lease, part[0] % len(client.claims[lease].hashes), part[1])
        else:
            self.world.release(client, lease)

    @rule(tokens=TOKENS, tier=st.integers(0, 2))
    def prefetch(self, tokens: list[int], tier: int) -> None:
        """Without a lease."""
        self.world.prefetch(chain(tokens), tier=min(tier, self.world.closed - 1))

    # -- writing ------------------------------------------------------------------------------------------------------

    @precondition(somebody)
    @rule(pick=PICK, tokens=TOKENS, skip=st.integers(0, 5))
    def store(self, pick: int, tokens: list[int], skip: int) -> None:
        """New, partly known, being stored by somebody else, from the middle."""
        hashes = chain(tokens)
        skip %= len(hashes)
        self.world.store(self.client(pick), hashes[skip:], hashes[skip - 1] if skip else ROOT)

    @precondition(lambda self: self.holds(writing=True))
    @rule(pick=PICK, count=st.none() | st.integers(0, 14))
    def commit(self, pick: int, count: int | None) -> None:
        """All of a store, or its head."""
        self.world.commit(*self.lease(pick, writing=True), count)

    @precondition(lambda self: self.holds(writing=True))
    @rule(pick=PICK)
    def abort(self, pick: int) -> None:
        """A store is given up."""
        self.world.abort(*self.lease(pick, writing=True))

    @precondition(lambda self: self.world.clients)
    @rule(pick=PICK)
    def write(self, pick: int) -> None:
        """A client copies into all that it believes to be its own to write, also while the daemon is away."""
        clients = list(self.world.clients.values())
        clients[pick % len(clients)].write()

    # -- pages --------------------------------------------------------------------------------------------------------

    def engines(self) -> list[Client]:
        """The attached clients that have pages."""
        there = [client for client in self.world.clients.values() if client.attached]
        return [client for client in there if self.world.is_paged(client)]

    @precondition(lambda self: self.engines())
    @rule(pick=PICK, count=st.integers(1, 10))
    def reserve(self, pick: int, count: int) -> None:
        """Pages for what has no hashes yet."""
        engines = self.engines()
        self.world.reserve(engines[pick % len(engines)], count)

    @precondition(lambda self: any(client.pages for client in self.engines()))
    @rule(pick=PICK, tokens=TOKENS, skip=st.integers(0, 5), order=st.randoms(), answered=st.booleans())
    def commit_pages(self, pick: int, tokens: list[int], skip: int, order: random.Random, answered: bool) -> None:
        """Blocks of a chain in any order, known or not, behind a parent that is known or not; and again what got lost."""
        engines = [client for client in self.engines() if client.pages]
        client = engines[pick % len(engines)]
        hashes = chain(tokens)
        parents = [ROOT, *hashes[:-1]]
        free = [place for place, page in client.pages.items() if not page.block]
        naming = list(zip(free, parents[skip:], hashes[skip:], strict=False))
        lost = [(place, page.block) for place, page in client.pages.items() if page.block and not page.named]
        naming += [(place, self.world.parents[block], block) for place, block in lost]
        order.shuffle(naming)
        if naming:
            self.world.commit_pages(client, naming, answered)

    @precondition(lambda self: any(client.pages for client in self.engines()))
    @rule(pick=PICK, count=st.integers(1, 8))
    def release_pages(self, pick: int, count: int) -> None:
        """Some pages, each as often as it is held."""
        engines = [client for client in self.engines() if client.pages]
        client = engines[pick % len(engines)]
        held = [place for place, page in client.pages.items() for _ in range(page.times)]
        self.world.cache.ended(client.pages[held[0]].block or ROOT, Hint("stop", "c"))
        self.world.release_pages(client, held[:count])

    # -- moving -------------------------------------------------------------------------------------------------------

    @rule(blocks_max=st.integers(1, 8))
    def write_back(self, blocks_max: int) -> None:
        """One transfer down is planned, if any."""
        self.world.plan_write_back(blocks_max)

    @precondition(lambda self: self.world.running)
    @rule(pick=PICK, codes=st.lists(st.sampled_from((OK, OK, OK, IO_ERROR, MISMATCH)), max_size=14))
    def finish(self, pick: int, codes: list[int]) -> None:
        """Transfers end in any order, block by block well or not."""
        transfer = self.world.running[pick % len(self.world.running)]
        outcome = (codes + [OK] * len(transfer))[: len(transfer)]
        if transfer.target == "nvme":
            outcome = [IO_ERROR if code else OK for code in outcome]
        elif transfer.source != "nvme":
            outcome = [OK] * len(transfer)
        self.world.finish(transfer, outcome)

    @rule(pick=PICK, tier=st.integers(0, 3))
    def vacate(self, pick: int, tier: int) -> None:
        """A segment is to be given up, whoever uses it."""
        tier = min(tier, self.world.tiers - 1)
        open_ones = sorted(self.world.segments[tier].keys() - self.world.cache.pools[tier].closing)
        if len(open_ones) > 1:
            self.world.vacate(tier, open_ones[pick % len(open_ones)])

    @rule()
    def purge(self) -> None:
        """Everything is to be forgotten, whoever uses it."""
        forget_all(self.world)
        for tier in range(self.world.tiers):
            self.world.add_segment(tier)

    @rule(tier=st.integers(0, 3))
    def collect_and_grow(self, tier: int) -> None:
        """What is idle goes, and its numbers are used again."""
        if self.world.collect():
            self.world.add_segment(min(tier, self.world.tiers - 1))

    # -- lives --------------------------------------------------------------------------------------------------------

    @rule(arrived=st.lists(st.booleans(), max_size=20), keeps_memory=st.booleans())
    def restart(self, arrived: list[bool], keeps_memory: bool) -> None:
        """The daemon dies amid everything and comes back."""
        self.world.restart(arrived, keeps_memory)

    @precondition(lambda self: self.world.clients)
    @rule(pick=PICK, keep=st.lists(st.booleans(), max_size=20))
    def resume(self, pick: int, keep: list[bool]) -> None:
        """A client comes back after a restart or a lost connection, still copying some of what it was told."""
        clients = list(self.world.clients.values())
        away = [client for client in clients if not client.attached] or clients
        self.world.resume(away[pick % len(away)], keep)

    @invariant()
    def all_is_well(self) -> None:
        """What must hold after every step."""
        if hasattr(self, "world"):
            self.world.now += 1
            self.world.check()

    def teardown(self) -> None:
        """Without clients and transfers, nothing is waited for."""
        if not hasattr(self, "world"):
            return
        for client in list(self.world.clients.values()):
            self.world.kill(client)
        self.world.run_all()
        self.world.check()
        for pool in self.world.cache.pools:
            assert not pool.users.any() and not pool.counts()["filling"] and not pool.counts()["retired"]


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=50)

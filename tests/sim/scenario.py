"""One seeded life of a small cache under pressure.

Clients have prompts that share prefixes, are slow or get killed; transfers end in any order and fail; segments change
hands; daemons die.
"""

from __future__ import annotations

import random

from tests.sim.clients import Client, Place, chain
from tests.sim.forget import forget_all
from tests.sim.pages import Naming, PagedWorld
from tests.sim.pins import lapse, pin, pin_again, pinned_stays, unpin
from tierd.block import ROOT
from tierd.core.admission import ADMISSIONS
from tierd.core.ladder import TIERS
from tierd.core.pins import FOREVER, Term
from tierd.core.plan import IO_ERROR, MISMATCH, OK, Hint, Transfer, Wait
from tierd.core.policies import SERVING

CLIENTS_MAX = 5
DEEP_SHARE = 0.1
"""After which share of the steps the cache checks all of itself, which takes longer than the step."""
PROMPT_BLOCKS_MAX = 40
PROMPTS = 10
"""Earlier prompts that a new one may share blocks with."""


class Scenario:
    """A world and the dice. What is likely differs from seed to seed: one has slow media, another one loses segments
    all the time.

    A mild one has no faults and keeps its segments, so that nothing leased may ever be lost. Every second one has pins.
    """

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        choice = self.dice.choice
        self.mild = self.dice.random() < 0.3
        lower, gpu = choice((0, 1, 1, 2, 2, 3, 4, 8)), choice((0, 0, 1, 2, 3))
        shape = choice((1, 2, 3, 4)), lower, choice((4, 8, 16)), choice((0.1, 0.25, 0.5, 1.0))
        policies = {tier: choice(SERVING) for tier in TIERS}
        self.world = PagedWorld(*shape, gpu, policies, choice(ADMISSIONS), devices=choice((1, 1, 2, 3)))
        self.prompts: list[tuple[int, ...]] = []
        self.steps = {
            **{self._read: 12, self._fill: 12, self._lookup: 5, self._load: 8, self._release: 8, self._prefetch: 4},
            **{self._store: 5, self._commit: 8, self._abort: 2, self._write: 3},
            **{self._generate: 10, self._reserve: 4, self._commit_pages: 8, self._release_pages: 6},
            **{self._open: 2, self._kill: 1, self._resume: 4, self._restart: choice((0, 0.3, 1))},
            **{self._write_back: choice((4, 20, 40)), self._finish: choice((6, 25, 60))},
            self._purge: 0 if self.mild else choice((0, 0, 0.3)),
            **{self._vacate: 0 if self.mild else choice((0, 1, 6)), self._collect: 4, self._grow: choice((0.3, 3))},
            **{self._pin: seed % 2 * 4, self._unpin: seed % 2 * 2, self._lapse: seed % 2},
        }

    def run(self, steps: int) -> None:
        """Play, check after every step, and see at the end that everything comes to rest."""
        names, weights = list(self.steps), list(self.steps.values())
        for step in self.dice.choices(names, weights, k=steps):
            self.world.now += self.dice.choice((0, 0, 1, 5, -3))
            step()
            pinned_stays(self.world)
            self.world.check(deep=self.dice.random() < DEEP_SHARE)
        self.finish()

    def finish(self) -> None:
        """All clients go, all transfers end: every slot is then free, in the index, or not trusted."""
        for client in list(self.world.clients.values()):
            self.world.kill(client)
        self.world.cache.pins.clear()
        self.world.run_all()
        self.world.collect()
        self.world.check()
        for pool in self.world.cache.pools:
            counts = pool.counts()
            assert not counts["filling"] and not counts["retired"], f"slots are still waited for: {counts}"
            assert not pool.users.any(), "somebody still uses slots"

    # -- clients ------------------------------------------------------------------------------------------------------

    def _client(self) -> Client | None:
        there = [client for client in self.world.clients.values() if client.attached]
        return self.dice.choice(there) if there else None

    def _chain(self) -> tuple[list[bytes], bytes]:
        """A prompt that continues or repeats an earlier one, as a chain from its root or from the middle; and its
        parent.
        """
        prompt = self.dice.choice(self.prompts) if self.prompts and self.dice.random() < 0.95 else ()
        prompt = prompt[: self.dice.randint(0, len(prompt))] if self.dice.random() < 0.3 else prompt
        if len(prompt) < PROMPT_BLOCKS_MAX and self.dice.random() < 0.3:
            more = self.dice.randint(1, PROMPT_BLOCKS_MAX - len(prompt))
            prompt += tuple(self.dice.choice((0, 1, 2)) for _ in range(more))
        prompt = prompt or (self.dice.randint(0, 3),)
        self.prompts = [*self.prompts[-PROMPTS:], prompt]
        hashes = chain(prompt)
        skip = self.dice.randrange(len(hashes)) if self.dice.random() < 0.2 else 0
        return hashes[skip:], hashes[skip - 1] if skip else ROOT

    def _open(self) -> None:
        if len(self.world.clients) < CLIENTS_MAX:
            self.world.open(self.dice.choice(self.world.mapped))

    def _kill(self) -> None:
        if self.world.clients:
            self.world.kill(self.dice.choice(list(self.world.clients.values())))

    def _read(self) -> None:
        """What an engine does: look up, load window after window, and let go of each when it is copied."""
        if not (client := self._client()):
            return
        found = self.world.lookup(client, *self._chain())
        at, busy = 0, 0
        while at < found.blocks and busy < 3:
            answer = self.world.load(client, found.lease, at, self.dice.randint(1, 16))
            if isinstance(answer, int):
                self.world.release(client, found.lease, at, answer)
                at += answer
            elif isinstance(answer, Wait) and self.dice.random() < 0.9:
                self._finish_one([transfer for transfer in self.world.running if transfer.id in answer.transfers])
            else:
                busy += 1
        if found.lease:
            self.world.release(client, found.lease)

    def _fill(self) -> None:
        """What an engine does with a new prompt: store and commit in parts."""
        if not (client := self._client()):
            return
        hashes, parent = self._chain()
        part = self.dice.randint(4, 16)
        for at in range(0, len(hashes), part):
            lease = self.world.store(client, hashes[at : at + part], hashes[at - 1] if at else parent)
            if lease is None:
                return
            if lease:
                self.world.commit(client, lease)

    def _lookup(self) -> None:
        if client := self._client():
            self.world.lookup(client, *self._chain())

    def _load(self) -> None:
        if (client := self._client()) and (leases := client.leases(writing=False)):
            claim = client.claims[lease := self.dice.choice(leases)]
            if claim.hashes and -lease not in client.claims:  # what was resumed is all told
                first = self.dice.randrange(len(claim.hashes))
                first = first if first in claim.places or self.dice.random() < 0.5 else max(claim.places, default=-1) + 1
                self._try_load(client, lease, first)

    def _try_load(self, client: Client, lease: int, first: int) -> None:
        claim = client.claims[lease]
        held = self.world.cache.sessions[client.id].leases[lease]
        count = self.dice.randint(1, 16)
        released = held.slots.max(0) < 0
        if first < held.blocks and not released[first : first + count].any():
            answer = self.world.load(client, lease, first, count)
            if isinstance(answer, Wait) and self.dice.random() < 0.5 and first not in claim.places:
                for transfer in [t for t in self.world.running if t.id in answer.transfers]:
                    self.world.finish(transfer)
                self.world.load(client, lease, first, count)

    def _release(self) -> None:
        if (client := self._client()) and (leases := client.leases(writing=False)):
            claim = client.claims[lease := self.dice.choice(leases)]
            if self.dice.random() < 0.6 or -lease in client.claims:  # what was resumed is released as a whole
                self.world.release(client, lease)
            else:
                first = self.dice.randrange(len(claim.hashes))
                self.world.release(client, lease, first, self.dice.randint(1, 16))

    def _store(self) -> None:
        if client := self._client():
            self.world.store(client, *self._chain())

    def _commit(self) -> None:
        if (client := self._client()) and (leases := client.leases(writing=True)):
            count = None if self.dice.random() < 0.7 else self.dice.randint(0, 10)
            self.world.commit(client, self.dice.choice(leases), count)

    def _abort(self) -> None:
        if (client := self._client()) and (leases := client.leases(writing=True)):
            self.world.abort(client, self.dice.choice(leases))

    def _write(self) -> None:
        for client in self.world.clients.values():
            client.write()

    def _resume(self) -> None:
        away = [client for client in self.world.clients.values() if not client.attached]
        if away or self.dice.random() < 0.1:
            client = self.dice.choice(away) if away else self._client()
            if client:
                share = self.dice.choice((0.0, 0.5, 1.0))
                self.world.resume(client, (self.dice.random() < share for _ in iter(int, 1)))

    # -- pages --------------------------------------------------------------------------------------------------------

    def _engine(self) -> Client | None:
        there = [client for client in self.world.clients.values() if client.attached and self.world.is_paged(client)]
        return self.dice.choice(there) if there else None

    def _generate(self) -> None:
        """What a paged engine does: look up, reserve what is missing, compute and name it, and let go of all."""
        if not (client := self._engine()):
            return
        hashes, parent = self._chain()
        found = self.world.lookup(client, hashes, parent)
        first = found.told
        places = self.world.reserve(client, min(len(hashes) - first, self.dice.randint(1, 12)) or 1)
        if naming := self._naming(places, hashes[first:], hashes[first - 1] if first else parent):
            self.world.commit_pages(client, naming, answered=self.dice.random() < 0.9)
        if found.lease:
            self.world.release(client, found.lease)
        self.world.release_pages(client, [place for place in places if self.dice.random() < 0.9] or places[:1])

    def _naming(self, places: list[Place], hashes: list[bytes], parent: bytes) -> list[Naming]:
        return list(zip(places, [parent, *hashes[:-1]], hashes, strict=False)) if hashes else []

    def _reserve(self) -> None:
        if client := self._engine():
            self.world.reserve(client, self.dice.randint(1, 8))

    def _commit_pages(self) -> None:
        """Blocks of one chain or two, in any order; some again, because the answer was lost."""
        if not (client := self._engine()):
            return
        places = [place for place, page in client.pages.items() if not page.block]
        self.dice.shuffle(places)
        naming: list[Naming] = []
        for _ in range(self.dice.choice((1, 1, 2))):
            hashes, parent = self._chain()
            first = self.dice.choice((0, self.world._prefix(hashes, parent), self.dice.randrange(len(hashes))))
            more = self._naming(places, hashes[first:], hashes[first - 1] if first else parent)[: self.dice.randint(1, 10)]
            naming, places = naming + more, places[len(more) :]
        again = [(place, page.block) for place, page in client.pages.items() if page.block and not page.named]
        naming += [(place, self.world.parents[block], block) for place, block in again if self.dice.random() < 0.5]
        if self.dice.random() < 0.3:
            self.dice.shuffle(naming)
        if naming:
            self.world.commit_pages(client, naming, answered=self.dice.random() < 0.9)

    def _release_pages(self) -> None:
        if (client := self._engine()) and client.pages:
            held = [place for place, page in client.pages.items() for _ in range(page.times)]
            let_go = self.dice.sample(held, self.dice.randint(1, len(held)))
            if block := client.pages[let_go[-1]].block:
                self.world.cache.ended(block, Hint("tool_use", "c"))
            self.world.release_pages(client, let_go)

    # -- the daemon ---------------------------------------------------------------------------------------------------

    def _prefetch(self) -> None:
        self.world.prefetch(*self._chain(), tier=self.dice.choice(self.world.mapped))

    def _write_back(self) -> None:
        self.world.plan_write_back(self.dice.randint(1, 12))

    def _finish(self) -> None:
        self._finish_one(self.world.running)

    def _finish_one(self, running: list[Transfer]) -> None:
        if running:
            transfer = self.dice.choice(running)
            outcome = [OK] * len(transfer)
            if not self.mild and "nvme" in (transfer.source, transfer.target) and self.dice.random() < 0.1:
                codes = (OK, IO_ERROR, MISMATCH) if transfer.source == "nvme" else (OK, IO_ERROR)
                outcome = [self.dice.choice(codes) for _ in outcome]
            self.world.finish(transfer, outcome)

    def _vacate(self) -> None:
        tier = self.dice.randrange(self.world.tiers)
        pool = self.world.cache.pools[tier]
        open_ones = self.world.segments[tier].keys() - pool.closing - pool.pinned
        if len(open_ones) > 1:
            self.world.vacate(tier, self.dice.choice(sorted(open_ones)))

    def _pin(self) -> None:
        hashes, _ = self._chain()
        term = self.dice.choice((FOREVER, Term(self.dice.randrange(3), self.world.now + self.dice.randrange(40))))
        pin(self.world, self.dice.choice([*hashes, *sorted(self.world.where)]), self.dice.choice((0, 1, 2, 100)), term)

    def _lapse(self) -> None:
        lapse(self.world, self.world.now)

    def _unpin(self) -> None:
        if pinned := list(self.world.cache.pins.chains):
            unpin(self.world, self.dice.choice(pinned))

    def _purge(self) -> None:
        forget_all(self.world)
        for tier in range(self.world.tiers):
            self.world.add_segment(tier)

    def _collect(self) -> None:
        self.world.collect()

    def _grow(self) -> None:
        tier = self.dice.randrange(self.world.tiers)
        if len(self.world.segments[tier]) < (8 if tier == self.world.closed else 4):
            self.world.add_segment(tier)

    def _restart(self) -> None:
        arrived = (self.dice.random() < 0.5 for _ in iter(int, 1))
        pinned = dict(self.world.cache.pins.terms)
        self.world.restart(arrived, keeps_memory=self.dice.random() < 0.8)
        pin_again(self.world, pinned)


def play(seed: int, steps: int = 300) -> None:
    """Run one seed; the error that it raises names it."""
    try:
        Scenario(seed).run(steps)
    except Exception as error:
        error.add_note(f"python -m tests.sim --seed {seed} --steps {steps}")
        raise

"""Decides what the next step computes: plain functions, no bytes, no clock; time is an argument.

Sequences wait, run and leave, oldest first. Three rules keep all of them going:

- Pages are reserved ahead of need, as many as the running sequences will fill soon. When there is none left, the youngest
  gives up first: waiting sequences their leases, then running ones all they have. Their full blocks are in tierd, or lost.
- Who waits for blocks lets others pass, and no longer than computing them would take. The oldest that has its blocks
  gets the pages.
- Of a step's prompt tokens the oldest sequence gets half, and those with the least left to compute share the rest.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from dataclasses import dataclass, field
from operator import attrgetter

from tierd.block import HASH_BYTES
from tierd.errors import Busy
from tierd_engine.memory import NAMELESS, Commit, Lookup, Memory, Reservation
from tierd_engine.request import Hints, Limits
from tierd_engine.sequence import BlockTable, Sequence

PLANS_MIN = 3
PATIENCE_SECONDS = 0.05
"""A load that takes less is never declined: so short a time measures threads, not the medium."""
AGE = attrgetter("key")


@dataclass(frozen=True)
class Chunk:
    """The next `count` tokens of a sequence that have no KV yet."""

    sequence: Sequence
    count: int


@dataclass
class Counts:
    """Numbers since the start. `steps_waited`: steps in which a sequence had no page for its next token."""

    steps: int = 0
    steps_waited: int = 0
    preemptions: int = 0
    loads_declined: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    sequences: Counter[str] = field(default_factory=Counter)
    """Ended sequences by reason."""


class Scheduler:
    """Holds all sequences and all pages that are not free. For one thread."""

    def __init__(self, memory: Memory, limits: Limits) -> None:
        self.memory = memory
        self.limits = limits
        self.counts = Counts()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.prefill_tokens_per_second = 0.0
        """Measured by the engine; 0: not yet, then every load is worth its time."""
        self._spare: list[int] = []
        self._asked: Reservation | None = None
        self._denied = False
        """The last reservation brought nothing, and nothing has been given up for it since."""
        self._commits: list[tuple[Commit, list[tuple[Sequence, BlockTable, int, int]]]] = []
        self._leaving: list[tuple[BlockTable, tuple[bytes, str, Hints] | None]] = []
        self._flights: dict[bytes, Sequence] = {}
        self._saving = False
        """The oldest sequence that could run finds too few pages: what is spare is kept for it."""
        self._crowded = False
        """Pages ran out, and no sequence has left since: only the oldest that waits may look up blocks."""
        self._lacked = False

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises Busy when the queue is full."""
        if len(self.waiting) >= self.limits.waiting_max:
            raise Busy(f"engine: {len(self.waiting)} sequences are waiting already; try again later")
        self.waiting.append(sequence)

    def admit(self, now: float) -> None:
        """Take what memory has answered, look up who is new, and let run who can."""
        self.memory.poll()
        self._settle()
        self._admit(now)

    def expecting(self, seconds: float) -> bool:
        """Whether a sequence that no step has passed over yet may have its blocks, or its pages, within so many seconds."""
        new = [found for one in self.waiting if not one.passed_over and (found := one.lookup) is not None]
        return any(
            self._asked is not None if _all_there(found) else not found.starved and (not found.done or found.seconds <= seconds)
            for found in new
        )

    def plan(self) -> list[Chunk]:
        """What to compute next; empty when nothing can be. The caller computes it and then calls `computed`."""
        for sequence in self.waiting:
            sequence.passed_over += sequence.lookup is not None
        chunks = self._decodes()
        chunks += self._prefills(self.limits.chunk_tokens - len(chunks))
        self._reserve_ahead()
        self.counts.steps += bool(chunks)
        return chunks

    def computed(self, chunks: list[Chunk]) -> None:
        """The KV of these chunks is in their pages: name the blocks that are full now."""
        pages: list[int] = []
        parents = hashes = b""
        parts = []
        for chunk in chunks:
            sequence, table = chunk.sequence, chunk.sequence.table
            assert table is not None
            if chunk.count == 1 and sequence.computed >= sequence.prompt_tokens:
                self.counts.decode_tokens += 1
            else:
                self.counts.prefill_tokens += chunk.count
            sequence.computed += chunk.count
            first, end = table.named, sequence.computed // sequence.block_tokens
            if end > first and not table.nameless:
                names = sequence.hashes()[first * HASH_BYTES : end * HASH_BYTES]
                parents += sequence.name(first - 1) + names[:-HASH_BYTES]
                hashes += names
                pages += table.pages[first:end]
                parts.append((sequence, table, first, end - first))
                table.named, table.unanswered = end, table.unanswered + 1
        if pages:
            self._commits.append((self.memory.commit(pages, parents, hashes), parts))
            self._settle()

    def end(self, sequence: Sequence, reason: str, turn: str | None = None) -> None:
        """A sequence is finished or not wanted any more, wherever it is; `turn` tells memory more than `reason`."""
        sequence.reason = reason
        self.counts.sequences[reason] += 1
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self._vacate(sequence, turn or reason)

    @property
    def idle(self) -> bool:
        """Whether no sequence is left and everything that they held was given back."""
        held = self._spare or self._asked or self._commits or self._leaving
        return not (self.waiting or self.running or held)

    def check(self) -> None:
        """Raise AssertionError unless nothing is held; to be called when idle."""
        assert self.idle, f"{self.waiting} wait, {self.running} run, {len(self._spare)} pages are reserved"
        assert not self._flights, f"{len(self._flights)} blocks are being computed by nobody"
        self.memory.check()

    # Who may run.

    def _admit(self, now: float) -> None:
        """Let the oldest that have their blocks run, as long as there are pages for all of their tokens."""
        self._saving = False
        for at, sequence in enumerate(self.waiting[: self.limits.running_max]):
            if len(self.running) >= self.limits.running_max:
                break
            if sequence.lookup is None and sequence.follows is None:
                if self._crowded and at:
                    continue
                self._look(sequence)
            if self._saving or not self._arrived(sequence, now):
                continue
            assert sequence.lookup is not None
            needed = sequence.blocks(len(sequence.tokens)) - sequence.lookup.blocks
            lacking = needed + self._needed(0)
            if not self._has(lacking, lacking if self._crowded else self._needed_to_admit()):
                self._saving = True
                self._crowded |= self._denied
                if self._denied:
                    self._give_up_lease(sequence)
                continue
            self._start(sequence, needed, now)
        self._crowded &= bool(self.waiting)

    def _arrived(self, sequence: Sequence, now: float) -> bool:
        """Whether all that memory or other sequences will give it is there. Decides between loading and computing."""
        if sequence.follows is not None:
            return False
        found = sequence.lookup
        assert found is not None
        if _all_there(found):
            if sequence.stale and found.blocks < sequence.blocks_loadable:
                self._look(sequence)
                return False
            return not self._follow(sequence, found.blocks)
        if found.starved:
            if self._makes_room(sequence):
                sequence.stopped_since = None
                return False
            if sequence.stopped_since is None:
                sequence.stopped_since = now
            if now - sequence.stopped_since < PATIENCE_SECONDS:
                return False
            found.stop()
            return self._arrived(sequence, now)
        if sequence.stopped_since is None:
            sequence.stopped_since = now
        if self.prefill_tokens_per_second:
            blocks = (found.blocks if found.done else sequence.blocks_loadable) - found.ready
            seconds = max(blocks * sequence.block_tokens / self.prefill_tokens_per_second, PATIENCE_SECONDS)
            # To wait as long as computing takes, and then to compute, costs at most twice the better choice. A step may take
            # longer than a load: what is asked in one plan and copied after the next is seen in the third.
            late = now - sequence.stopped_since > seconds and sequence.passed_over >= PLANS_MIN
            if late or (found.done and found.seconds > seconds):
                found.stop()
                self.counts.loads_declined += 1
                return self._arrived(sequence, now)
        return False

    def _makes_room(self, starved: Sequence) -> bool:
        """Whether others here will give up pages that its blocks could come to, or just did."""
        if self.running or self._leaving or self._asked or self._saving:
            return True
        self._crowded = True
        return self._give_up_lease(starved) or bool(self._spare)

    def _look(self, sequence: Sequence) -> None:
        """Look its prefix up (again), unless somebody is computing it right now."""
        if self._follow(sequence, 0):
            return
        old = sequence.lookup
        sequence.lookup = self.memory.lookup(sequence.hashes()[: sequence.blocks_loadable * HASH_BYTES])
        sequence.stopped_since = None
        sequence.passed_over = 0
        sequence.stale = False
        if old is not None:
            old.release()

    def _follow(self, sequence: Sequence, first: int) -> bool:
        """Whether the blocks from `first` on are being computed; then it waits for the last of them."""
        hashes = sequence.hashes()
        for block in range(first, sequence.blocks_loadable):
            name = hashes[block * HASH_BYTES : (block + 1) * HASH_BYTES]
            if name not in self._flights:
                break
            sequence.follows = name
        return sequence.follows is not None

    def _start(self, sequence: Sequence, pages: int, now: float) -> None:
        found, sequence.lookup = sequence.lookup, None
        assert found is not None
        own, self._spare = self._spare[:pages], self._spare[pages:]  # in order: neighbours are copied together
        sequence.table = BlockTable(found, own)
        sequence.computed = found.blocks * sequence.block_tokens
        if "loaded" not in sequence.seconds:
            sequence.seconds["loaded"] = now
            sequence.hit_tokens = sequence.computed
            self.counts.hit_tokens += sequence.hit_tokens
            self.counts.prompt_tokens += sequence.prompt_tokens
        sequence.flying = [sequence.name(block) for block in range(found.blocks, len(sequence.hashes()) // HASH_BYTES)]
        self._flights |= dict.fromkeys(sequence.flying, sequence)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=AGE)

    # What runs.

    def _decodes(self) -> list[Chunk]:
        """One token for everyone who has read its prompt and has a page."""
        chunks: list[Sequence] = []
        lacking: list[Sequence] = []
        for sequence in self.running:
            if sequence.uncomputed == 1:
                (chunks if self._has_page(sequence) else lacking).append(sequence)
        if lacking:
            self.counts.steps_waited += bool(chunks) or not self._lacked
            self._crowded = True
            if self._denied and (self._lacked or not self._give_up_lease(lacking[0])) and self._others_hold_pages():
                victim = self.running[-1]
                chunks = [sequence for sequence in chunks if sequence is not victim]
                self._preempt(victim)
        self._lacked = bool(lacking)
        return [Chunk(sequence, 1) for sequence in chunks]

    def _prefills(self, budget: int) -> list[Chunk]:
        """Chunks of prompts, `budget` tokens together (or one, so that prompts go on however many decode)."""
        prompts = [sequence for sequence in self.running if sequence.uncomputed > 1]
        if not prompts:
            return []
        oldest, others = prompts[0], sorted(prompts[1:], key=attrgetter("uncomputed"))
        budget = max(budget, 1)
        share = min(oldest.uncomputed, -(-budget // 2) if others else budget)
        left, chunks = budget - share, []
        for sequence in others:
            if left:
                chunks.append(Chunk(sequence, min(left, sequence.uncomputed)))
                left -= chunks[-1].count
        return [Chunk(oldest, min(share + left, oldest.uncomputed)), *chunks]

    def _has_page(self, sequence: Sequence) -> bool:
        """Whether there is a page for its next token."""
        table = sequence.table
        assert table is not None
        if sequence.computed == len(table.pages) * sequence.block_tokens:
            if not self._has(1):
                return False
            table.pages.append(self._spare.pop())
        return True

    def _preempt(self, victim: Sequence) -> None:
        """It waits again, as old as it is; what was committed of it may still be somewhere when it comes back."""
        self.counts.preemptions += 1
        self._denied = False
        self.running.remove(victim)
        self._vacate(victim, None)
        victim.computed = 0
        insort(self.waiting, victim, key=AGE)

    def _give_up_lease(self, needy: Sequence) -> bool:
        """Take the lease of the youngest sequence that waits, is not older than the needy one, and has any; False: none."""
        for sequence in reversed(self.waiting):
            if AGE(sequence) <= AGE(needy):
                return False
            if sequence.lookup is not None:
                sequence.lookup.release()
                sequence.lookup = None
                self._denied = False
                return True
        return False

    def _others_hold_pages(self) -> bool:
        """Whether the youngest that runs can make room for others, or gets room by itself."""
        return len(self.running) > 1 or any(sequence.lookup is not None for sequence in self.waiting)

    # Pages.

    def _needed(self, tokens: int) -> int:
        """Pages that the running sequences lack for so many tokens beyond their next one."""
        needed = 0
        for sequence in self.running:
            assert sequence.table is not None
            last = min(len(sequence.tokens) + tokens, sequence.prompt_tokens + sequence.sampling.max_tokens - 1)
            needed += max(0, sequence.blocks(last) - len(sequence.table.pages))
        return needed

    def _needed_to_admit(self) -> int:
        """Pages for the next tokens of those that run, and of all that have their blocks and may run beside them."""
        places, ahead = self.limits.running_max - len(self.running), self.memory.layout.block_tokens // 4
        looked = [(one, one.lookup) for one in self.waiting if one.lookup is not None]
        arrived = [(one, found) for one, found in looked if _all_there(found)][:places]
        return self._needed(ahead) + sum(one.blocks(len(one.tokens) + ahead) - found.blocks for one, found in arrived)

    def _has(self, pages: int, wanted: int = 0) -> bool:
        """Whether so many pages are spare; if not, asks for them, or for the more that are wanted."""
        if len(self._spare) < pages and self._asked is None:
            urgent = self._denied and not (self.running and self._others_hold_pages())
            self._asked = self.memory.reserve(max(pages, wanted) - len(self._spare), urgent)
            self._settle_reservation()
        return len(self._spare) >= pages

    def _reserve_ahead(self) -> None:
        """Ask for what a quarter of a block's steps needs, a block's steps at a time; return what is far more."""
        block = self.memory.layout.block_tokens
        enough = self._needed(block)
        if len(self._spare) < self._needed(block // 4):
            self._has(enough)
        if not self._saving and len(self._spare) > 2 * enough:
            surplus, self._spare = self._spare[enough:], self._spare[:enough]
            self.memory.release(surplus)

    def _vacate(self, sequence: Sequence, turn: str | None) -> None:
        """End every hold of a sequence, on pages once its commits are answered."""
        self._land(sequence, sequence.flying)
        sequence.flying = []
        sequence.follows = None
        if sequence.lookup is not None:
            sequence.lookup.release()
            sequence.lookup = None
        if sequence.table is not None:
            ended = (sequence.name(sequence.table.named - 1), turn, sequence.hints) if turn else None
            self._leaving.append((sequence.table, ended))
            sequence.table = None
            self._crowded = False
        self._wake_followers()
        self._settle_leaving()

    # Answers.

    def _settle(self) -> None:
        """Take what memory has answered."""
        self._settle_reservation()
        waiting = []
        for commit, parts in self._commits:
            if commit.done:
                self._settle_commit(commit, parts)
            else:
                waiting.append((commit, parts))
        self._commits = waiting
        self._wake_followers()
        self._settle_leaving()

    def _settle_reservation(self) -> None:
        if self._asked is not None and self._asked.done:
            self._denied = not len(self._asked.pages)
            self._spare += self._asked.pages
            self._asked = None

    def _settle_commit(self, commit: Commit, parts: list[tuple[Sequence, BlockTable, int, int]]) -> None:
        """Use the twins of our pages where there are any, and let those run who waited for these blocks."""
        codes = commit.codes.tolist()
        for sequence, table, first, count in parts:
            for block, code in enumerate(codes[:count], first):
                if code >= 0:
                    self._spare.append(table.pages[block])
                    table.pages[block] = code
                table.nameless |= code == NAMELESS
            names = [sequence.name(block) for block in range(first, first + count)]
            for other in self.waiting:
                other.stale |= first < other.blocks_loadable and other.name(first) == names[0]
            self._land(sequence, sequence.flying if table.nameless else names)
            table.unanswered -= 1
            codes = codes[count:]

    def _land(self, sequence: Sequence, names: list[bytes]) -> None:
        """These blocks are not being computed by that sequence any more."""
        for name in names:
            if self._flights.get(name) is sequence:
                del self._flights[name]

    def _wake_followers(self) -> None:
        """Look up again for those whose blocks are computed, while whoever computed them still holds them."""
        for sequence in self.waiting:
            if sequence.follows is not None and sequence.follows not in self._flights:
                sequence.follows = None
                self._look(sequence)

    def _settle_leaving(self) -> None:
        staying = []
        for table, ended in self._leaving:
            if table.unanswered:
                staying.append((table, ended))
                continue
            if ended is not None:
                self.memory.ended(*ended)
            self.memory.release(table.pages[table.leased :])
            table.lookup.release()
        self._leaving = staying


def _all_there(found: Lookup) -> bool:
    """Whether nothing more will come."""
    return found.done and found.ready == found.blocks

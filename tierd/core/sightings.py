"""What was asked for and stored, whether it was asked for again, and how likely that is for what comes new.

Prompts are not alike: of the blocks that a short one brings far more are read again than of those of a long one. So blocks that
come new with a request are classed by how many they are and how many were known before them, in octaves, and what becomes of
them is counted by class: read again, or not before they were forgotten. They are forgotten when as many blocks have been let
into the tier as it has room for: read later than that, they would hardly be there any more. Classes of which little is known
lean on all that bring as much, these on all, and all on "everything is read again".

Blocks that are named only when they are stored, as those of answers are, are a class that leans on nothing else. They come a
few at a time, and are one run as long as nobody has asked for them.
"""

from __future__ import annotations

from collections.abc import Callable

from tierd.core.policy.runs import MARK_BYTES, Ghost, Ghosts, marks_of

Class = tuple[tuple[int, ...], ...]
ANSWER: Class = ((0,),)
ANSWER_WEIGHT = 1 / 16
"""Of each block of an answer: how many it will have is known at its end only."""

MEMORY_TURNS, MEMORY_MIN = 8, 1 << 18
"""What is remembered may be so many times the tier's blocks, or so many."""
RUN_BLOCKS = 56
"""A run takes as much memory as the marks of so many blocks, and those."""
TRUST = 16.0
"""Requests of which a class must know for its own count to weigh as much as what it leans on."""


class Sighting(Ghost):
    """Blocks of one class that follow each other. `since` is how many had been let in when they were last asked for."""

    __slots__ = ("admitted", "again", "kind", "since", "stored", "weight")

    def __init__(self, kind: Class, since: int, weight: float) -> None:
        super().__init__(0)
        self.kind = kind
        self.since = since
        self.weight = weight
        self.stored = False
        """A request that waits for its turn may ask more than once: only what was stored meanwhile was read again."""
        self.again = False
        self.admitted = False
        """Whether it was let in when it was stored or read last."""

    def tail(self, blocks: int) -> Sighting:
        """It has the same past."""
        tail = Sighting(self.kind, self.since, self.weight)
        tail.stored, tail.again, tail.admitted = self.stored, self.again, self.admitted
        return tail


class Runs(Ghosts[Sighting]):
    """Runs also by the mark of their last block."""

    def __init__(self, lost: Callable[[Sighting], None]) -> None:
        super().__init__(lost)
        self._ends: dict[bytes, Sighting] = {}

    def put(self, run: Sighting, marks: bytes) -> None:
        """Enter a run."""
        super().put(run, marks)
        self._ends[marks[-MARK_BYTES:]] = run

    def pop(self, run: Sighting) -> None:
        """Take a run out, if it is there."""
        super().pop(run)
        if self._ends.get(run.marks[-MARK_BYTES:]) is run:
            del self._ends[run.marks[-MARK_BYTES:]]

    def cut(self, run: Sighting, blocks: int) -> Sighting:
        """Cut a run behind its first `blocks` blocks; returns the tail."""
        tail = super().cut(run, blocks)
        if run in self:
            self._ends[run.marks[-MARK_BYTES:]] = run
        return tail

    def ending(self, mark: bytes) -> Sighting | None:
        """The run whose last block has a mark."""
        return self._ends.get(mark)


class Sightings:
    """Of one tier that has `slots` blocks, into which `entered` blocks have been let so far."""

    def __init__(self, slots: Callable[[], int], entered: Callable[[], int]) -> None:
        self._slots, self._entered = slots, entered
        self._runs = Runs(self._lost)
        self._seen: dict[tuple[int, ...], float] = {}
        self._again: dict[tuple[int, ...], float] = {}
        """Weights by class and by what it leans on; all blocks that come new with one request weigh 1 together."""
        self._halved = 0

    @property
    def size(self) -> int:
        """What is remembered, as if it were marks of blocks."""
        return self._runs.blocks + RUN_BLOCKS * len(self._runs)

    def asked(self, hashes: bytes, first: int, found: int) -> None:
        """A request wants these blocks; it named those from `first` on, and the first `found` are in some tier."""
        marks, entered = marks_of(hashes), self._entered()
        known = self._along(marks)
        for run in known:
            run.since = entered
            self._runs.refresh(run)
            if run.stored:
                self._read_again(run)
        at = self._join(known, marks)
        if at < found:  # stored before this life of the daemon, or longer ago than is remembered
            run = Sighting(ANSWER, entered, 0.0)
            run.stored = run.again = True
            self._runs.put(run, marks[at * MARK_BYTES : found * MARK_BYTES])
            at = found
        if new := len(marks) // MARK_BYTES - at:
            self._runs.put(Sighting(class_of(new, at), entered, 1 / new), marks[at * MARK_BYTES :])
        for at in (first, found):  # what is offered next begins there
            self._along(marks[: at * MARK_BYTES])
        self._forget(entered)

    def stored(self, hashes: bytes, parent: bytes) -> list[tuple[Sighting, int]]:
        """A run behind `parent` was stored, or is there to be written: what is known of it, with how many blocks each has."""
        marks = marks_of(hashes)
        runs = [(run, run.blocks) for run in self._along(marks)]
        for run, _ in runs:
            if run.stored:  # somebody had to compute it again
                self._read_again(run)
            run.stored = True
        at = sum([blocks for _, blocks in runs])
        if new := len(marks) // MARK_BYTES - at:
            runs.append((self._answered(None if runs else self.above(parent), marks[at * MARK_BYTES :]), new))
        self._forget(self._entered())
        return runs

    def above(self, block: bytes) -> Sighting | None:
        """The run whose last block this is (by its hash)."""
        return self._runs.ending(block[:MARK_BYTES])

    def forget(self) -> None:
        """Whatever was stored is gone, and nothing is to be learnt from that."""
        self._runs = Runs(self._lost)

    def chance(self, kind: Class) -> float:
        """The share of blocks of a class that is read again before it is forgotten."""
        chance = 1.0
        for key in reversed(kind):
            chance = (self._again.get(key, 0.0) + TRUST * chance) / (self._seen.get(key, 0.0) + TRUST)
        return chance

    def _along(self, marks: bytes) -> list[Sighting]:
        """The runs that `marks` begin with, cut where these end or go another way.

        No chain of hashes comes to a mark twice: where one that a client made up does, it is not followed.
        """
        along: dict[Sighting, None] = {}
        at = 0
        while found := self._runs.along(marks, at):
            for run, same in found:
                if run in along:
                    return list(along)
                if same < run.blocks:
                    behind = self._runs.get(run.marks[same * MARK_BYTES : (same + 1) * MARK_BYTES])
                    if behind is run or behind in along:
                        return list(along)
                    self._runs.cut(run, same)
                at += same * MARK_BYTES
                along[run] = None
        return list(along)

    def _answered(self, above: Sighting | None, marks: bytes) -> Sighting:
        """Blocks were stored that nobody asked for: one run with those above, if nobody did for these, either."""
        if above and above.kind is ANSWER and above.stored and not above.again:
            self._runs.pop(above)
            run, marks = above, above.marks + marks
        else:
            run = Sighting(ANSWER, 0, ANSWER_WEIGHT)
            run.stored = True
        run.since = self._entered()
        self._runs.put(run, marks)
        return run

    def _join(self, runs: list[Sighting], marks: bytes) -> int:
        """Make one run of those that lead `marks`, if all were read again; returns how many blocks they have."""
        blocks = sum([run.blocks for run in runs])
        if len(runs) > 1 and all(run.again for run in runs):
            for run in runs:
                self._runs.pop(run)
            self._runs.put(runs[0], marks[: blocks * MARK_BYTES])
        return blocks

    def _read_again(self, run: Sighting) -> None:
        if not run.again:
            run.again = True
            self._count(run, 1.0)

    def _lost(self, run: Sighting) -> None:
        if run.stored and not run.again:
            self._count(run, 0.0)

    def _count(self, run: Sighting, again: float) -> None:
        weight = run.blocks * run.weight
        for key in run.kind:
            self._seen[key] = self._seen.get(key, 0.0) + weight
            self._again[key] = self._again.get(key, 0.0) + weight * again

    def _forget(self, entered: int) -> None:
        """Forget what would have left the tier, and what there is no memory for; what was counted a turn ago counts half."""
        slots = self._slots()
        most = max(MEMORY_TURNS * slots, MEMORY_MIN)
        while (run := self._runs.oldest()) and (entered - run.since > slots or self.size > most):
            self._runs.forget_oldest()
        if entered - self._halved > slots:
            self._halved = entered
            for counts in (self._seen, self._again):
                for key in counts:
                    counts[key] /= 2


def class_of(new: int, known: int) -> Class:
    """The class of blocks that come new with a request behind so many known ones, and what it leans on."""
    size = new.bit_length()
    return (size, (known + 1).bit_length()), (size,), ()

"""What is remembered of blocks, whether they are in a tier or not: runs in it are a policy's nodes', the others ghosts.

A ghost has no more of its blocks' names than 8 bytes of each hash: it is evidence, not identity.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from tierd.block import HASH_BYTES

MARK_BYTES = 8


class Ghost:
    """So many blocks that follow each other, with their `marks`, which are 8 bytes of each block's hash."""

    __slots__ = ("blocks", "marks")

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.marks = b""

    def tail(self, blocks: int) -> Any:
        """What becomes of all but the first `blocks` blocks when they are cut off."""
        raise NotImplementedError


G = TypeVar("G", bound=Ghost)


class Run(Ghost):
    """Blocks that were read last by the same request. Only a ghost has marks.

    `weight` is how much a block counts, `behind` the mark of a ghost that was cut off its end.
    """

    __slots__ = (
        "behind",
        "ends",
        "interval",
        "kind",
        "last",
        "order",
        "session",
        "shared",
        "turn",
        "weight",
    )

    def __init__(self, blocks: int, last: int, session: int, turn: int, kind: int, weight: float) -> None:
        super().__init__(blocks)
        self.last = last
        self.order = 0
        self.session = session
        self.turn = turn
        self.kind = kind
        self.weight = weight
        self.shared = False
        self.interval = 0.0
        self.ends = False
        self.behind = b""

    def part(self, blocks: int) -> Run:
        """A run of its own for `blocks` of these; the caller takes them away here."""
        run = Run(blocks, self.last, self.session, self.turn, self.kind, self.weight)
        run.order, run.shared, run.interval = self.order, self.shared, self.interval
        return run

    def tail(self, blocks: int) -> Run:
        """The part behind the first `blocks` blocks, with what is known of the end."""
        tail = self.part(self.blocks - blocks)
        tail.ends, tail.behind = self.ends, self.behind
        self.ends, self.behind = False, b""
        return tail

    def alike(self, other: Run) -> bool:
        """Whether nothing is lost if both are one."""
        return self.kind == other.kind and self.last == other.last and (self.shared or self.session == other.session)


def marks_of(hashes: bytes) -> bytes:
    """The marks of packed hashes."""
    return np.frombuffer(hashes, np.uint64)[:: HASH_BYTES // 8].tobytes()


class Ghosts(Generic[G]):
    """Runs by the mark of their first block, the oldest first; `lost` hears of what is forgotten.

    No chain of hashes comes to a mark twice, but one that a client made up may: what was asked for comes out of order then,
    and nothing else does.
    """

    def __init__(self, lost: Callable[[G], None] = lambda run: None) -> None:
        self.blocks = 0
        self._lost = lost
        self._runs: OrderedDict[bytes, G] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, run: G) -> bool:
        return self._runs.get(run.marks[:MARK_BYTES]) is run

    def get(self, mark: bytes) -> G | None:
        """The run that begins with a mark."""
        return self._runs.get(mark)

    def put(self, run: G, marks: bytes) -> None:
        """A run that has left the tier, or never was in it."""
        if orphan := self._runs.get(marks[:MARK_BYTES]):  # what it hung below was forgotten before
            self.pop(orphan)
            self._lost(orphan)
        run.marks, run.blocks = marks, len(marks) // MARK_BYTES
        self.blocks += run.blocks
        self._runs[marks[:MARK_BYTES]] = run

    def pop(self, run: G) -> None:
        """A run comes into the tier, or is forgotten."""
        if run in self:
            del self._runs[run.marks[:MARK_BYTES]]
            self.blocks -= run.blocks

    def oldest(self) -> G | None:
        """The run that has been here longest."""
        return next(iter(self._runs.values()), None)

    def forget_oldest(self) -> None:
        """Forget the run that has been here longest."""
        run = next(iter(self._runs.values()))
        self.pop(run)
        self._lost(run)

    def refresh(self, run: G) -> None:
        """A run was asked for."""
        if run in self:
            self._runs.move_to_end(run.marks[:MARK_BYTES])

    def cut(self, run: G, blocks: int) -> G:
        """Cut a run behind its first `blocks` blocks; returns the tail, which is a ghost as old as it was."""
        tail: G = run.tail(blocks)
        marks = run.marks[blocks * MARK_BYTES :]
        if run in self:
            self.blocks -= run.blocks - blocks
        run.marks, run.blocks = run.marks[: blocks * MARK_BYTES], blocks
        self.put(tail, marks)
        return tail

    def along(self, marks: bytes, at: int) -> list[tuple[G, int]]:
        """Runs that follow each other along `marks` from byte `at`, each with how many of its blocks are the same."""
        found: list[tuple[G, int]] = []
        passed: set[G] = set()
        while (run := self._runs.get(marks[at : at + MARK_BYTES])) and run not in passed:
            passed.add(run)
            same = run.blocks if marks.startswith(run.marks, at) else _common(run.marks, marks, at)
            found.append((run, same))
            at += same * MARK_BYTES
            if same < run.blocks:
                break
        return found


def _common(run: bytes, marks: bytes, at: int) -> int:
    size = min(len(run), len(marks) - at) // MARK_BYTES
    differ = np.frombuffer(run, np.uint64, size) != np.frombuffer(marks, np.uint64, size, at)
    return int(differ.argmax()) if differ.any() else size


def key(node: Any) -> bytes:
    """The mark of a node's first block."""
    return bytes(node.hashes[:MARK_BYTES])

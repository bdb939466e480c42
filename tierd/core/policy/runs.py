"""What chd remembers of blocks, whether they are in the tier or not: runs in the tier are its nodes', the others ghosts.

A ghost has no more of its blocks' names than 8 bytes of each hash: it is evidence, not identity.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from tierd.block import HASH_BYTES

MARK_BYTES = 8


class Run:
    """Blocks that were read last by the same request. Only a ghost has `marks`: 8 bytes of each block's hash.

    `weight` is how much a block counts, `behind` the mark of a ghost that was cut off its end.
    """

    __slots__ = (
        "behind",
        "blocks",
        "ends",
        "interval",
        "kind",
        "last",
        "marks",
        "order",
        "session",
        "shared",
        "turn",
        "weight",
    )

    def __init__(self, blocks: int, last: int, session: int, turn: int, kind: int, weight: float) -> None:
        self.blocks = blocks
        self.last = last
        self.order = 0
        self.session = session
        self.turn = turn
        self.kind = kind
        self.weight = weight
        self.shared = False
        self.interval = 0.0
        self.ends = False
        self.marks = b""
        self.behind = b""

    def part(self, blocks: int) -> Run:
        """A run of its own for `blocks` of these; the caller takes them away here."""
        run = Run(blocks, self.last, self.session, self.turn, self.kind, self.weight)
        run.order, run.shared, run.interval = self.order, self.shared, self.interval
        return run

    def alike(self, other: Run) -> bool:
        """Whether nothing is lost if both are one."""
        return self.kind == other.kind and self.last == other.last and (self.shared or self.session == other.session)


def marks_of(hashes: bytes) -> bytes:
    """The marks of packed hashes."""
    return np.frombuffer(hashes, np.uint64)[:: HASH_BYTES // 8].tobytes()


class Ghosts:
    """Runs that are not in the tier, the oldest first, by the mark of their first block; `lost` hears of what is forgotten."""

    def __init__(self, lost: Callable[[Run], None] = lambda run: None) -> None:
        self.blocks = 0
        self._lost = lost
        self._runs: OrderedDict[bytes, Run] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, mark: bytes) -> Run | None:
        """The run that begins with a mark."""
        return self._runs.get(mark)

    def put(self, run: Run, marks: bytes) -> None:
        """A run that has left the tier, or never was in it."""
        if orphan := self._runs.get(marks[:MARK_BYTES]):  # what it hung below was forgotten before
            self.pop(orphan)
            self._lost(orphan)
        run.marks, run.order = marks, 0
        run.blocks = len(marks) // MARK_BYTES
        self.blocks += run.blocks
        self._runs[marks[:MARK_BYTES]] = run

    def pop(self, run: Run) -> None:
        """A run comes into the tier, or is forgotten."""
        del self._runs[run.marks[:MARK_BYTES]]
        self.blocks -= run.blocks

    def forget_oldest(self) -> None:
        """Forget the run that has been here longest."""
        run = next(iter(self._runs.values()))
        self.pop(run)
        self._lost(run)

    def refresh(self, run: Run) -> None:
        """A run was asked for."""
        self._runs.move_to_end(run.marks[:MARK_BYTES])

    def cut(self, run: Run, blocks: int) -> Run:
        """Cut a run behind its first `blocks` blocks; returns the tail, which is a ghost as old as it was."""
        tail = run.part(run.blocks - blocks)
        tail.ends, tail.behind = run.ends, run.behind
        self.blocks -= tail.blocks
        self.put(tail, run.marks[blocks * MARK_BYTES :])
        run.marks, run.blocks = run.marks[: blocks * MARK_BYTES], blocks
        run.ends, run.behind = False, b""
        return tail

    def along(self, marks: bytes, at: int) -> list[tuple[Run, int]]:
        """Runs that follow each other along `marks` from byte `at`, each with how many of its blocks are the same."""
        found: list[tuple[Run, int]] = []
        while run := self._runs.get(marks[at : at + MARK_BYTES]):
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

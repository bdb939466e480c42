"""Write-back: copying down the ladder what was committed, oldest first and head first.

Each tier but those at the top has a queue of runs that are to come to it from above; what has come to a tier goes on to the
next. A run that is queued is looked up again when its turn comes: what is not there yet is copied, from the lowest tier
above that has it. What any tier further down has already stays where it is.

A prefix-closed tier survives alone, so a block enters it only when its parent is there: it is written behind the last
block that is there or on its way, and takes ancestors along that were never written. Transfers of one chain may be
under way together, but they are entered in the order of the chain. Into other tiers each run goes once, since the
blocks at its end may drive those at its head out again.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES, ROOT
from tierd.core.admission import EVERYTHING, POLICY, WRITE_PRICE, Admission
from tierd.core.index import Index, Node, Piece
from tierd.core.ladder import Ladder
from tierd.core.plan import WRITE_BACK, Slots, Transfer, any_of, leading
from tierd.core.pool import FILLING
from tierd.core.room import Room
from tierd.core.transfers import Transfers

TURNS = 4
"""A queue remembers as many blocks as fit into the tiers above this many times: older ones are hardly in memory still.
"""
BLOCKS_MAX = 256
"""Of one transfer."""
SHARE, TRANSFERS_MIN = 0.25, 4
"""Of the memory above that transfers to a tier may pin: a store that evicts the rest never waits for them. Where that is
little, few transfers keep the medium as busy as many small ones, and cost less."""
RUN_BYTES_MAX = 1024 * HASH_BYTES
"""A run that long is not joined with more: it is matched again for each part of it that is planned."""


class Run(NamedTuple):
    """Blocks that follow each other behind `parent`, as packed hashes; `number` grows with each `WriteBack.mark`."""

    number: int
    parent: bytes
    hashes: bytes


class Queue:
    """Runs that are to come to one tier, and the number of their blocks."""

    def __init__(self) -> None:
        self.runs: deque[Run] = deque()
        self.blocks = 0

    def __len__(self) -> int:
        return len(self.runs)

    def append(self, run: Run) -> None:
        """Queue a run behind the others, joined to the last one of its number if it goes on there."""
        self.blocks += len(run.hashes) // HASH_BYTES
        last = self.runs[-1] if self.runs else None
        if last and last.number == run.number and last.hashes.endswith(run.parent) and len(last.hashes) < RUN_BYTES_MAX:
            run = self.runs.pop()._replace(hashes=last.hashes + run.hashes)
        self.runs.append(run)

    def put_back(self, run: Run) -> None:
        """A run whose turn is not over yet."""
        self.runs.appendleft(run)
        self.blocks += len(run.hashes) // HASH_BYTES

    def pop(self) -> Run:
        """Take the oldest run out."""
        run = self.runs.popleft()
        self.blocks -= len(run.hashes) // HASH_BYTES
        return run


class WriteBack:
    """One queue for each tier but those at the top; without `closes`, none leads to the prefix-closed tier."""

    def __init__(
        self,
        index: Index,
        ladder: Ladder,
        room: Room,
        transfers: Transfers,
        counters: Counter[tuple[str, ...]],
        closes: bool,
        admission: str,
    ) -> None:
        self._index, self._ladder, self._pools = index, ladder, ladder.pools
        self._room, self._transfers, self._counters = room, transfers, counters
        lowest = len(ladder) if closes else ladder.closed
        self.queues = {target: Queue() for target in range(ladder.below(0), lowest)}
        """By target."""
        lower = self._pools[ladder.closed] if ladder.closed < len(ladder) else None
        kind = admission if ladder.closed in self.queues else EVERYTHING
        self.admission = Admission(kind, lambda: lower.slots if lower else 0, lambda: counters["written",])
        self._number = 0

    def mark(self) -> int:
        """Number what is pushed from now on higher than all before; returns the highest number so far, for `left`."""
        self._number += 1
        return self._number - 1

    def left(self, number: int) -> int:
        """How many runs up to a number are queued or on their way, counting each transfer as one."""
        flying = [transfer.number for transfer in self._transfers.running.values() if transfer.reason == WRITE_BACK]
        queued = [run.number for queue in self.queues.values() for run in queue.runs]
        return sum(at <= number for at in flying + queued)

    def push(self, tier: int, parent: bytes, hashes: bytes, number: int | None = None) -> None:
        """Queue a run that is in `tier` now, under a number that it has already or the present one; the oldest runs go when
        the queue is full, and their blocks are counted.
        """
        target = self._ladder.below(tier)
        queue = self.queues.get(target)
        if queue is None:
            return
        queue.append(Run(self._number if number is None else number, parent, hashes))
        above = sum(pool.slots for pool in self._pools[:target])
        while queue.blocks > TURNS * above and len(queue) > 1:
            self._counters["write_back_dropped",] += len(queue.pop().hashes) // HASH_BYTES

    def offer(self, tier: int, parent: bytes, hashes: bytes, number: int | None = None) -> None:
        """Queue what may come to the tier below of a run that was just stored in `tier`, or read there (see `push`)."""
        if self._ladder.below(tier) == self._ladder.closed and self._ladder.closed in self.queues:
            admitted = self.admission.offered(hashes, parent)
            if refused := len(hashes) // HASH_BYTES - admitted:
                self._counters["write_back_refused",] += refused
                hashes = hashes[: admitted * HASH_BYTES]
        if hashes:
            self.push(tier, parent, hashes, number)

    def push_all(self) -> None:
        """Queue all that is not below, coldest first (after recovery)."""
        for tier in self._ladder.mapped:
            if (target := self._ladder.below(tier)) not in self.queues:
                continue
            for node in self._index.orders[tier].coldest():
                if ((node.slots[tier] >= 0) & (node.slots[target:].max(0) < 0)).any():
                    assert node.parent is not None
                    self.push(tier, node.parent.last_hash, node.hashes)

    def forget(self) -> None:
        """Write nothing of what waits."""
        for queue in self.queues.values():
            queue.runs.clear()
            queue.blocks = 0

    def share(self, target: int) -> int:
        """How many blocks may be on their way to a tier at a time."""
        return int(sum(pool.slots for pool in self._pools[:target]) * SHARE)

    def piece(self, target: int) -> int:
        """How many of them may be one transfer."""
        return max(1, min(BLOCKS_MAX, self.share(target) // TRANSFERS_MIN))

    def plan(self, target: int, blocks_max: int) -> bool:
        """Plan one transfer of at most `blocks_max` blocks to a tier; False when nothing can be planned now.

        What waits for a tier in memory that has no slots goes on to the next one.
        """
        queue = self.queues[target]
        while queue and target in self._ladder.mapped and not self._pools[target].slots:
            run = queue.pop()
            self.offer(target, run.parent, run.hashes, run.number)
        while queue and self._pools[target].slots:
            if self._plan(target, queue.pop(), blocks_max):
                return True
        return False

    def finish(self, transfer: Transfer, good: NDArray[np.bool_], now: int) -> None:
        """Blocks have come to the prefix-closed tier (bool per block): into the tree, up to the first that failed or lost
        its parent.
        """
        tier, target = self._ladder.closed, transfer.target_slots
        pool = self._pools[tier]
        entered = np.zeros(len(good), np.bool_)
        end = leading(good & (pool.state[target] == FILLING))
        at = 0
        for node, start, count in self._places(transfer):
            here = node.slots[tier, start : start + min(count, end - at)]
            part = here < 0
            if part.any():
                entered[at : at + len(here)] = part
                rows = np.where(part, target[at : at + len(here)], here)
                self._index.assign(tier, Piece(node, start, len(here)), rows)
            at += len(here)
        self._counters["written",] += int(entered.sum())
        pool.enter(target[entered])
        pool.touched(target[entered], now)
        pool.give(target[~entered])

    def _plan(self, target: int, run: Run, blocks_max: int) -> bool:
        """Plan the first part of a run that is neither below nor on its way there; the rest goes back to the queue."""
        pieces = self._index.match(run.hashes, run.parent)
        if not pieces:
            return False
        is_closed = target == self._ladder.closed
        path = self._unsettled(pieces[-1].node, target) if is_closed else [piece.node for piece in pieces]
        copies = np.concatenate([node.slots for node in path], axis=1)[:, : sum(map(len, path[:-1])) + pieces[-1].end]
        above, writers = copies[:target], self._transfers.arriving(target, copies)
        for flying in np.unique(writers[writers > 0]).tolist():
            carrier = self._transfers.running[flying]
            carrier.number = min(carrier.number, run.number)
        todo = ~any_of(copies[target:]) & (writers == 0)
        wanted = todo & any_of(above)
        start = 0
        if not is_closed:
            start = pieces[0].start
            wanted[:start] = False
        if not wanted.any():
            return False
        first = int((todo if is_closed else wanted).argmax())
        source = target - 1
        while source and above[source, first] < 0:
            source -= 1
        count = leading(wanted[first : first + blocks_max])
        if len(above) > 1:
            count = _leading_from(source, above[:, first : first + count])
        if not count:
            self._counters["write_back_orphans",] += int(wanted.sum())
            return False
        assert path[0].parent is not None
        chain = path[0].parent.last_hash + b"".join([node.hashes for node in path])
        chooses = is_closed and self.admission.kind == POLICY
        new = chain[(first + 1) * HASH_BYTES : (first + 1 + count) * HASH_BYTES] if chooses else b""
        targets = self._room.take(target, count, path[-1], new, WRITE_PRICE)
        if chooses and len(targets) < count:
            self._counters["write_back_refused",] += int(wanted.sum()) - len(targets)
            wanted[first + len(targets) :] = False
        if not len(targets):
            if chooses:
                return False
            self._counters["write_back_short",] += count
            self.offer(target, run.parent, run.hashes, run.number)
            return False
        end = first + len(targets)
        if wanted[end:].any():
            rest = run
            if not is_closed:
                parent, hashes = chain[end * HASH_BYTES : (end + 1) * HASH_BYTES], run.hashes[(end - start) * HASH_BYTES :]
                rest = Run(run.number, parent, hashes)
            self.queues[target].put_back(rest)
        hashes = chain[(first + 1) * HASH_BYTES : (end + 1) * HASH_BYTES]
        parents = chain[first * HASH_BYTES : end * HASH_BYTES]
        if not is_closed:  # whoever writes the prefix-closed tier keeps its directory
            self._pools[target].begin(targets, hashes, parents)
        transfer = self._transfers.plan(WRITE_BACK, source, target, above[source, first:end], targets, hashes, parents)
        transfer.number = run.number
        transfer.behind = int(writers[first - 1]) if is_closed and first and copies[target, first - 1] < 0 else 0
        return True

    def _unsettled(self, node: Node, tier: int) -> list[Node]:
        """The node and its ancestors, up to the nearest that starts in the tier: with it all above are there."""
        path = []
        for member in self._index.path(node):
            path.append(member)
            if member.slots[tier, 0] >= 0:
                break
        return path[::-1]

    def _places(self, transfer: Transfer) -> list[Piece]:
        """Where the blocks of a transfer are in the tree; nowhere when the first one's parent is not below any more."""
        parent = transfer.parents[:HASH_BYTES]
        entry = self._index.find(parent) if parent != ROOT else None
        if parent != ROOT and (entry is None or entry[0].slots[self._ladder.closed, entry[1]] < 0):
            return []
        return self._index.match(transfer.hashes, parent) or []


def _leading_from(source: int, above: Slots) -> int:
    """How many leading blocks have their lowest copy in tier `source` of these."""
    good = above[source] >= 0
    for row in above[source + 1 :]:
        good &= row < 0
    return leading(good)

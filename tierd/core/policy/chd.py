"""Chain hit density: what goes first is what earns the fewest hits for the time that it stays, as learnt from this traffic.

Blocks are classed by what is known of their chain: for those of one conversation, how many turns it had and why the last
one ended; for those that several share, how often they are read. For each class `Survival` learns how long blocks wait for
their next read, and so what they are worth at each age (a Gittins index, as in Aalto, Ayesta and Righter, 2009). Of each
class only the leaf that was used longest ago is a candidate, so a choice costs no more than there are classes. What is new
has to be worth more than what it would replace. Ghosts, which are runs that were evicted or never let in, are watched too,
or only short waits would ever be seen. Conversations are told apart by the tree: a request goes on where an earlier one
ended.

Without evidence it is the order of `lru`, block for block. Do not use it where the tier holds all that is ever read again:
it can win nothing there, and costs a few microseconds a request and some tens of bytes a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tierd.block import HASH_BYTES
from tierd.core.policy import Policy
from tierd.core.policy.leaves import Draw, Leaves
from tierd.core.policy.runs import MARK_BYTES, Ghosts, Run, marks_of
from tierd.core.policy.survival import KINDS, OWN_KINDS, Survival, age_bin

REQUESTS_PER_LESSON = 100
GHOST_TURNS, GHOSTS_MIN = 4, 50_000
"""Ghosts have at most so many times the tier's blocks, or so many blocks."""
REQUEST_WEIGHT = 4.0
"""What all blocks of one conversation that a request reads weigh together; a shared block weighs 1."""
LOST_BLOCKS_MAX = 3
"""A request goes on from an earlier one if it has all but so many of its blocks."""
FAN_OUT_MAX = 2
MARGIN = 0.9
"""A block that is there stays if it is worth this share of a new one: estimates are rough, and a write is not free."""
TURNS_OF_KIND = (0, 0, 1, 2, 2, 2, 3)
"""Turns 1, 2, 3 to 5, and more."""
HINTS = {"tool_use": 1, "end_turn": 2, "stop": 2}
OTHER_HINT = 3


class Chd(Policy):
    """One tier's nodes by what they are worth; `slots` says how many blocks the tier holds."""

    def __init__(self, slots: Callable[[], int]) -> None:
        self.survival = Survival()
        self.ghosts = Ghosts(self._lose)
        self._slots = slots
        self._runs: dict[Any, Run] = {}
        self._leaves = Leaves(self._runs, KINDS)
        self._heads: dict[Any, Run] = {}
        """Runs of nodes that were just cut off, until they are entered."""
        self._order = self._session = self._requests = self._now = 0

    def __contains__(self, node: Any) -> bool:
        return node in self._runs

    def __len__(self) -> int:
        return len(self._runs)

    # -- eviction -----------------------------------------------------------------------------------------------------

    def coldest(self, new: bytes = b"", price: float = 1.0) -> Iterator[Any]:
        """Nodes from the one on that is worth least, each before its ancestors, up to one worth more than what is new."""
        limit = self._worth_of_new(new) / price
        draw = self._leaves.draw()
        heads = {kind: head for kind in self._leaves.kinds() if (head := self._head(draw, kind))}
        while heads and (first := min(heads.values()))[0] < limit:
            _, _, kind, node = first
            opened = draw.take(kind)
            yield node
            for changed in (kind,) if opened is None else (kind, opened):
                if head := self._head(draw, changed):
                    heads[changed] = head
                else:
                    heads.pop(changed, None)

    def _head(self, draw: Draw, kind: int) -> tuple[float, int, int, Any] | None:
        """What the first leaf of a class is worth, its order, its class and itself."""
        if (node := draw.first(kind)) is None:
            return None
        run, worth = self._runs[node], self.survival.worth
        return (worth[kind][age_bin(self._now - run.last)] if worth else 0.0), run.order, kind, node

    def _worth_of_new(self, new: bytes) -> float:
        if not (new and self.survival.worth and (found := self.ghosts.along(marks_of(new), 0))):
            return float("inf")
        run, same = found[-1]
        if same < run.blocks:  # the rest of it is new in another request
            self.ghosts.cut(run, same)
        return self.survival.worth[found[0][0].kind][0] * MARGIN

    # -- requests -----------------------------------------------------------------------------------------------------

    def asked(self, path: Sequence[Any], rest: bytes, now: int) -> None:
        """A request reads the nodes of a path, deepest first, and wants the blocks behind it too."""
        self._now = now
        known, rest = self._entered(path, rest)
        marks = marks_of(rest)
        found = self.ghosts.along(marks, 0)
        lost = None
        if found and found[-1][1] < found[-1][0].blocks:
            lost = self.ghosts.cut(*found[-1])
        runs = [run for run, _ in reversed(found)]
        before = runs[0] if runs else known[0][1] if known else None
        earlier = self._continued(before, lost, known[0][0] if known and not found else None)
        if earlier is None:
            self._session += 1
        session, turn = (earlier.session, earlier.turn + 1) if earlier else (self._session, 1)
        at = sum([run.blocks for run in runs])
        total = sum([run.blocks for _, run in known]) + len(marks) // MARK_BYTES
        weight = REQUEST_WEIGHT / total if total else 0.0
        last = before
        if at * MARK_BYTES < len(marks):
            last = Run(0, now, session, turn, own_kind(turn, None), weight)
            self.ghosts.put(last, marks[at * MARK_BYTES :])
            self.survival.begin(last.kind, now, last.blocks * weight)
        self._read([*runs, *(run for _, run in known)], session, turn, weight, now)
        for run in runs:
            self.ghosts.refresh(run)
        for node, _ in known:
            self._leaves.place(node)
        if last:
            last.ends = True
        self._bound()
        self._requests += 1
        if self._requests % REQUESTS_PER_LESSON == 0:
            self.survival.learn(now)

    def hinted(self, path: Sequence[Any], rest: bytes, turn: str | None) -> None:
        """Why the turn ended whose blocks are these: those of its conversation alone are of another class now."""
        nodes, rest = self._entered(path, rest)
        found = [run for run, _ in self.ghosts.along(marks_of(rest), 0)]
        for run in found + [run for _, run in nodes]:
            if not run.shared:
                kind = own_kind(run.turn, turn)
                self.survival.change(run.kind, kind, run.last, run.blocks * run.weight, run.blocks * run.weight)
                run.kind = kind
        for node, _ in nodes:
            self._leaves.place(node)

    def _read(self, runs: list[Run], session: int, turn: int, weight: float, now: int) -> None:
        """One request reads runs, the first to go first: their spells end, and new ones begin."""
        own, end, begun = own_kind(turn, None), self.survival.end, [0.0] * KINDS
        for run in runs:
            last, blocks = run.last, run.blocks
            end(run.kind, last, blocks * run.weight, now)
            if run.shared:
                run.interval = interval = (run.interval + now - last) / 2
            elif session != run.session:
                interval = float(now - last)
                run.shared, run.interval = True, interval
            if run.shared:
                run.kind, run.weight = shared_kind(interval), 1.0
            else:
                run.kind, run.weight = own, weight
            run.session, run.turn, run.last = session, turn, now
            if not run.marks:
                run.order = self._order = self._order + 1
            begun[run.kind] += blocks * run.weight
        for kind, total in enumerate(begun):
            if total:
                self.survival.begin(kind, now, total)

    def _continued(self, before: Run | None, lost: Run | None, node: Any) -> Run | None:
        """The last run of the request that this one goes on from; `lost` of its blocks are not wanted any more."""
        if before is None:
            return None
        children = node.children or {} if node is not None else {}
        if len(children) > FAN_OUT_MAX:
            return None
        if lost is None and before.ends and len(children) < FAN_OUT_MAX:
            return before
        for run in [lost] if lost else [self._runs.get(child) for child in children.values()]:
            if run and run.ends and run.blocks <= LOST_BLOCKS_MAX:
                return run
        return None

    def _entered(self, path: Sequence[Any], rest: bytes) -> tuple[list[tuple[Any, Run]], bytes]:
        """Nodes of a path (deepest first) that are in the tier, and the hashes of all that is behind the last of them."""
        known = [(node, run) for node in path if (run := self._runs.get(node))]
        if len(known) == len(path):
            return known, rest
        below = path[: path.index(known[0][0])] if known else path
        return known, b"".join([*(node.hashes for node in reversed(below)), rest])

    def _bound(self) -> None:
        most = max(GHOST_TURNS * self._slots(), GHOSTS_MIN)
        while self.ghosts.blocks > most and len(self.ghosts) > 1:
            self.ghosts.forget_oldest()

    def _lose(self, run: Run) -> None:
        """Nobody will see how long these blocks wait."""
        self.survival.lose(run.kind, run.last, run.blocks * run.weight, self._now)

    # -- what happens to nodes ----------------------------------------------------------------------------------------

    def add(self, node: Any) -> None:
        """Enter a node as the most recently used."""
        run = self._heads.pop(node, None) or self._take(node.hashes, node.last_use)
        run.order = self._order = self._order + 1
        self._runs[node] = run
        self._leaves.enter(node)

    def touch(self, nodes: Sequence[Any]) -> None:
        """Make nodes the most recently used, the last one most, without a request for them."""
        for node in nodes:
            if run := self._runs.get(node):
                run.order = self._order = self._order + 1
                self._leaves.place(node)

    def remove(self, node: Any) -> None:
        """Take a node out: it is a ghost now."""
        run = self._runs.pop(node)
        weight = run.weight * len(node)
        self.survival.change(run.kind, run.kind, run.last, run.weight * run.blocks, weight)
        self._haunt(run, marks_of(node.hashes))
        self._leaves.leave(node)

    def trimmed(self, node: Any, keep: int) -> None:
        """A node is about to lose all but its first `keep` blocks."""
        if run := self._runs.get(node):
            tail = run.part(min(run.blocks, len(node) - keep))
            run.blocks -= tail.blocks
            tail.ends, tail.behind, run.ends = run.ends, run.behind, False
            marks = marks_of(node.hashes[keep * HASH_BYTES :])
            self._haunt(tail, marks)
            run.behind = marks[:MARK_BYTES]

    def split(self, node: Any, head: Any, is_entered: bool) -> None:
        """The first blocks of a node are a node of their own, which is entered next if it is in the tier."""
        run = self._runs.get(node)
        if run and is_entered:
            blocks = min(run.blocks, len(head))  # fewer where a part was joined that is not in the tier
            self._heads[head] = run.part(blocks)
            run.blocks -= blocks
        self._leaves.split(node, head)

    def join(self, nodes: Sequence[Any]) -> None:
        """A line of only children, the first on top, is about to be the first one."""
        if runs := [run for node in nodes if (run := self._runs.pop(node, None))]:
            run = self._runs[nodes[0]] = runs[0]
            for other in runs[1:]:
                self._absorb(run, other)
            run.ends, run.behind = runs[-1].ends, runs[-1].behind
            run.order = max(other.order for other in runs)
        self._leaves.join(nodes)

    def alike(self, above: Any, node: Any) -> bool:
        """Whether a node and its only child may be one."""
        one, other = self._runs.get(above), self._runs.get(node)
        return not (one and other) or one.alike(other)

    def cuts(self, node: Any, hashes: bytes) -> list[int]:
        """Where blocks that are to be hung below a node have to be cut, for they are not alike: before these."""
        before, at, found = self._runs.get(node), 0, []
        for run, same in self.ghosts.along(marks_of(hashes), 0):
            if before and not before.alike(run):
                found.append(at)
            before, at = run, at + same
        return found

    def grown(self, node: Any, hashes: bytes) -> None:
        """Blocks were added to a node, all like those that it had."""
        if run := self._runs.get(node):
            other = self._take(hashes, node.last_use)
            self._absorb(run, other)
            run.ends, run.behind = other.ends, other.behind

    def _take(self, hashes: bytes, last: int) -> Run:
        """The ghosts of blocks that come into the tier, as one run; a new one where nobody has asked for them."""
        marks = marks_of(hashes)
        taken: Run | None = None
        for run, same in self.ghosts.along(marks, 0):
            if same < run.blocks:
                self.ghosts.cut(run, same)
            self.ghosts.pop(run)
            run.marks = b""
            if taken is None:
                taken = run
            else:
                self._absorb(taken, run)
                taken.ends, taken.behind = run.ends, run.behind
        missing = len(marks) // MARK_BYTES - (taken.blocks if taken else 0)
        if taken is None:
            taken = Run(0, last, 0, 1, own_kind(1, None), REQUEST_WEIGHT / missing)
        taken.blocks += missing
        self.survival.begin(taken.kind, taken.last, missing * taken.weight)
        return taken

    def _absorb(self, run: Run, other: Run) -> None:
        run.blocks += other.blocks
        if (other.kind, other.last, other.weight) != (run.kind, run.last, run.weight):
            self.survival.lose(other.kind, other.last, other.blocks * other.weight, self._now)
            self.survival.begin(run.kind, run.last, other.blocks * run.weight)

    def _haunt(self, run: Run, marks: bytes) -> None:
        """Make a ghost of a run, together with the one that was cut off its end before."""
        behind = self.ghosts.get(run.behind) if run.behind else None
        if behind and behind.alike(run) and behind.weight == run.weight:
            self.ghosts.pop(behind)
            marks += behind.marks
            run.ends, run.behind = behind.ends, behind.behind
        self.ghosts.put(run, marks)


def own_kind(turn: int, hint: str | None) -> int:
    """The class of blocks of one conversation, by its turns and why the last one ended (None: not known)."""
    reason = HINTS.get(hint, OTHER_HINT) if hint else 0
    return reason * len(set(TURNS_OF_KIND)) + TURNS_OF_KIND[min(turn, len(TURNS_OF_KIND) - 1)]


def shared_kind(interval_ms: float) -> int:
    """The class of blocks that several conversations read, by the time between reads in octaves from 1/4 s."""
    return OWN_KINDS + min(KINDS - OWN_KINDS, int(interval_ms / 250 + 1).bit_length()) - 1

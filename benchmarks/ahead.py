"""What hot children would bring if they came up by themselves: `python -m benchmarks.ahead TRACE ... [--restart N]`.

After each request, what has followed before on the prefix that was read comes up from nvme, most used first, through the
daemon's own cache, whose counters are printed. All of it has come before the next request: nothing is late, and no medium is
busy, so this is what prefetch could bring at best. A rule says what may go for it; `--restart` empties cpu after every N
requests.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from pathlib import Path

import numpy as np

from tierd.block import HASH_BYTES
from tierd.core.ahead import FATES, PREFETCHED
from tierd.core.index import Node
from tierd.core.plan import PREFETCH, Lease
from tierd.core.pool import Pool
from tierd.replay.house import SESSION, House
from tierd.replay.run import slots_of
from tierd.replay.trace import Trace, read_trace

BLOCKS_MAX, NODES_MAX = 64, 32
"""What may be fetched after one request, and how many runs of blocks are looked at for it."""
RULES: dict[str, Callable[[Node, Node], bool]] = {
    "free": lambda child, coldest: False,
    "colder": lambda child, coldest: coldest.last_use < child.last_use,
    "less used": lambda child, coldest: coldest.uses < child.uses,
    "anything": lambda child, coldest: True,
}
"""Whether a child may take the room of the coldest blocks of cpu, once none is free."""


class Foresight(House):
    """A house that fetches ahead by a rule; None: it does not."""

    def __init__(self, slots: Mapping[str, int], rule: str | None) -> None:
        super().__init__(slots, {})
        self._may_take = RULES[rule] if rule else None

    def request(self, hashes: bytes, now: int) -> int:
        """As without prefetch; then what may be asked for next is brought up."""
        hit = super().request(hashes, now)
        if self._may_take and hit:
            for node, first, end in self._wanted(hashes[: hit * HASH_BYTES], self._may_take):
                self._fetch(node, first, end, now)
        return hit

    def restart(self) -> None:
        """Memory is lost, nvme is not."""
        pool, order = self._pool, self.index.orders[self._tier]
        self.cache.close_session(SESSION)
        for node in list(order.coldest()):
            pool.retire(self.index.clear(self._tier, node, np.flatnonzero(node.slots[self._tier] >= 0)))
            self.index.trim([node])
        self.cache.open_session(SESSION, 0, self._tier)

    @property
    def _pool(self) -> Pool:
        return self.cache.pools[self._tier]

    def _wanted(self, read: bytes, may_take: Callable[[Node, Node], bool]) -> list[tuple[Node, int, int]]:
        """Blocks that are below alone, as parts of nodes from the first to behind the last; all, before any is moved."""
        room, left, found = self._pool.free, BLOCKS_MAX, []
        last, start, blocks = (self.index.match(read) or [])[-1]
        coldest = next(self.index.orders[self._tier].coldest())
        for node in hottest(last) if start + blocks == len(last) else ():
            missing = (node.slots[self._tier] < 0).nonzero()[0][:left]
            if len(missing) and (len(missing) <= room or may_take(node, coldest)):
                found.append((node, int(missing[0]), int(missing[-1]) + 1))
                room, left = max(room - len(missing), 0), left - len(missing)
            if not left:
                break
        return found

    def _fetch(self, node: Node, first: int, end: int, now: int) -> None:
        """As the verb does it, but nobody has asked: it is no use of the blocks."""
        assert node.parent is not None
        hashes, slots = node.hashes[: end * HASH_BYTES], node.slots[:, :end].copy()
        nobody = Lease(0, 0, self._tier, node.parent.last_hash, hashes, slots, end, np.zeros(end, np.bool_))
        self.cache._promotion.start(nobody, first, PREFETCH, now)
        self._move(now)


def hottest(node: Node) -> Iterator[Node]:
    """What is behind a node, the most used first, and of two the one that was used last; no more than NODES_MAX."""

    def entries(of: Node) -> list[tuple[int, int, int, Node]]:
        return [(-child.uses, -child.last_use, child.id, child) for child in (of.children or {}).values()]

    heap = entries(node)
    heapify(heap)
    for _ in range(NODES_MAX):
        if not heap:
            return
        *_, child = heappop(heap)
        yield child
        for entry in entries(child):
            heappush(heap, entry)


def main() -> None:
    """A line for each trace and rule."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--cpu", type=float, default=0.01, help="size of cpu, as a share of the trace's unique blocks")
    parser.add_argument("--nvme", type=float, default=0.1, help="size of nvme, likewise")
    parser.add_argument("--restart", type=int, default=0, metavar="N", help="lose what is in memory after every N requests")
    parser.add_argument("--rule", choices=RULES, action="append", help="only this one (may be given several times)")
    options = parser.parse_args()
    for file in options.traces:
        trace = read_trace(file)
        slots = {tier: slots_of(trace, share) for tier, share in (("cpu", options.cpu), ("nvme", options.nvme))}
        for rule in (None, *(options.rule or RULES)):
            print(f"{trace.name}, {rule or 'no prefetch'}: {measured(trace, slots, rule, options.restart)}", flush=True)


def measured(trace: Trace, slots: Mapping[str, int], rule: str | None, restart: int = 0) -> str:
    """Hits of both tiers and of cpu, what was prefetched and how much of that was used."""
    house = Foresight(slots, rule)
    hits = 0
    for number, (request, chain) in enumerate(zip(trace.requests, trace.hashes(), strict=True), 1):
        hits += house.request(chain, request.now)
        if restart and number % restart == 0:
            house.restart()
    useful, late, wasted = (house.cache.counters[PREFETCHED, fate] for fate in FATES)
    moved = useful + late + wasted + house.cache.pools[0].ahead.unused
    return (
        f"hits {hits / trace.accesses:.2%}, from cpu {house.hits['cpu'] / trace.accesses:.2%}, "
        f"{moved:,} blocks prefetched, {useful:,} of them useful"
    )


if __name__ == "__main__":
    main()

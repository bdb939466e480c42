"""Every policy over a trace at every capacity: what `tierd replay` computes, one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tierd.clock import monotonic_seconds
from tierd.core.policies import POLICIES as NAMES
from tierd.core.policy.opt import best, next_uses
from tierd.errors import Invalid
from tierd.replay.shelf import Shelf
from tierd.replay.trace import Trace

Row = dict[str, Any]
OPT = "opt"
POLICIES = (*NAMES, OPT)
REQUESTS_BETWEEN_REPORTS = 64


def replay(
    trace: Trace, policies: Sequence[str], shares: Sequence[float], progress: Callable[[str, int], None]
) -> Iterator[Row]:
    """A row for each policy and capacity (a share of the trace's unique blocks), capacity by capacity.

    `progress` is called with what is going on and the number of requests that it has come to.
    """
    uses = next_uses([request.blocks for request in trace.requests], trace.unique_blocks) if OPT in policies else []
    hashes = list(trace.hashes())
    for share in shares:
        slots = slots_of(trace, share)
        for policy in policies:
            say = f"{policy} at {share:.2%}"
            if policy == OPT:
                progress(say, 0)
                yield optimum(trace, uses, share, slots)
            else:
                yield measured(trace, hashes, policy, share, slots, lambda done, say=say: progress(say, done))  # type: ignore[misc]


def slots_of(trace: Trace, share: float) -> int:
    """How many blocks a share of the trace's is; Invalid when that is none."""
    slots = int(trace.unique_blocks * share)
    if not slots:
        least = 1 / trace.unique_blocks
        raise Invalid(f"capacity {share:g} of {trace.unique_blocks} unique blocks is not one block: give at least {least:.1g}")
    return slots


def measured(trace: Trace, hashes: list[bytes], policy: str, share: float, slots: int, progress: Callable[[int], None]) -> Row:
    """One policy at one capacity. Block operations are blocks asked for, entered and evicted, by the time all that took."""
    shelf = Shelf(slots, policy)
    hit_blocks = hit_tokens = 0
    seconds = 0.0
    for number, (request, chain) in enumerate(zip(trace.requests, hashes, strict=True)):
        if number % REQUESTS_BETWEEN_REPORTS == 0:
            progress(number)
        started = monotonic_seconds()
        hit = shelf.request(chain, request.now)
        if request.stop:
            shelf.turn_ended(chain, request.stop)
        seconds += monotonic_seconds() - started
        hit_blocks += hit
        hit_tokens += min(hit * trace.block_tokens, request.tokens)
    operations = trace.accesses + shelf.written + shelf.evicted
    return {
        **row(trace, policy, share, slots, hit_blocks, hit_tokens, shelf.written),
        "dead_writes": shelf.dead,
        "block_ops_per_second": operations / max(seconds, 1e-9),
    }


def optimum(trace: Trace, uses: list[list[tuple[int, int]]], share: float, slots: int) -> Row:
    """The best that is possible. It writes nothing that is not read, and its speed is that of looking into the future."""
    started = monotonic_seconds()
    found = best(uses, slots)
    seconds = monotonic_seconds() - started
    hits = found.hits.tolist()
    tokens = sum(min(hit * trace.block_tokens, request.tokens) for hit, request in zip(hits, trace.requests, strict=True))
    return {
        **row(trace, OPT, share, slots, sum(hits), tokens, found.writes),
        "dead_writes": 0,
        "block_ops_per_second": (trace.accesses + 2 * found.writes) / max(seconds, 1e-9),
    }


def row(trace: Trace, policy: str, share: float, slots: int, blocks: int, tokens: int, written: int) -> Row:
    """What all policies have in common; hits are shares of all blocks and tokens asked for."""
    return {
        "policy": policy,
        "capacity_share": share,
        "capacity_blocks": slots,
        "block_hit": blocks / trace.accesses,
        "token_hit": tokens / max(trace.tokens, 1),
        "tier_reads": blocks,
        "tier_writes": written,
    }

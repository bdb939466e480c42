"""Every policy over a trace at every capacity: what `tierd replay` computes, one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tierd.clock import monotonic_seconds
from tierd.core.admission import ADMISSIONS, EVERYTHING, POLICY
from tierd.core.policies import POLICIES as NAMES
from tierd.core.policy.opt import best, next_uses
from tierd.errors import Invalid
from tierd.replay.house import House
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


def replay_tiers(
    trace: Trace, settings: Sequence[str], shares: Mapping[str, float], progress: Callable[[str, int], None]
) -> Iterator[Row]:
    """A row for each setting of a cpu tier over an nvme tier, which are shares of the trace's unique blocks; the optimum's is
    that of one tier as large as both.
    """
    hashes = list(trace.hashes())
    for setting in settings:
        progress(setting, 0)
        if setting == OPT:
            uses = next_uses([request.blocks for request in trace.requests], trace.unique_blocks)
            slots = sum(slots_of(trace, share) for share in shares.values())
            yield optimum(trace, uses, sum(shares.values()), slots)
        else:
            yield measured_tiers(trace, hashes, setting, shares, lambda done, say=setting: progress(say, done))  # type: ignore[misc]


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
    hit_blocks, hit_tokens, seconds = play(trace, hashes, shelf, progress)
    operations = trace.accesses + shelf.written + shelf.evicted
    return {
        **row(trace, policy, share, slots, hit_blocks, hit_tokens, shelf.written),
        "dead_writes": shelf.dead,
        "block_ops_per_second": operations / max(seconds, 1e-9),
    }


def measured_tiers(
    trace: Trace, hashes: list[bytes], setting: str, shares: Mapping[str, float], progress: Callable[[int], None]
) -> Row:
    """One setting of two tiers. What one tier's row says of it, this says of nvme, and of both by their names."""
    policies, admission = parse_setting(setting, shares)
    slots = {tier: slots_of(trace, share) for tier, share in shares.items()}
    house = House(slots, policies, admission)
    hit_blocks, hit_tokens, seconds = play(trace, hashes, house, progress)
    tiers = {
        tier: {
            "capacity_blocks": slots[tier],
            "block_hit": house.hits[tier] / trace.accesses,
            "tier_writes": house.written[tier],
            "dead_writes": house.dead[tier],
        }
        for tier in slots
    }
    return {
        **row(trace, setting, shares["nvme"], slots["nvme"], hit_blocks, hit_tokens, house.written["nvme"]),
        "dead_writes": house.dead["nvme"],
        "block_ops_per_second": (trace.accesses + house.operations) / max(seconds, 1e-9),
        "tiers": tiers,
    }


def play(trace: Trace, hashes: list[bytes], to: Shelf | House, progress: Callable[[int], None]) -> tuple[int, int, float]:
    """All requests, one after the other; returns the blocks and tokens that were hits, and the seconds that it took."""
    hit_blocks = hit_tokens = 0
    seconds = 0.0
    for number, (request, chain) in enumerate(zip(trace.requests, hashes, strict=True)):
        if number % REQUESTS_BETWEEN_REPORTS == 0:
            progress(number)
        started = monotonic_seconds()
        hit = to.request(chain, request.now)
        if request.stop:
            to.turn_ended(chain, request.stop)
        seconds += monotonic_seconds() - started
        hit_blocks += hit
        hit_tokens += min(hit * trace.block_tokens, request.tokens)
    return hit_blocks, hit_tokens, seconds


def parse_setting(text: str, tiers: Iterable[str]) -> tuple[dict[str, str], str]:
    """Policies by tier and the admission of a setting such as `lru`, `chd/lru` (cpu, nvme) or `chd/chd/policy`; Invalid
    when there is no such thing.
    """
    names, parts = list(tiers), text.split("/")
    admission = parts.pop() if len(parts) == len(names) + 1 and len(names) > 1 else EVERYTHING
    parts = parts * len(names) if len(parts) == 1 else parts
    if len(parts) != len(names) or not set(parts) <= NAMES.keys():
        form = "" if len(names) == 1 else ", or two of them as cpu/nvme, or cpu/nvme/admission"
        raise Invalid(f"--policy {text!r} is unknown: give some of {', '.join(POLICIES)}{form}")
    if admission not in ADMISSIONS:
        raise Invalid(f"--policy {text!r}: admission {admission!r} is unknown: it is {' or '.join(ADMISSIONS)}")
    if admission == POLICY and parts[-1] != "chd":
        raise Invalid(f"--policy {text!r}: only chd can turn blocks away; admission by policy needs it in nvme")
    return dict(zip(names, parts, strict=True)), admission


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

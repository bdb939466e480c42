"""Replay a trace of requests through this daemon's index and eviction policies, to choose a policy for such traffic.

A trace has one JSON object a line, plain or gzip: timestamp (ms), input_length (tokens), hash_ids (the prompt's blocks), and
where known stop (why the turn ended). OPT is the best that is possible for whoever knows the future.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tierd.cli.status import table
from tierd.errors import Invalid
from tierd.replay.progress import Progress
from tierd.replay.run import OPT, POLICIES, parse_setting, replay, replay_tiers, slots_of
from tierd.replay.trace import Trace, read_trace

DEFAULT_POLICIES = "lru,chd,opt"
DEFAULT_CAPACITIES = "0.005,0.01,0.02,0.05,0.1,0.2"


def add_arguments(parser: ArgumentParser) -> None:
    """Which trace, which policies and how large a tier."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="the trace, as JSON lines, plain or .gz")
    parser.add_argument(
        "--policy",
        default=DEFAULT_POLICIES,
        metavar="NAME,...",
        help=f"of {', '.join(POLICIES)} (default: {DEFAULT_POLICIES}; opt is always there)",
    )
    parser.add_argument(
        "--capacity",
        default=DEFAULT_CAPACITIES,
        metavar="SHARE,...",
        help=f"tier sizes, as shares of the trace's unique blocks (default: {DEFAULT_CAPACITIES})",
    )
    parser.add_argument(
        "--tiers",
        metavar="cpu=SHARE,nvme=SHARE",
        help="two tiers instead of one; a policy may then be cpu/nvme or cpu/nvme/admission, such as chd/lru/second-sight",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot hit rates over capacity (needs tierd[replay])")


def run(options: Namespace) -> int:
    """Everything is checked before the first request is replayed."""
    tiers = parse_tiers(options.tiers) if options.tiers else {}
    policies = parse_policies(options.policy, tiers or ("cpu",))
    shares = list(tiers.values()) or parse_capacities(options.capacity)
    if tiers and options.plot:
        raise Invalid("--plot draws hits over capacity: leave --tiers out")
    if options.plot:
        from tierd.replay.plot import check_plot, plot

        check_plot(options.plot)
    with Progress() as progress:
        trace = read_trace(options.trace, lambda done, total: progress.show("reading", done, total))
        for share in shares:
            slots_of(trace, share)
        requests = len(trace.requests)

        def show(what: str, done: int) -> None:
            progress.show(what, done, requests)

        rows = list(replay_tiers(trace, policies, tiers, show) if tiers else replay(trace, policies, shares, show))
    text = as_text_of_tiers if tiers else as_text
    print(json.dumps(as_object(trace, rows)) if options.json else "\n".join(text(trace, rows)))
    if options.plot:
        plot(options.plot, trace.name, rows)
    return 0


def parse_policies(text: str, tiers: Iterable[str]) -> list[str]:
    """Names in the order given, opt among them; Invalid when one is unknown."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name != OPT:
            parse_setting(name, tiers)
    if not names:
        raise Invalid(f"--policy names none: give some of {', '.join(POLICIES)}")
    return names if OPT in names else [*names, OPT]


def parse_tiers(text: str) -> dict[str, float]:
    """Shares of cpu and nvme, in this order."""
    pairs = dict(pair.strip().partition("=")[::2] for pair in text.split(","))
    if pairs.keys() != {"cpu", "nvme"}:
        raise Invalid(f"--tiers {text!r}: give a share for each of cpu and nvme, such as cpu=0.01,nvme=0.1")
    return {tier: parse_capacities(pairs[tier])[0] for tier in ("cpu", "nvme")}


def parse_capacities(text: str) -> list[float]:
    """Shares over 0 and at most 1, in the order given."""
    shares = []
    for part in text.split(","):
        try:
            share = float(part)
        except ValueError:
            share = float("nan")
        if not 0 < share <= 1:
            raise Invalid(f"--capacity {part.strip()!r} is impossible: give shares over 0 and up to 1, such as 0.005,0.01")
        shares.append(share)
    return list(dict.fromkeys(shares))


def as_object(trace: Trace, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For programs."""
    return {
        "trace": trace.name,
        "requests": len(trace.requests),
        "block_accesses": trace.accesses,
        "unique_blocks": trace.unique_blocks,
        "block_tokens": trace.block_tokens,
        "rows": list(rows),
    }


def as_text(trace: Trace, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For a person."""
    yield (
        f"{trace.name}: {len(trace.requests):,} requests ask for {trace.accesses:,} blocks of {trace.block_tokens} tokens,"
        f" {trace.unique_blocks:,} of them different"
    )
    yield ""
    titles = ("capacity", "blocks", "policy", "block hits", "token hits", "read", "written", "dead", "ops/s")
    yield from table([titles, *(cells(row) for row in rows)], right=range(len(titles)))
    yield ""
    yield "capacity: share of the different blocks; read, written: blocks, of or into the tier; dead: evicted and never read;"
    yield "ops: blocks asked for, entered and evicted; opt: best possible, knowing the future, and free to let nothing in"


def as_text_of_tiers(trace: Trace, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For a person, with what each of two tiers did."""
    asked = f"{len(trace.requests):,} requests ask for {trace.accesses:,} blocks"
    yield f"{trace.name}: {asked}, {trace.unique_blocks:,} of them different"
    yield ""
    titles = ("cpu/nvme/admission", "block hits", "from cpu", "from nvme", "cpu written", "nvme written", "nvme dead", "ops/s")
    yield from table([titles, *(cells_of_tiers(row) for row in rows)], right=range(1, len(titles)))
    yield ""
    yield "written: blocks into a tier; dead: gone from nvme and never read there; opt: the best for one tier as large as both"


def cells_of_tiers(row: dict[str, Any]) -> tuple[str, ...]:
    if row["policy"] == OPT:
        return (OPT, f"{row['block_hit']:.2%}", "", "", "", "", "", "")
    cpu, nvme = row["tiers"]["cpu"], row["tiers"]["nvme"]
    return (
        row["policy"],
        f"{row['block_hit']:.2%}",
        f"{cpu['block_hit']:.2%}",
        f"{nvme['block_hit']:.2%}",
        f"{cpu['tier_writes']:,}",
        f"{nvme['tier_writes']:,}",
        f"{nvme['dead_writes']:,}",
        f"{row['block_ops_per_second']:,.0f}",
    )


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['capacity_share']:.2%}",
        f"{row['capacity_blocks']:,}",
        row["policy"],
        f"{row['block_hit']:.2%}",
        f"{row['token_hit']:.2%}",
        f"{row['tier_reads']:,}",
        f"{row['tier_writes']:,}",
        f"{row['dead_writes']:,}",
        f"{row['block_ops_per_second']:,.0f}" if row["policy"] != OPT else "",
    )

"""Every policy on every trace given, at every capacity and in two tiers: tables and plots of docs/policies.md.

`make policies TRACES="a.jsonl.gz b.jsonl.gz"`. Hits, writes and the share of the gap from lru to opt that is closed do not
depend on the machine; operations per second do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tierd.core.admission import EVERYTHING, LEARNED
from tierd.core.policies import POLICIES
from tierd.replay.plot import plot
from tierd.replay.progress import Progress
from tierd.replay.run import OPT, Row, replay, replay_tiers
from tierd.replay.trace import Trace, read_trace

DOCUMENT, PLOTS = Path("docs/policies.md"), Path("docs/policies")
BEGIN, END = "<!-- begin: written by make policies -->", "<!-- end -->"
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
NAMES = (*POLICIES, OPT)
GAP_MIN = 0.01
"""Where less than this is to be won over lru, the gap closed is noise."""

CPU, NVME = 0.01, 0.1
SETTINGS = (
    "lru/lru/everything",
    "chd/lru/everything",
    "chd/chd/everything",
    "lru/lru/learned",
    "chd/lru/learned",
    "chd/chd/learned",
    "lru/lru/second-sight",
    "chd/chd/policy",
    OPT,
)
SIZES = (0.03, 0.05, 0.1, 0.2, 0.4)
ADMITTED = (EVERYTHING, LEARNED)


def main() -> None:
    """Measure, plot and write."""
    files = [Path(name) for name in sys.argv[1:]]
    if not files:
        sys.exit('make policies needs traces: TRACES="one.jsonl.gz other.jsonl.gz"')
    PLOTS.mkdir(exist_ok=True)
    parts = []
    with Progress() as progress:
        for file in files:
            trace = read_trace(file)

            def show(what: str, done: int, total: int = len(trace.requests)) -> None:
                progress.show(what, done, total)

            rows = list(replay(trace, NAMES, SHARES, show))
            plot(PLOTS / f"{trace.name}.png", trace.name, rows)
            tiers = list(replay_tiers(trace, SETTINGS, {"cpu": CPU, "nvme": NVME}, show))
            sizes = [
                list(replay_tiers(trace, [f"lru/lru/{kind}" for kind in ADMITTED], {"cpu": CPU, "nvme": size}, show))
                for size in SIZES
            ]
            parts.append("\n".join([*section(trace, rows), *two_tiers(tiers), *by_size(sizes)]))
    before, rest = DOCUMENT.read_text().split(BEGIN)
    text = "\n\n".join(parts)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    print(text)


def section(trace: Trace, rows: list[Row]) -> Iterator[str]:
    """One trace's tables."""
    cell = {(row["policy"], row["capacity_share"]): row for row in rows}
    yield f"### {trace.name}\n"
    yield (
        f"{len(trace.requests):,} requests for {trace.accesses:,} blocks of {trace.block_tokens} tokens,"
        f" {trace.unique_blocks:,} of them different.\n"
    )
    yield f"![hits over capacity](policies/{trace.name}.png)\n"
    yield from head("block hits, %")
    for share in SHARES:
        yield line(share, [f"{100 * cell[name, share]['block_hit']:.2f}" for name in NAMES])
    yield line("gap closed", [gap(cell, name) for name in NAMES])
    yield ""
    yield from head("written, of lru's")
    for share in SHARES:
        lru = cell["lru", share]["tier_writes"]
        yield line(share, [f"{cell[name, share]['tier_writes'] / lru:.0%}" for name in NAMES])
    least = {name: min(cell[name, share]["block_ops_per_second"] for share in SHARES) for name in POLICIES}
    yield line("ops/s, least", [*(f"{speed / 1000:,.0f} k" for speed in least.values()), ""])


def two_tiers(rows: list[Row]) -> Iterator[str]:
    """The table of all settings at one pair of sizes."""
    yield from ("", f"cpu {CPU:.0%}, nvme {NVME:.0%}:", "")
    yield "| cpu / nvme / admission | hits | from cpu | from nvme | written to nvme | of them gone unread |"
    yield "|---|" + "---:|" * 5
    for row in rows:
        cells = [f"{row['block_hit']:.2%}"]
        if tiers := row.get("tiers"):
            cells += [f"{tiers[tier]['block_hit']:.2%}" for tier in ("cpu", "nvme")]
            cells += [f"{row['tier_writes']:,}", f"{row['dead_writes'] / row['tier_writes']:.0%}"]
        name = "opt, one tier of both sizes" if row["policy"] == OPT else row["policy"].replace("/", " / ")
        yield f"| {name} | {' | '.join(cells + [''] * (5 - len(cells)))} |"


def by_size(rows: list[list[Row]]) -> Iterator[str]:
    """What learned admission does where nvme holds less and more."""
    yield from ("", f"lru in both tiers, cpu {CPU:.0%}, nvme of several sizes:", "")
    yield "| nvme | " + " | ".join(f"{kind}: hits | written to nvme" for kind in ADMITTED) + " |"
    yield "|---|" + "---:|" * 2 * len(ADMITTED)
    for size, pair in zip(SIZES, rows, strict=True):
        yield line(size, [cell for row in pair for cell in (f"{row['block_hit']:.2%}", f"{row['tier_writes']:,}")])


def head(title: str) -> list[str]:
    """The first lines of a table."""
    return [f"| {title} | {' | '.join(NAMES)} |", "|---|" + "---:|" * len(NAMES)]


def line(first: str | float, cells: list[str]) -> str:
    """A row of a table."""
    return f"| {first if isinstance(first, str) else f'{100 * first:g} %'} | {' | '.join(cells)} |"


def gap(cell: dict[tuple[str, float], Row], policy: str) -> str:
    """How much of what opt has over lru a policy has, over all capacities where that is a point or more."""
    won = room = 0.0
    for share in SHARES:
        lru, opt, mine = (cell[name, share]["block_hit"] for name in ("lru", OPT, policy))
        if opt - lru >= GAP_MIN:
            won, room = won + mine - lru, room + opt - lru
    return f"{won / room:.1%}" if room else ""


if __name__ == "__main__":
    main()

"""Every policy on every trace given, at every capacity: tables and plots of docs/policies.md.

`make policies TRACES="a.jsonl.gz b.jsonl.gz"`. Hits, writes and the share of the gap from lru to opt that is closed do not
depend on the machine; operations per second do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tierd.core.policies import POLICIES
from tierd.replay.plot import plot
from tierd.replay.progress import Progress
from tierd.replay.run import OPT, Row, replay
from tierd.replay.trace import Trace, read_trace

DOCUMENT, PLOTS = Path("docs/policies.md"), Path("docs/policies")
BEGIN, END = "<!-- begin: written by make policies -->", "<!-- end -->"
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
NAMES = (*POLICIES, OPT)
GAP_MIN = 0.01
"""Where less than this is to be won over lru, the gap closed is noise."""


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
            requests = len(trace.requests)
            rows = list(replay(trace, NAMES, SHARES, lambda what, done, total=requests: progress.show(what, done, total)))  # type: ignore[misc]
            plot(PLOTS / f"{trace.name}.png", trace.name, rows)
            parts.append("\n".join(section(trace, rows)))
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

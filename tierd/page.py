"""The page at `/` of the metrics port: tiers, hit rate and transfers of the last minutes, for a person with a browser.

It is one HTML text without scripts and without anything to load, made anew at each request; the browser asks again by itself.
Like /metrics it is open to every user of the machine, so it names no namespace, model or client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from tierd.core.ladder import TIERS
from tierd.recent import Sample
from tierd.values import rounded_size

REFRESH_SECONDS = 5
HEADERS = [
    ("Content-Type", "text/html; charset=utf-8"),
    ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
    ("Cache-Control", "no-store"),
]
WIDTH, HEIGHT = 300, 40
"""Of a graph, in its own units."""
STYLE = """
:root { color-scheme: light dark; --line: #2a78d6; --soft: #8888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--soft); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
meter { width: 12rem; height: 1.1rem; } svg { width: 18rem; height: 2.4rem; vertical-align: middle; }
polyline { fill: none; stroke: var(--line); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.state { font-weight: 600; } .quiet { opacity: .7; }
"""


def page(status: Mapping[str, Any], samples: Sequence[Sample], state: str) -> str:
    """The whole text. `state` is what /readyz says."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">',
            f"<title>tierd: {escape(state)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            *head(status, state),
            *tiers(status["tiers"]),
            *hits(status["lookup_blocks"], samples),
            *transfers(samples),
            '<p class="quiet">The page asks again every few seconds. For programs: <a href="/metrics">/metrics</a>,',
            '<a href="/readyz">/readyz</a>; in a terminal: <code>tierd top</code>.</p>\n</body>\n</html>\n',
        ]
    )


def head(status: Mapping[str, Any], state: str) -> Iterator[str]:
    hours, minutes = divmod(int(status["uptime_seconds"]) // 60, 60)
    io = f"NVMe by {status['io']['engine']}, {status['io']['path']}" if status["io"]["engine"] != "none" else "no NVMe"
    yield f"<h1>tierd {escape(status['version'])}</h1>"
    yield f'<p><span class="state" id="state">{escape(state)}</span>, up {hours} h {minutes} min, {escape(io)},'
    yield f"{status['sessions']:,} clients, {status['checksum_failures']:,} damaged blocks</p>"


def tiers(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """How full each tier is."""
    yield '<h2>Tiers</h2>\n<table id="tiers">'
    yield "<tr><th>tier</th><th></th><th>used</th><th>limit</th><th>blocks</th><th>free slots</th></tr>"
    for name, tier in found.items():
        used, most, slots = tier["used_bytes"], tier["limit_bytes"], tier["slots"]
        bar = f'<meter max="{most}" value="{used}">{used / most:.0%}</meter>'
        numbers = (rounded_size(used), rounded_size(most), f"{slots.get('ready', 0):,}", f"{slots.get('free', 0):,}")
        yield row(escape(name), bar, *numbers)
    yield "</table>"


def hits(lookups: Mapping[str, int], samples: Sequence[Sample]) -> Iterator[str]:
    """How much of what was asked for was found."""
    asked = [new.asked - old.asked for old, new in pairwise(samples)]
    found = [new.found - old.found for old, new in pairwise(samples)]
    shares = [one / of if of else 0.0 for one, of in zip(found, asked, strict=True)]
    yield '<h2>Blocks asked for and found</h2>\n<table id="hits">'
    yield "<tr><th></th><th>asked</th><th>found</th><th></th></tr>"
    yield row("last minutes", f"{sum(asked):,}", share(sum(found), sum(asked)), graph("share found", shares, 1.0))
    total = sum(lookups.values())
    where = ", ".join(f"{tier} {number / total:.1%}" for tier, number in lookups.items() if number)
    yield row("since the start", f"{total:,}", share(sum(lookups[tier] for tier in TIERS), total), escape(where))
    yield "</table>"


def transfers(samples: Sequence[Sample]) -> Iterator[str]:
    """What moved between tiers."""
    yield '<h2>Transfers of the last minutes</h2>\n<table id="transfers">'
    yield "<tr><th>way</th><th>now</th><th>most</th><th>bytes</th><th></th></tr>"
    ways = sorted(samples[-1].moved) if samples else []
    for way in ways:
        moved = [(new.moved.get(way, 0) - old.moved.get(way, 0), new.seconds - old.seconds) for old, new in pairwise(samples)]
        speeds = [count / max(seconds, 1e-9) for count, seconds in moved]
        now, most, total = (speeds or [0.0])[-1], max(speeds, default=0.0), sum(count for count, _ in moved)
        numbers = (f"{rounded_size(int(now))}/s", f"{rounded_size(int(most))}/s", rounded_size(total))
        yield row(escape(" to ".join(way)), *numbers, graph("bytes a second", speeds, most))
    if not ways:
        yield row("nothing has moved yet")
    yield "</table>"


def row(*cells: str) -> str:
    """A row of cells that are HTML already."""
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def graph(title: str, values: Sequence[float], most: float) -> str:
    """A line over time, the newest value at the right; `most` is the top."""
    if len(values) < 2:
        return ""
    step = WIDTH / (len(values) - 1)
    points = " ".join(
        f"{at * step:.1f},{HEIGHT - 2 - (HEIGHT - 4) * value / (most or 1):.1f}" for at, value in enumerate(values)
    )
    label = f"{escape(title)}, the last {len(values)} samples"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<polyline points="{points}"/></svg>'
    )

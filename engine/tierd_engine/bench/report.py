"""Tables for the terminal, and one HTML page that needs nothing else."""

from __future__ import annotations

from html import escape
from typing import Any

from rich import box
from rich.table import Table

BAR, GAP, LEFT, TOP, HEIGHT = 34, 26, 60, 30, 240
COLORS = {"off": "#8a8f98", "cpu": "#2f6fdf", "cpu+nvme": "#1f9d6a", "all": "#d9822b"}
COLUMNS = (
    "workload",
    "mode",
    "block",
    "requests",
    "first token p50",
    "p95",
    "tokens/s",
    "prefill",
    "of min",
    "CPU s/request",
    "daemon's",
    "waited",
    "preempted",
    "declined",
)
PAIRED = ("workload", "mode", "first token earlier", "time", "at most (95 %)", "CPU s/request")


def table(report: dict[str, Any]) -> list[Table]:
    """What was measured (medians), and what pages are worth against contiguous reservation."""
    first = Table(*COLUMNS, title=f"Medians of {report['rounds']} rounds", box=box.SIMPLE)
    second = Table(
        "workload", "block", "sequences that fit", "contiguous", "slots used", "contiguous", title="Memory", box=box.SIMPLE
    )
    third = Table("workload", "mode", "blocks looked up, by where they were", title="Hits", box=box.SIMPLE)
    for result in report["results"]:
        one, key = result["median"], [result["workload"], result["mode"], str(result["block_tokens"])]
        first.add_row(*key, *figures(one))
        tiers = ", ".join(f"{tier} {blocks:g}" for tier, blocks in one["blocks_by_tier"].items() if blocks)
        third.add_row(result["workload"], f"{result['mode']}, {result['block_tokens']}", tiers)
        if result["mode"] == "off" or result["block_tokens"] != 16:
            contiguous = f"{one['sequences_fit_contiguous']:g}", f"{one['utilisation_contiguous']:.0%}"
            used = f"{one['utilisation']:.0%}"
            second.add_row(key[0], key[2], f"{one['sequences_fit']:g}", contiguous[0], used, contiguous[1])
    return [first, against_off(report["paired"]), third, second]


def against_off(pairs: list[dict[str, Any]]) -> Table:
    """What each mode is worth and costs, round by round."""
    shown = Table(*PAIRED, title="Against the same round without tierd", box=box.SIMPLE)
    for one in pairs:
        shown.add_row(*pair_figures(one))
    return shown


def pair_figures(one: dict[str, Any]) -> list[str]:
    """A row of `against_off`."""
    most = one["seconds_ratio_most"]
    return [
        one["workload"],
        one["mode"],
        f"{one['first_token_times_earlier']:.1f}x",
        f"{one['seconds_ratio']:.3f}",
        "too few rounds" if most is None else f"{most:.3f}",
        f"{one['cpu_ratio']:.3f}",
    ]


def figures(one: dict[str, Any]) -> list[str]:
    """A row's numbers, behind the names of its case."""
    return [
        f"{one['requests']:g}",
        f"{one['first_token_p50_seconds'] * 1000:.0f} ms",
        f"{one['first_token_p95_seconds'] * 1000:.0f} ms",
        f"{one['tokens_per_second']:.1f}",
        f"{one['prefill_tokens']:g}",
        f"{one['prefill_tokens'] / one['prefill_tokens_min']:.2f}",
        f"{one['cpu_seconds_per_request']:.3f}",
        f"{one['daemon_cpu_seconds_per_request']:.3f}",
        *(f"{one[name]:g}" for name in ("steps_waited", "preemptions", "loads_declined")),
    ]


def html(report: dict[str, Any], machine: str) -> str:
    """A page with the plot, the table and what it ran on."""
    results = report["results"]
    rows = "".join(cells([one["workload"], one["mode"], str(one["block_tokens"]), *figures(one["median"])]) for one in results)
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    plain = [one for one in results if one["block_tokens"] == 16]
    sweep = [one for one in results if one["workload"] == results[0]["workload"] and one["mode"] == sweep_mode(results)]
    plots = [
        plot("Time to first token, p50, ms", plain, lambda one: one["first_token_p50_seconds"] * 1000, "workload", "mode"),
        plot("Prompt tokens computed, over the least possible", plain, prefill_share, "workload", "mode"),
        plot("Block size: CPU seconds per request", sweep, lambda one: one["cpu_seconds_per_request"], "block_tokens", "mode"),
    ]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>tierd-engine bench</title>
<style>body {{ font: 14px system-ui, sans-serif; margin: 2em; }} td, th {{ padding: .2em .8em; text-align: right; }}
td:nth-child(-n+2), th:nth-child(-n+2) {{ text-align: left; }} svg text {{ font: 12px system-ui, sans-serif; }}</style>
<h1>tierd-engine bench</h1><p>{escape(machine)}</p><p>Medians of {report["rounds"]} interleaved rounds; the KV pages hold
{report["pool_tokens"]} tokens.</p>
{"".join(plots)}
<table><tr>{head}</tr>
{rows}</table>
<h2>Against the same round without tierd</h2>
<table><tr>{"".join(f"<th>{escape(column)}</th>" for column in PAIRED)}</tr>
{"".join(cells(pair_figures(one)) for one in report["paired"])}</table></html>
"""


def cells(row: list[str]) -> str:
    """A row of an HTML table."""
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"


def prefill_share(one: dict[str, Any]) -> float:
    """Prompt tokens computed, over what an infinite cache would leave to compute."""
    share: float = one["prefill_tokens"] / one["prefill_tokens_min"]
    return share


def sweep_mode(results: list[dict[str, Any]]) -> str:
    """The mode in which block sizes were swept."""
    return next((str(one["mode"]) for one in results if one["block_tokens"] != 16), str(results[0]["mode"]))


def plot(title: str, results: list[dict[str, Any]], value: Any, by: str, color: str) -> str:
    """Bars, grouped by one key and coloured by another, as SVG."""
    most = max((value(one["median"]) for one in results), default=0) or 1.0
    parts, x, group = [], LEFT, None
    for one in sorted(results, key=lambda one: one[by]) if by == "block_tokens" else results:
        if group is not None and one[by] != group:
            x += GAP
        if one[by] != group:
            parts.append(f'<text x="{x}" y="{TOP + HEIGHT + 18}">{escape(str(one[by]))}</text>')
            group = one[by]
        height = value(one["median"]) / most * HEIGHT
        top = TOP + HEIGHT - height
        parts.append(f'<rect x="{x}" y="{top:.1f}" width="{BAR - 4}" height="{height:.1f}" fill="{COLORS[one["mode"]]}"/>')
        parts.append(f'<text x="{x}" y="{top - 4:.1f}">{value(one["median"]):.3g}</text>')
        x += BAR
    for at, (name, fill) in enumerate({one[color]: COLORS[one["mode"]] for one in results}.items()):
        parts.append(f'<rect x="{LEFT + at * 110}" y="{TOP + HEIGHT + 30}" width="12" height="12" fill="{fill}"/>')
        parts.append(f'<text x="{LEFT + at * 110 + 18}" y="{TOP + HEIGHT + 41}">{escape(str(name))}</text>')
    size = f'width="{x + GAP + 40}" height="{TOP + HEIGHT + 50}"'
    return f'<h2>{escape(title)}</h2><svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(parts)}</svg>\n'

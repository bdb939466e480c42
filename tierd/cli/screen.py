"""What `tierd top` shows, made from two answers to `status`: the newer one, and what has changed since the older."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tierd.cli.status import NAMESPACE_CHARACTERS, duration, harmless
from tierd.core.ladder import TIERS, kind_of
from tierd.values import rounded_size

Answer = Mapping[str, Any]
NAMESPACES_SHOWN_MAX, CLIENTS_SHOWN_MAX = 8, 8
NAMES = ("where", "model", "clients")
"""Columns of words, which give way where a terminal is narrow; numbers and headings never do."""
COLOURS = {"gpu": "magenta", "cpu": "green", "nvme": "cyan", "remote": "blue", "pending": "yellow", "miss": "red"}


def screen(new: Answer, old: Answer) -> RenderableType:
    """The whole screen. Rates are over the time between the two; `old` may be `new` itself, and all rates are 0 then."""
    seconds = max(new["uptime_seconds"] - old["uptime_seconds"], 0.0)
    if old["pid"] != new["pid"]:  # it was restarted: its numbers began again
        old, seconds = new, 0.0
    parts = tiers(new, old, seconds), lookups(new, old), transfers(new, old, seconds), namespaces(new, old)
    return Group(head(new), *(row for part in parts for row in (Text(), part)))


def head(new: Answer) -> Text:
    """Who is being watched, and whether all is well."""
    io = f"nvme by {new['io']['engine']}, {new['io']['path']}" if new["io"]["engine"] != "none" else "no nvme"
    text = Text(f"tierd {new['version']}", "bold")
    text.append(f"  pid {new['pid']}, up {duration(new['uptime_seconds'])}, {io}, {new['sessions']} clients", "not bold")
    if new["checksum_failures"]:
        text.append(f"  {new['checksum_failures']:,} damaged blocks", "bold red")
    return text


def tiers(new: Answer, old: Answer, seconds: float) -> Table:
    """How full each tier is, and how fast blocks leave it."""
    table = plain("tier", "", "used", "limit", "ready", "free", "filling", "evict/s", "drop/s")
    for name, tier in new["tiers"].items():
        used, most, slots = tier["used_bytes"], tier["limit_bytes"], tier["slots"]
        gone = [rate(new["evicted_blocks"], old["evicted_blocks"], f"{name}.{kind}", seconds) for kind in ("clean", "drop")]
        colour = COLOURS[kind_of(name)]
        bar = ProgressBar(most, used, complete_style=colour, finished_style=colour)
        numbers = [f"{slots.get(state, 0):,}" for state in ("ready", "free", "filling")]
        table.add_row(name, bar, rounded_size(used), rounded_size(most), *numbers, f"{sum(gone):,.0f}", f"{gone[1]:,.0f}")
    return table


def lookups(new: Answer, old: Answer) -> Table:
    """Where blocks that were asked for were found: since the last look, and since the start."""
    table = plain("blocks asked", "", "found", "where")
    for name, before in (("now", old), ("since start", None)):
        asked = difference(new["lookup_blocks"], before["lookup_blocks"] if before else {})
        total, found = sum(asked.values()), sum(asked[tier] for tier in TIERS)
        where = Text("  ").join(Text(f"{tier} {n / total:.1%}", COLOURS[tier]) for tier, n in asked.items() if n)
        bar = ProgressBar(max(total, 1), found, complete_style="green", finished_style="green")
        table.add_row(f"{name} {total:,}", bar, f"{found / total:.1%}" if total else "-", where)
    return table


def transfers(new: Answer, old: Answer, seconds: float) -> Table:
    """What moves between tiers, and why."""
    table = plain("transfers", "from", "to", "bytes/s", "since start")
    before = {way(one): one["bytes"] for one in old["transfers"]}
    for one in sorted(new["transfers"], key=way):
        speed = (one["bytes"] - before.get(way(one), 0)) / seconds if seconds else 0.0
        table.add_row(one["reason"], one["source"], one["target"], rounded_size(int(speed)), rounded_size(one["bytes"]))
    if not new["transfers"]:
        table.add_row("none yet", "", "", "", "")
    table.caption = f"{new['unwritten_runs']:,} runs wait to be written to nvme"
    table.caption_justify = "left"
    return table


def namespaces(new: Answer, old: Answer) -> Table:
    """The busiest first, with their clients."""
    table = plain("namespace", "model", "asked now", "found", "blocks", "clients", right=(2, 3, 4))
    before = {space["id"]: space["lookup_blocks"] for space in old["namespaces"]}
    rows = [(difference(space["lookup_blocks"], before.get(space["id"], {})), space) for space in new["namespaces"]]
    rows.sort(key=lambda row: (-sum(row[0].values()), -row[1]["blocks"]))
    for asked, space in rows[:NAMESPACES_SHOWN_MAX]:
        total, found = sum(asked.values()), sum(asked[tier] for tier in TIERS)
        share = f"{found / total:.1%}" if total else "-"
        name = space["id"][:NAMESPACE_CHARACTERS]
        model, who = one_line(harmless(space["model"])), one_line(clients(space["sessions"]))
        table.add_row(name, model, f"{total:,}", share, f"{space['blocks']:,}", who)
    if len(rows) > NAMESPACES_SHOWN_MAX:
        table.add_row("", f"and {len(rows) - NAMESPACES_SHOWN_MAX} more", "", "", "", "")
    return table


def clients(sessions: Sequence[Answer]) -> str:
    names = [f"{harmless(session['client']) or 'unnamed'} ({session['pid']})" for session in sessions[:CLIENTS_SHOWN_MAX]]
    rest = len(sessions) - len(names)
    return ", ".join([*names, f"{rest} more"] if rest else names) or "-"


def one_line(text: str) -> Text:
    """What is cut where it has no room; no str, since brackets in it are no markup."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def plain(*columns: str, right: Sequence[int] | None = None) -> Table:
    """A table without lines, of which a bar (a column without a name) takes what room there is; numbers to the right: by
    default all columns behind the second.
    """
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold", expand="" in columns)
    for at, name in enumerate(columns):
        is_number = at in right if right is not None else at > 1 and name not in ("from", "to", "where")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=name not in NAMES, ratio=None if name else 1)
    return table


def way(transfer: Answer) -> tuple[str, str, str]:
    return transfer["reason"], transfer["source"], transfer["target"]


def difference(new: Mapping[str, int], old: Mapping[str, int]) -> dict[str, int]:
    return {name: number - old.get(name, 0) for name, number in new.items()}


def rate(new: Mapping[str, int], old: Mapping[str, int], name: str, seconds: float) -> float:
    return (new[name] - old.get(name, 0)) / seconds if seconds else 0.0

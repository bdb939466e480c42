"""Show what a running daemon holds and does."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tierd.cli.admin import ask
from tierd.cli.options import add_config_arguments, load_config
from tierd.values import rounded_size

ANSWER_SECONDS_MAX = 5.0
NAMESPACE_CHARACTERS = 16
"""Of a namespace's id: as many as its folder on disk is named by."""
CLIENTS_SHOWN_MAX = 4


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, and for whom: a person or a program."""
    add_config_arguments(parser, "--runtime-dir")
    parser.add_argument("--json", action="store_true", help="print the daemon's whole answer as one JSON object")


def run(options: Namespace) -> int:
    """Print the answer of the admin socket."""
    reply = ask(load_config(options).server.admin_socket, "status", ANSWER_SECONDS_MAX)
    print(json.dumps(reply, default=plain) if options.json else "\n".join(page(reply)))
    return 0


def page(status: Mapping[str, Any]) -> Iterator[str]:
    """The lines that a person wants to see first."""
    engine, path, gpu = (status["io"][name] for name in ("engine", "path", "gpu"))
    io = f"nvme by {engine}, {path}" if engine != "none" else "no nvme"
    io += "" if gpu == "none" else f", gpu by {gpu}"
    yield f"tierd {status['version']}, pid {status['pid']}, up {duration(status['uptime_seconds'])}, {io}"
    yield f"socket   {status['socket']}"
    yield f"metrics  {'http://' + status['metrics'] + '/metrics' if status['metrics'] else 'off'}"
    yield ""
    yield from tiers(status["tiers"])
    yield ""
    yield f"lookups  {shares(status['lookup_blocks'])}"
    yield f"evicted  {evictions(status['evicted_blocks'])}"
    if any(status["prefetched_blocks"].values()):
        yield f"ahead    {fates(status['prefetched_blocks'])}"
    yield f"waiting  {status['unwritten_runs']:,} runs to be written to nvme"
    yield f"damaged  {status['checksum_failures']:,} blocks whose checksum was wrong"
    if status["recording"]:
        yield f"record   {status['recording']['requests']:,} requests since somebody began to record them"
    yield ""
    yield from namespaces(status["namespaces"])


def tiers(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    states = next((list(tier["slots"]) for tier in found.values() if tier["slots"]), [])
    rows = [["tier", "used", "limit", "", *states]]
    for name, tier in found.items():
        used, most = tier["used_bytes"], tier["limit_bytes"]
        numbers = [f"{tier['slots'].get(state, 0):,}" for state in states]
        rows.append([name, rounded_size(used), rounded_size(most), f"{used / most:.0%}", *numbers])
    return table(rows, right=range(1, len(rows[0])))


def shares(lookups: Mapping[str, int]) -> str:
    """Where the blocks were that were asked for; tiers where none was are left out."""
    asked = sum(lookups.values())
    parts = [f"{tier} {number / asked:.1%}" for tier, number in lookups.items() if number]
    return f"{asked:,} blocks asked: {', '.join(parts)}" if asked else "no block was asked for yet"


def evictions(numbers: Mapping[str, int]) -> str:
    """What had to go, by tier and kind."""
    parts = [f"{number:,} from {name.replace('.', ' (')})" for name, number in numbers.items() if number]
    return ", ".join(parts) or "nothing yet"


def fates(numbers: Mapping[str, int]) -> str:
    """What became of blocks that were prefetched."""
    return ", ".join(f"{number:,} {fate}" for fate, number in numbers.items()) + " of the blocks that were prefetched"


def namespaces(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [["namespace", "domain", "model", "block", "blocks", "sessions", "clients"]]
    for space in found:
        identity = [space["id"][:NAMESPACE_CHARACTERS], harmless(space["domain"]), harmless(space["model"])]
        sessions = space["sessions"]
        numbers = [rounded_size(space["block_bytes"]), f"{space['blocks']:,}", f"{len(sessions):,}"]
        rows.append([*identity, *numbers, clients(sessions)])
    return table(rows, right=(3, 4, 5)) if found else iter(["no namespace was opened yet"])


def clients(sessions: Sequence[Mapping[str, Any]]) -> str:
    names = [f"{harmless(session['client']) or 'unnamed'} ({session['pid']})" for session in sessions[:CLIENTS_SHOWN_MAX]]
    rest = len(sessions) - len(names)
    return ", ".join([*names, f"{rest} more"] if rest else names) or "-"


def harmless(name: str) -> str:
    """A name that a client has chosen, for a terminal: what would break a line or command the terminal is written out."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


def table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> Iterator[str]:
    """Rows as lines with columns of equal width, those in `right` flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = [cell.rjust(width) if at in right else cell.ljust(width) for at, (cell, width) in enumerate(cells)]
        yield "  ".join(aligned).rstrip()


def duration(seconds: float) -> str:
    """Seconds in the two largest units that it has: "3 h 12 min"."""
    whole = int(seconds)
    parts = [(whole // 86_400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((at for at, (number, _) in enumerate(parts) if number), len(parts) - 1)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2])


def plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)

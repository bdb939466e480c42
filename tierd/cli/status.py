"""Show what a running daemon holds and does."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from tierd.cli.admin import ask
from tierd.cli.options import add_config_arguments, load_config
from tierd.values import UNITS

ANSWER_SECONDS_MAX = 5.0


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, and for whom: a person or a program."""
    add_config_arguments(parser, "--runtime-dir")
    parser.add_argument("--json", action="store_true", help="print the daemon's whole answer as one JSON object")


def run(options: Namespace) -> int:
    """Print the answer of the admin socket."""
    reply = ask(load_config(options).server.admin_socket, "status", ANSWER_SECONDS_MAX)
    print(json.dumps(reply, default=plain) if options.json else "\n".join(lines(reply)))
    return 0


def lines(values: dict[str, Any], indent: int = 0) -> Iterator[str]:
    """One line a value, maps indented below their name, sizes with units."""
    width = max((len(key) for key in values), default=0)
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{'':{indent}}{key}"
            yield from lines(value, indent + 2)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value):
                yield f"{'':{indent}}{key} {number}"
                yield from lines(item, indent + 2)
        else:
            yield f"{'':{indent}}{key:{width}}  {shown(key, value)}"


def shown(key: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and "bytes" in key and value >= 1024:
        unit = next(unit for unit, scale in UNITS.items() if value >= scale)
        return f"{value / UNITS[unit]:.1f} {unit}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return plain(value)


def plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)

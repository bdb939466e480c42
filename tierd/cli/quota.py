"""Show or set what a namespace is promised of a tier, and the most that it may have there; both outlive the daemon.

Without --min and --max it only shows. A namespace at its maximum evicts its own blocks; what it has up to its minimum is not
taken by others. Both count whole segments; 0 is no quota. What is over a new maximum is forgotten, which needs --yes.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tierd import values
from tierd.cli.admin import ask
from tierd.cli.options import add_config_arguments, load_config
from tierd.cli.status import NAMESPACE_CHARACTERS, plain, table
from tierd.errors import Invalid
from tierd.values import TIB, rounded_size

ANSWER_SECONDS_MAX = 60.0
BYTES_MAX = 1024 * TIB


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, namespace and tier, and the bounds."""
    add_config_arguments(parser, "--runtime-dir")
    parser.add_argument("namespace", metavar="NAMESPACE", nargs="?", help="the first digits of its id, at least 4; or all")
    parser.add_argument("--tier", metavar="TIER", help="only this one, such as cpu or gpu0; needed with --min and --max")
    parser.add_argument("--min", type=size, metavar="SIZE", help="what other namespaces do not take from it, such as 2GiB")
    parser.add_argument("--max", type=size, metavar="SIZE", help="the most that it may have; 0: no limit but the tier's")
    parser.add_argument("--yes", action="store_true", help="do it, even if what is over the maximum is forgotten by it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: Namespace) -> int:
    """Set what is to be set, and show how it is then."""
    path = load_config(options).server.admin_socket
    named = {name: getattr(options, name) for name in ("namespace", "tier") if getattr(options, name) is not None}
    bounds = {name: getattr(options, name) for name in ("min", "max") if getattr(options, name) is not None}
    if bounds and len(named) < 2:
        raise Invalid("--min and --max are of one NAMESPACE and one --tier: name both")
    if options.max and not options.yes:
        for row in ask(path, "quota", ANSWER_SECONDS_MAX, **named)["quotas"]:
            if row["used"] > options.max:
                used = f"{row['namespace'].hex()[:NAMESPACE_CHARACTERS]} has {rounded_size(row['used'])} in {row['tier']}"
                raise Invalid(f"{used}: what is over {rounded_size(options.max)} would be forgotten; say --yes to do it")
    rows = ask(path, "quota", ANSWER_SECONDS_MAX, **named, **bounds)["quotas"]
    print(json.dumps({"quotas": rows}, default=plain) if options.json else "\n".join(page(rows)))
    return 0


def page(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each namespace and tier."""
    cells = [["namespace", "tier", "used", "min", "max"]]
    for row in rows:
        bounds = [rounded_size(row[name]) if row[name] else "-" for name in ("min", "max")]
        cells.append([row["namespace"].hex()[:NAMESPACE_CHARACTERS], row["tier"], rounded_size(row["used"]), *bounds])
    return table(cells, right=(2, 3, 4)) if rows else iter(["no namespace was opened yet, and none has a quota"])


def size(text: str) -> int:
    """Bytes of a quota, from the command line."""
    try:
        return values.size(1, BYTES_MAX, zero=True)(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text} {error}") from error

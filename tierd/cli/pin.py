"""Pin the chain of blocks that ends in HASH, so that none of them is evicted; without HASH list what is pinned.

A pin lasts until `tierd unpin` or a purge, and outlives the daemon as far as its blocks do. Segments with pinned blocks are at
most policy.pinned_share of a tier. What requests want to be kept for a time is listed too; within its
namespace it gives way to a pin.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from tierd.block import HASH_BYTES
from tierd.cli.admin import ask
from tierd.cli.options import add_config_arguments, load_config
from tierd.cli.status import plain

ANSWER_SECONDS_MAX = 60.0


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, namespace and chain."""
    add_pin_arguments(parser, nargs="?")


def run(options: Namespace) -> int:
    """Pin what is to be pinned, and list all pins of the namespace."""
    return asked("pin", options)


def add_pin_arguments(parser: ArgumentParser, **of_hash: Any) -> None:
    """What pin and unpin have in common."""
    add_config_arguments(parser, "--runtime-dir")
    parser.add_argument("namespace", metavar="NAMESPACE", help="the first digits of its id in `tierd status`, at least 4")
    parser.add_argument("block", metavar="HASH", type=block, help="the hash of the chain's last block, 64 digits", **of_hash)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def asked(verb: str, options: Namespace) -> int:
    """Ask the daemon, and print the pins that there are then."""
    named = {"block": options.block} if options.block else {}
    path = load_config(options).server.admin_socket
    reply = ask(path, verb, ANSWER_SECONDS_MAX, namespace=options.namespace, **named)
    print(json.dumps(reply, default=plain) if options.json else "\n".join(page(reply["pins"])))
    return 0


def page(pins: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each pin."""
    if not pins:
        yield "nothing is pinned"
    for pin in pins:
        copies = ", ".join(f"{n:,} blocks in {tier}" for tier, n in pin["blocks"].items() if n)
        yield f"{pin['block'].hex()}  {copies}{_term(pin)}"


def _term(pin: Mapping[str, Any]) -> str:
    """Of one that a request wants to be kept, how long it is."""
    if "until" not in pin:
        return ""
    until = datetime.fromtimestamp(pin["until"] / 1000).astimezone()
    return f", until {until:%Y-%m-%d %H:%M:%S}, priority {pin['priority']}"


def block(text: str) -> bytes:
    """The hash of a block, from the command line."""
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != HASH_BYTES:
        raise ArgumentTypeError(f"{text!r} is no hash: {2 * HASH_BYTES} hexadecimal digits")
    return found

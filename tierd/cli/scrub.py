"""Read what is on NVMe in the background, at a bounded rate (nvme.scrub_bytes_per_second), and give up what is damaged.

`start` begins a pass over everything, or goes on after `pause`; `status` says how far it is. Exit code 0: no damage was found
by this pass; 4: some was.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from tierd.cli import DAMAGED, OK
from tierd.cli.admin import ask
from tierd.cli.options import add_config_arguments, load_config
from tierd.cli.status import duration
from tierd.clock import unix_milliseconds
from tierd.values import rounded_size

ANSWER_SECONDS_MAX = 5.0


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, and what to do."""
    add_config_arguments(parser, "--runtime-dir")
    parser.add_argument("action", choices=["start", "pause", "status"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: Namespace) -> int:
    """Ask, and say how far it is."""
    reply = ask(load_config(options).server.admin_socket, "scrub", ANSWER_SECONDS_MAX, action=options.action)
    print(json.dumps(reply) if options.json else "\n".join(page(reply)))
    return DAMAGED if reply["blocks"]["mismatch"] or reply["blocks"]["io_error"] else OK


def page(found: Mapping[str, Any]) -> Iterator[str]:
    """A line on the pass, and one on what it found."""
    if not found["started"]:
        yield "no pass was started in this life of the daemon: tierd scrub start"
        return
    blocks = found["blocks"]
    now = found["finished"] or unix_milliseconds() / 1000
    how = "done" if found["finished"] else found["state"]
    rate = f"at most {rounded_size(found['bytes_per_second'])} a second"
    yield f"scrub    {how} after {duration(now - found['started'])}, {rounded_size(found['read_bytes'])} read, {rate}"
    yield f"blocks   {sum(blocks.values()):,} read of {found['blocks_on_nvme']:,} that are on nvme now"
    yield f"damaged  {blocks['mismatch']:,} with other bytes than were written, {blocks['io_error']:,} that cannot be read"

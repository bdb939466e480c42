"""Wait until everything that was admitted so far is on NVMe."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from tierd.cli.admin import ask
from tierd.cli.options import add_config_arguments, load_config, seconds
from tierd.clock import monotonic_seconds
from tierd.errors import Busy

PAUSE_SECONDS = 0.05
ANSWER_SECONDS_MAX = 5.0
ANSWER_SECONDS = 1.0
"""What the daemon may take on top of the deadline that it was given."""


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, and how long to wait for it."""
    add_config_arguments(parser, "--runtime-dir")
    parser.add_argument("--timeout", type=seconds, default=60.0, metavar="SECONDS", help="default: 60")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: Namespace) -> int:
    """Wait, and say what was written meanwhile."""
    reply = sync(load_config(options).server.admin_socket, options.timeout)
    if options.json:
        print(json.dumps(reply))
    else:
        note = f", {reply['given_up']} given up: no room, or the disk failed" if reply["given_up"] else ""
        print(f"synced: {reply['blocks']} blocks written meanwhile{note}")
    return 0


def sync(path: Path, seconds_max: float) -> dict[str, int]:
    """Ask again while the daemon is busy and there is time: one request waits no longer than the daemon's own limit. Returns
    how many blocks were written meanwhile, and how many were given up; raises Busy when it takes longer.
    """
    until = monotonic_seconds() + seconds_max
    before = ask(path, "status", ANSWER_SECONDS_MAX)["written"]
    while True:
        remaining = max(until - monotonic_seconds(), 0.001)
        try:
            after = ask(path, "sync", remaining + ANSWER_SECONDS, deadline_ms=max(int(remaining * 1000), 1))
        except Busy as error:
            if monotonic_seconds() + PAUSE_SECONDS >= until:
                raise Busy(f"not everything was on NVMe after {seconds_max:g} s: {error}") from error
            time.sleep(PAUSE_SECONDS)
        else:
            return {name: after[name] - before[name] for name in ("blocks", "given_up")}

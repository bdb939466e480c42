"""Wait until everything that was admitted so far is on NVMe."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace

from tierd.cli.admin import ask
from tierd.cli.options import add_config_arguments, load_config, seconds
from tierd.clock import monotonic_seconds
from tierd.errors import Busy

PAUSE_SECONDS = 0.05
ANSWER_SECONDS = 1.0
"""What the daemon may take on top of the deadline that it was given."""


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, and how long to wait for it."""
    add_config_arguments(parser, "--runtime-dir")
    parser.add_argument("--timeout", type=seconds, default=60.0, metavar="SECONDS", help="default: 60")


def run(options: Namespace) -> int:
    """Ask again while the daemon is busy and there is time: one request waits no longer than the daemon's own limit."""
    path = load_config(options).server.admin_socket
    until = monotonic_seconds() + options.timeout
    while True:
        remaining = max(until - monotonic_seconds(), 0.001)
        try:
            reply = ask(path, "sync", remaining + ANSWER_SECONDS, deadline_ms=max(int(remaining * 1000), 1))
        except Busy as error:
            if monotonic_seconds() + PAUSE_SECONDS >= until:
                raise Busy(f"not everything was on NVMe after {options.timeout:g} s: {error}") from error
            time.sleep(PAUSE_SECONDS)
        else:
            given_up = reply.get("given_up", 0)
            note = f", {given_up} given up: no room, or the disk failed" if given_up else ""
            print(f"synced: {reply.get('blocks', 0)} blocks written meanwhile{note}")
            return 0

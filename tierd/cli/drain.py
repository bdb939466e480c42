"""Write everything that was stored to NVMe, then stop the daemon: what it has is warm again after the next start.

Nothing is stopped when not all can be written in time. Engines go on without tierd. Under systemd a client that connects to
tierd.socket starts the daemon again: stop the socket first.
"""

from __future__ import annotations

import json
import os
import select
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from tierd.cli.admin import AdminSocket
from tierd.cli.options import add_config_arguments, load_config, seconds
from tierd.cli.sync import sync
from tierd.clock import monotonic_seconds
from tierd.errors import Busy, Closed, Invalid

ANSWER_SECONDS_MAX = 5.0


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, and how long it may take."""
    add_config_arguments(parser, "--runtime-dir")
    parser.add_argument("--timeout", type=seconds, default=120.0, metavar="SECONDS", help="for all of it; default: 120")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: Namespace) -> int:
    """Sync, stop, and wait until the process is gone."""
    path = load_config(options).server.admin_socket
    began = monotonic_seconds()
    with AdminSocket(path, ANSWER_SECONDS_MAX) as admin:
        pid = admin.ask("status")["pid"]
        with end_of(admin, pid) as end:
            synced = sync(path, options.timeout)
            admin.ask("drain")
            left = max(began + options.timeout - monotonic_seconds(), 0)
            if not select.select([end], [], [], left)[0]:
                raise Busy(f"the daemon (pid {pid}) drains, and has not ended after {options.timeout:g} s: see its log")
    took = monotonic_seconds() - began
    if options.json:
        print(json.dumps({"pid": pid, "blocks": synced["blocks"], "given_up": synced["given_up"], "seconds": took}))
    else:
        lost = f", {synced['given_up']:,} given up: no room, or the disk failed" if synced["given_up"] else ""
        print(f"drained: {synced['blocks']:,} blocks written{lost}; pid {pid} has ended after {took:.1f} s")
    return 0


@contextmanager
def end_of(admin: AdminSocket, pid: int) -> Iterator[int]:
    """A descriptor that is readable when the daemon has ended: a pidfd, or the connection where the kernel does not say
    whose the socket is. `pid` is the daemon's in its own PID namespace.
    """
    try:
        process = admin.listener()
    except (Invalid, Closed):
        why = "it is in another PID namespace, and this kernel cannot name it"
        print(f"the end of pid {pid} cannot be seen from here ({why}): waiting for its socket to go", file=sys.stderr)
        yield admin.fileno()
        return
    try:
        yield process
    finally:
        os.close(process)

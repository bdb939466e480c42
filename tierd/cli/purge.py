"""Forget all that a namespace has stored, in every tier: no block of it is found again, also after a crash.

Without --yes it only says what would go. With --shred the bytes are overwritten before memory and files are given back, and
the command waits for that, up to --timeout; segments that engines still use follow when they let go.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from tierd.cli.admin import ask
from tierd.cli.options import add_config_arguments, load_config, seconds
from tierd.cli.status import clients, harmless
from tierd.clock import monotonic_seconds
from tierd.errors import Busy, Gone, Invalid

ANSWER_SECONDS_MAX = 60.0
POLL_SECONDS = 0.1


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon and namespace, and how thoroughly."""
    add_config_arguments(parser, "--runtime-dir")
    parser.add_argument("namespace", metavar="NAMESPACE", help="the first digits of its id in `tierd status`, at least 4")
    parser.add_argument("--shred", action="store_true", help="overwrite the bytes before they are given back, and wait for it")
    parser.add_argument("--timeout", type=seconds, default=60.0, metavar="SECONDS", help="for --shred; default: 60")
    parser.add_argument("--yes", action="store_true", help="do it: what is purged does not come back")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: Namespace) -> int:
    """Purge it, and say what came of it."""
    path = load_config(options).server.admin_socket
    if not options.yes:
        space = find(path, options.namespace)
        domain, model = harmless(space["domain"]), harmless(space["model"])
        what = f"namespace {space['id'][:16]} (domain {domain}, model {model}): {space['blocks']:,} blocks"
        raise Invalid(f"this would forget {what}, {len(space['sessions'])} clients attached; say --yes to do it")
    reply = ask(path, "purge", ANSWER_SECONDS_MAX, namespace=options.namespace, shred=options.shred)
    namespace = reply["namespace"].hex()
    if options.shred:
        wait_until_gone(path, namespace, options.timeout)
    if options.json:
        print(json.dumps(reply | {"namespace": namespace, "shredded": options.shred}))
    else:
        how = ", overwritten" if options.shred else ""
        print(f"purged {namespace[:16]}: {reply['blocks']:,} blocks in {reply['segments']:,} segments forgotten{how}")
    return 0


def find(path: Path, prefix: str) -> dict[str, Any]:
    """What the daemon says of the namespace; raises Gone when it has none."""
    spaces: list[dict[str, Any]] = ask(path, "status", ANSWER_SECONDS_MAX)["namespaces"]
    found = [space for space in spaces if space["id"].startswith(prefix.lower())]
    if not found:
        raise Gone(f"no namespace begins with {prefix!r}: `tierd status` lists them")
    if len(found) > 1:
        raise Invalid(f"{len(found)} namespaces begin with {prefix!r}: give more digits")
    return found[0]


def wait_until_gone(path: Path, namespace: str, seconds_max: float) -> None:
    """Until the last segment is destroyed; raises Busy with who may be in the way when that takes too long."""
    until = monotonic_seconds() + seconds_max
    while True:
        try:
            space = find(path, namespace)
        except Gone:  # forgotten, since nothing of it is left
            return
        if not (segments := space["dying_segments"]):
            return
        if monotonic_seconds() >= until:
            raise Busy(
                f"purged, but {segments} segments are not overwritten after {seconds_max:g} s: they are when the clients that "
                f"use them let go ({clients(space['sessions'])}); stop these, or see the daemon's log"
            )
        time.sleep(POLL_SECONDS)

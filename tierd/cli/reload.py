"""Have a running daemon read its configuration again: all of it, or, when anything is wrong, nothing."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from tierd.cli.admin import ask
from tierd.cli.options import add_config_arguments, load_config

ANSWER_SECONDS_MAX = 15.0


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon."""
    add_config_arguments(parser, "--runtime-dir")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: Namespace) -> int:
    """Say which keys have changed, and which wait for a restart."""
    reply = ask(load_config(options).server.admin_socket, "reload", ANSWER_SECONDS_MAX)
    if options.json:
        print(json.dumps(reply))
        return 0
    print(f"changed: {', '.join(reply['changed']) or 'nothing'}")
    if reply["restart"]:
        print(f"after a restart only: {', '.join(reply['restart'])}")
    return 0

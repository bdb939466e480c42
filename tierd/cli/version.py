"""Print tierd's version."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from tierd import __version__


def add_arguments(parser: ArgumentParser) -> None:
    """How it is printed."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: Namespace) -> int:
    """`tierd 0.1.0`"""
    print(json.dumps({"version": __version__}) if options.json else f"tierd {__version__}")
    return 0

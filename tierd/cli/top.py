"""Watch a running daemon in the terminal: tiers, hits, transfers, clients and the busiest namespaces. `q` ends it.

A daemon that goes away is waited for. With --once it prints one look, over one interval, and ends; for programs there is
`tierd status --json`.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tierd.cli.admin import ask
from tierd.cli.options import add_config_arguments, load_config, seconds
from tierd.cli.screen import screen
from tierd.errors import Closed, Invalid

ANSWER_SECONDS_MAX = 5.0
QUIT = "q"


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, and how often to look."""
    add_config_arguments(parser, "--runtime-dir")
    parser.add_argument("--interval", type=seconds, default=1.0, metavar="SECONDS", help="between two looks; default: 1")
    parser.add_argument("--once", action="store_true", help="print one look and end")


def run(options: Namespace) -> int:
    """Look, show, wait for the interval or a key, and again."""
    path = load_config(options).server.admin_socket
    console = Console()
    if not options.once and not (console.is_terminal and sys.stdin.isatty()):
        raise Invalid("top: needs a terminal: use --once, or tierd status --json")
    answer = look(path)
    if options.once:
        key(options.interval, sys.stdin.isatty())
        console.print(screen(look(path), answer))
        return 0
    with keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        shown = screen(answer, answer)
        while True:
            live.update(shown, refresh=True)
            if key(options.interval) == QUIT:
                return 0
            try:
                older, answer = answer, look(path)
                shown = screen(answer, older)
            except Closed as error:
                shown = Text(f"{error}\nwaiting for it; q ends")


def look(path: Path) -> dict[str, Any]:
    """What the daemon says now; raises Closed when it is away."""
    return ask(path, "status", ANSWER_SECONDS_MAX)


@contextmanager
def keys() -> Iterator[None]:
    """Keys come one by one and are not shown, until the terminal is as it was."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def key(seconds_max: float, from_terminal: bool = True) -> str:
    """The key that is pressed within that time, or nothing."""
    ready, _, _ = select.select([sys.stdin] if from_terminal else [], [], [], seconds_max)
    if not ready:
        return ""
    return os.read(sys.stdin.fileno(), 1).decode(errors="replace") or QUIT  # past its end there is nobody to look any more

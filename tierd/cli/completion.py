"""Print the completion of `tierd` for a shell, made from the commands' own parsers.

bash: tierd completion bash > ~/.local/share/bash-completion/completions/tierd; zsh: into a file _tierd in a folder of $fpath;
fish: into ~/.config/fish/completions/tierd.fish.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import shtab

from tierd.cli import COMMANDS, command

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: ArgumentParser) -> None:
    """Which shell."""
    parser.add_argument("shell", choices=SHELLS)


def run(options: Namespace) -> int:
    """Print the script."""
    print(shtab.complete(whole(), options.shell))
    return 0


def whole() -> ArgumentParser:
    """One parser with all commands in it, as shells see `tierd`."""
    parser = ArgumentParser("tierd")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        one = commands.add_parser(name, help=text)
        command(name).add_arguments(one)
        for action in one._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser

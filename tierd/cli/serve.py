"""Run the daemon until SIGTERM or SIGINT, which drain it; a second one stops it at once."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial

from tierd.cli.options import add_config_arguments, load_config
from tierd.config import FLAGS


def add_arguments(parser: ArgumentParser) -> None:
    """Every named flag of the configuration."""
    add_config_arguments(parser, *FLAGS)


def run(options: Namespace) -> int:
    """Check the configuration, then be the daemon."""
    load_config(options)
    from tierd import daemon  # A wrong configuration is told before uvloop and numpy are loaded.

    return daemon.run(partial(load_config, options))

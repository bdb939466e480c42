"""End the pin of the chain that ends in HASH: its blocks are evicted in their turn again, unless another pin has them too."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from tierd.cli.pin import add_pin_arguments, asked


def add_arguments(parser: ArgumentParser) -> None:
    """Which daemon, namespace and chain."""
    add_pin_arguments(parser)


def run(options: Namespace) -> int:
    """Unpin it, and list the pins that are left."""
    return asked("unpin", options)

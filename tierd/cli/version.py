"""Print tierd's version."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from tierd import __version__


def add_arguments(parser: ArgumentParser) -> None:
    """It has none."""


def run(options: Namespace) -> int:
    """`tierd 0.1.0`"""
    print(f"tierd {__version__}")
    return 0

"""The flags that set configuration, for every command that reads it."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from tierd.config import FLAGS, Config
from tierd.errors import Invalid


def add_config_arguments(parser: ArgumentParser, *flags: str) -> None:
    """Add `--config`, `--set` and the named ones of config.FLAGS."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file to read instead of the default one")
    for flag in flags:
        parser.add_argument(flag, metavar="VALUE", help=f"sets {FLAGS[flag]}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="set any key of the configuration; may be repeated",
    )


def load_config(options: Namespace) -> Config:
    """The configuration under these flags; raises Invalid."""
    flags = {}
    for setting in options.set:
        dotted, equals, value = setting.partition("=")
        if not equals:
            raise Invalid(f"flag --set {setting!r} has no value: write --set section.key=value")
        flags[dotted.strip()] = value
    for flag in FLAGS:
        value = getattr(options, flag.strip("-").replace("-", "_"), None)
        if value is not None:
            flags[flag] = value
    return Config.load(flags, file=options.config)


def seconds(text: str) -> float:
    """A patience of up to a day, from the command line."""
    number = float(text)
    if not 0 < number <= 86_400:
        raise ArgumentTypeError(f"{text} is not from 0 to 86400 seconds")
    return number

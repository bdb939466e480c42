"""The command `tierd`. Each subcommand is a module of this package and is imported only when it is asked for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from tierd import __version__
from tierd.errors import Closed, Invalid, TierdError

OK, FAILED, USAGE, UNREACHABLE, DAMAGED, INTERRUPTED = 0, 1, 2, 3, 4, 130
EXIT_CODES = {
    OK: "done",
    FAILED: "it failed, or what was asked for is not there; stderr says why and what to do",
    USAGE: "the command line or the configuration is wrong, or `--yes` is missing",
    UNREACHABLE: "the daemon cannot be reached",
    DAMAGED: "damage was found (fsck, scrub)",
    INTERRUPTED: "interrupted",
}

COMMANDS = {
    "serve": "run the daemon",
    "status": "show what a running daemon holds",
    "top": "watch a running daemon: tiers, hits, transfers, clients, the busiest namespaces",
    "config": "check the configuration, show it with where each value is from, or print its schema",
    "reload": "have a running daemon read its configuration again",
    "install-service": "write the systemd units for this environment, or remove them again",
    "purge": "forget all that a namespace has stored",
    "pin": "pin a chain of blocks, so that it is never evicted, or list what is pinned",
    "unpin": "let a pinned chain be evicted again",
    "quota": "show or set what a namespace is promised of a tier, and the most that it may have",
    "sync": "wait until everything admitted so far is on NVMe",
    "drain": "write everything to NVMe, then stop the daemon",
    "hold": "run a daemon under a holder that keeps its memory over a crash: tierd hold -- tierd serve",
    "fsck": "check the state directory of a stopped daemon, and repair it if asked to",
    "scrub": "read what is on NVMe in the background, and give up what is damaged",
    "doctor": "say what this machine lacks, and what to do about it",
    "record": "record what engines ask of a running daemon, as a trace to replay",
    "replay": "replay a trace through the eviction policies, to choose one",
    "bench": "measure this machine and tierd on it",
    "bugreport": "gather what somebody needs who is to help, without any names",
    "completion": "print the completion for a shell",
    "version": "print the version",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = choose(given[:1]), given[1:]
    try:
        code = run(name, rest)
        sys.stdout.flush()
        return code
    except TierdError as error:
        print(f"tierd {name}: {error}", file=sys.stderr)
        return USAGE if isinstance(error, Invalid) else UNREACHABLE if isinstance(error, Closed) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`tierd status | head`): the interpreter must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def choose(given: list[str]) -> str:
    """The command's name; prints help or usage and exits when there is none."""
    commands = "\n".join(f"  {name:15} {text}" for name, text in COMMANDS.items())
    codes = "exit codes: " + "; ".join(f"{code} {text}" for code, text in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="tierd",
        usage="tierd COMMAND [ARGUMENTS]",
        description="A tiered KV-cache storage daemon for LLM inference.",
        epilog=f"commands (tierd COMMAND --help says more):\n{commands}\n\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tierd {__version__}", help="print it")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return str(parser.parse_args(given).command)


def run(name: str, rest: list[str]) -> int:
    return int(command(name).run(parser_of(name).parse_args(rest)))


def command(name: str) -> Any:
    """The module of a command: it has `add_arguments` and `run`, and its docstring is its help."""
    return import_module(f"tierd.cli.{name.replace('-', '_')}")


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command's arguments."""
    module = command(name)
    parser = argparse.ArgumentParser(prog=f"tierd {name}", description=module.__doc__, allow_abbrev=False)
    module.add_arguments(parser)
    return parser

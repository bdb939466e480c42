"""The command `tierd`. Each subcommand is a module of this package and is imported only when it is asked for.

Exit codes: 0 done; 1 it failed; 2 the command line or the configuration is wrong; 3 the daemon cannot be reached;
4 blocks or files are damaged (fsck, scrub); 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from tierd import __version__
from tierd.errors import Closed, Invalid, TierdError

OK, FAILED, USAGE, UNREACHABLE, DAMAGED, INTERRUPTED = 0, 1, 2, 3, 4, 130

COMMANDS = {
    "serve": "run the daemon",
    "status": "show what a running daemon holds",
    "top": "watch a running daemon: tiers, hits, transfers, clients, the busiest namespaces",
    "config": "check the configuration, show it with where each value is from, or print its schema",
    "reload": "have a running daemon read its configuration again",
    "install-service": "write the systemd units for this environment, or remove them again",
    "purge": "forget all that a namespace has stored",
    "sync": "wait until everything admitted so far is on NVMe",
    "drain": "write everything to NVMe, then stop the daemon",
    "hold": "run a daemon under a holder that keeps its memory over a crash: tierd hold -- tierd serve",
    "fsck": "check the state directory of a stopped daemon, and repair it if asked to",
    "scrub": "read what is on NVMe in the background, and give up what is damaged",
    "doctor": "say what this machine lacks, and what to do about it",
    "replay": "replay a trace through the eviction policies, to choose one",
    "bench": "measure this machine and tierd on it",
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
    codes = "exit codes: 0 done, 1 failed, 2 usage or configuration, 3 daemon not reachable, 4 damage found, 130 interrupted"
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
    command = import_module(f"tierd.cli.{name.replace('-', '_')}")
    if name == "hold":  # What follows `--` is another command's line: not ours to parse.
        return int(command.main(rest))
    parser = argparse.ArgumentParser(prog=f"tierd {name}", description=command.__doc__, allow_abbrev=False)
    command.add_arguments(parser)
    return int(command.run(parser.parse_args(rest)))

"""Measure this machine and tierd on it, with a scratch daemon: every figure beside its ceiling of the same run."""

from __future__ import annotations

import json
import signal
import sys
from argparse import ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path
from types import FrameType

from tierd.bench.machine import Steal, describe
from tierd.bench.report import Result, Task, lines

BENCHES = ("lookup", "transfer", "nvme", "index")
DIRECTORY = Path("/var/tmp")
"""On a disk, where /tmp often is not."""


def add_arguments(parser: ArgumentParser) -> None:
    """Which bench, for whom, and on which disk."""
    parser.add_argument("bench", choices=(*BENCHES, "all"), help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a few seconds with little data: shows that it runs, not how fast")
    parser.add_argument(
        "--directory",
        type=Path,
        default=DIRECTORY,
        help=f"where scratch files go: the disk to measure (default: {DIRECTORY})",
    )


def run(options: Namespace) -> int:
    """Run the benches one after the other; a missed floor is printed, and is no failure."""
    signal.signal(signal.SIGTERM, stop)
    steal = Steal()
    task = Task(options.directory, options.quick, say)
    names = BENCHES if options.bench == "all" else (options.bench,)
    results = []
    for name in names:
        result: Result = import_module(f"tierd.bench.{name}").run(task)
        results.append(result)
    machine = describe(options.directory)
    for result in results:
        machine |= result.facts
    machine |= {"steal_share": steal.share(), "quick": options.quick}
    print(as_json(options.bench, results, machine) if options.json else as_text(results, machine))
    return 0


def as_json(bench: str, results: list[Result], machine: dict[str, object]) -> str:
    """One object; the rows of several benches say which one they are of."""
    rows = [{"bench": result.bench, **row} if len(results) > 1 else row for result in results for row in result.rows]
    verdicts = [verdict for result in results for verdict in result.verdicts]
    return json.dumps({"bench": bench, "machine": machine, "rows": rows, "verdicts": verdicts})


def as_text(results: list[Result], machine: dict[str, object]) -> str:
    """The machine, then every bench's table."""
    return "\n".join(lines(results, machine))


def say(text: str) -> None:
    """Progress, for a person who waits."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text} ...", end="", file=sys.stderr, flush=True)


def stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends like Ctrl-C: the scratch daemon is stopped and its files are removed."""
    raise KeyboardInterrupt

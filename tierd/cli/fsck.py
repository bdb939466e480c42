"""Check the state directory of a daemon that is stopped: headers, directories, and every block against its digest.

Nothing is changed without --repair, which removes what cannot be used and frees blocks that are damaged.
Exit code 0: sound, or all damage was repaired; 4: there is damage; 1: it could not be checked, for example because a daemon
uses it.
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from tierd.cli import DAMAGED, OK
from tierd.cli.options import add_config_arguments, load_config
from tierd.errors import Invalid
from tierd.fsck import Report, check
from tierd.tiers.io.posix import PosixEngine
from tierd.tiers.state import StateDirectory
from tierd.values import rounded_size


def add_arguments(parser: ArgumentParser) -> None:
    """Which directory, and whether to mend it."""
    add_config_arguments(parser, "--state-dir")
    parser.add_argument("--repair", action="store_true", help="remove and free what is damaged; nothing is changed without it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: Namespace) -> int:
    """Examine it, as its owner."""
    config = load_config(options)
    for dotted, folder in (("server.state_dir", config.server.state_dir), ("nvme.path", config.nvme.path)):
        if not folder.is_dir():
            raise Invalid(f"{dotted} = {folder} is no directory: give the daemon's own, with --config or --state-dir")
    become_owner(config.server.state_dir)
    state = StateDirectory(config.server.state_dir, config.nvme.path)
    try:
        report = check(state, PosixEngine(), options.repair)
    finally:
        state.close()
    print(json.dumps(as_map(report)) if options.json else "\n".join(page(state.path, report)))
    return OK if report.is_sound else DAMAGED


def become_owner(folder: Path) -> None:
    """What root makes here (a lock) must be the daemon's to open."""
    found = folder.stat()
    if os.geteuid() == 0 and found.st_uid:
        os.setegid(found.st_gid)
        os.seteuid(found.st_uid)


def as_map(report: Report) -> dict[str, object]:
    """The report as plain values."""
    problems = [problem._asdict() | {"path": str(problem.path)} for problem in report.problems]
    return vars(report) | {"problems": problems, "sound": report.is_sound}


def page(folder: Path, report: Report) -> Iterator[str]:
    """What a person wants to know: how much was read, then a line for each problem."""
    yield f"{folder}: {report.segments:,} segments, {report.blocks:,} blocks read ({rounded_size(report.bytes)})"
    if report.unfinished or report.stale:
        yield f"no damage: {report.unfinished:,} rows that a crash left unfinished, {report.stale:,} of a purged epoch"
    for problem in report.problems:
        kind = "damage" if problem.damage else "leftover"
        yield f"{kind:9}{problem.path}: {problem.what}{' -- repaired' if problem.repaired else ''}"
    left = sum(problem.damage and not problem.repaired for problem in report.problems)
    yield f"{left} problems left: --repair removes and frees what is damaged" if left else "sound"

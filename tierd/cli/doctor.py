"""Say what this machine offers tierd and what stands in the way, each with its remedy.

Exit code 0: nothing to mend; 1: there are warnings or errors.
"""

from __future__ import annotations

import json
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from tierd.cli.options import add_config_arguments, load_config
from tierd.config import FLAGS, Config
from tierd.doctor import gpu, memory, storage
from tierd.doctor.finding import ERROR, WARNING, Finding
from tierd.doctor.machine import Machine

WIDTH = 110


def add_arguments(parser: ArgumentParser) -> None:
    """The configuration that would be served, and for whom: a person or a program."""
    add_config_arguments(parser, *FLAGS)
    parser.add_argument("--json", action="store_true", help="print one JSON object with all findings")


def run(options: Namespace) -> int:
    """Examine this machine for the configuration."""
    found = list(examine(Machine(), load_config(options)))
    if options.json:
        print(json.dumps({"findings": [finding.to_map() for finding in found]}))
    else:
        print("\n".join(page(found)))
    return int(any(finding.level in (WARNING, ERROR) for finding in found))


def examine(machine: Machine, config: Config) -> Iterator[Finding]:
    """All findings, in the order in which they are read best."""
    yield from gpu.examine(machine, config)
    yield from memory.examine(machine, config)
    yield from storage.examine(machine, config)


def page(found: list[Finding]) -> Iterator[str]:
    """A line for each finding, and one for its remedy."""
    width = max(len(finding.check) for finding in found)
    for finding in found:
        head = f"{finding.level:8}{finding.check:{width}}  "
        yield textwrap.fill(finding.found, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
        if finding.remedy:
            indent = " " * len(head)
            yield textwrap.fill(finding.remedy, WIDTH, initial_indent=indent + "-> ", subsequent_indent=indent + "   ")
    bad = sum(finding.level in (WARNING, ERROR) for finding in found)
    yield f"\n{len(found)} findings, {bad} to mend"

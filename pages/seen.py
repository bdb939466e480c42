"""docs/seen.md: what systemd, Prometheus and the linter said of tierd in the last `make seen`, word for word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

HEAD = """\
<!-- Made by `make seen` from pages/seen.py and benchmarks/results/seen.json, which the tests write. -->
# What tools say of it

What operators' own tools have said of tierd in the run of {date}, on a machine with {cores} cores and Linux {kernel}, as it was
written down by the tests. `make seen` runs them again and makes this page; it makes none after a run in which a test failed.
The service ran in a container with {systemd}; Prometheus' own tool was
{promtool}.
"""
STATUS = """\
## systemctl status

The service as `tierd install-service` makes it from a checkout (`CHECKOUT`), just started, with one engine attached.
"""
SECURITY = """\
## systemd-analyze security

The same unit; a test asks for at most 1.6 (0 is best). {closed} more lines begin with ✓ and are left out here. What is open on
purpose, and why, is in [operations](operations.md#hardening).
"""
PROMTOOL = """\
## promtool

The alert and recording rules of `dashboards/prometheus`, and their unit tests: each alert is quiet, fires and resolves.
"""
METRICS = """\
All {lines} lines that a daemon exported after some work. No news is good news, the exit status was 0.
"""
LINTER = """\
## Dashboard linter

Findings by rule of Grafana's dashboard-linter (a port of its rules, `dashboards/lint.py`) in the files that are imported; each
rule is tried on a dashboard with one mistake, too.
"""
SECURED = "systemd-analyze security --offline=true --threshold=16 tierd.service"
SCRAPED = "curl -s http://127.0.0.1:9475/metrics | promtool check metrics"
SAID = ("systemctl --version", "systemctl status tierd", SECURED, "promtool --version", SCRAPED)


def page(results: dict[str, Any]) -> str:
    """The document; raises ValueError where a test has failed, or has not run."""
    said = results["said"]
    if results["failed"]:
        raise ValueError(f"tests have failed, there is nothing to show: {', '.join(results['failed'])}")
    if missing := [command for command in SAID if command not in said]:
        raise ValueError(f"nothing was noted of {', '.join(missing)}: these tests were skipped")
    versions = {"systemd": said["systemctl --version"][0], "promtool": said["promtool --version"][0].partition(" (")[0]}
    secured = [line for line in said[SECURED] if not line.startswith("✓")]
    rules = [(command, lines) for command, lines in said.items() if command.startswith(("promtool check", "promtool test"))]
    sections = (
        HEAD.format(date=results["date"], **results["machine"], **versions),
        STATUS,
        quoted("systemctl status tierd", said["systemctl status tierd"]),
        SECURITY.format(closed=len(said[SECURED]) - len(secured)),
        quoted(SECURED, secured),
        PROMTOOL,
        *(quoted(command, lines) for command, lines in rules),
        METRICS.format(**results["figures"]["check metrics"]),
        quoted(SCRAPED, said[SCRAPED]),
        LINTER,
        "\n".join(findings(results["figures"])),
    )
    return "\n".join(sections)


def quoted(command: str, lines: list[str]) -> str:
    """A command and its answer, as code."""
    return "\n".join(f"    {line}".rstrip() for line in (f"$ {command}", *lines)) + "\n"


def findings(figures: dict[str, dict[str, int]]) -> Iterator[str]:
    """The table: a row for each rule, a column for each dashboard."""
    boards = {name.removeprefix("lint "): found for name, found in figures.items() if name.startswith("lint ")}
    yield f"| rule | {' | '.join(f'`{board}`' for board in boards)} |"
    yield "|---|" + "---|" * len(boards)
    for rule in next(iter(boards.values())):
        yield f"| `{rule}` | {' | '.join(str(found[rule]) for found in boards.values())} |"
    yield ""

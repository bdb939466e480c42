"""What a run of the tests has shown, as a file: `pytest --results FILE`. Pages of the docs are made from such files."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[1]


class Results:
    """Passed tests by file, failed ones by name, the figures that tests have noted, and what commands have said to them."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.figures: dict[str, dict[str, float]] = {}
        self.said: dict[str, list[str]] = {}
        self.passed: Counter[str] = Counter()
        self.failed: list[str] = []

    def note(self, name: str, **figures: float) -> None:
        """Remember what a test has measured."""
        self.figures[name] = figures

    def quote(self, command: str, said: str) -> None:
        """Remember what a command has said, line by line, but not where this checkout lies, and on which machine."""
        named = said.replace(str(CHECKOUT), "CHECKOUT").replace(f" {platform.node()} ", " HOST ")
        self.said[command] = [line.rstrip() for line in named.strip("\n").splitlines()]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count each test once."""
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed[report.nodeid.partition("::")[0]] += 1

    def pytest_sessionfinish(self) -> None:
        """Write it all."""
        if self.file:
            found = {
                "passed": dict(sorted(self.passed.items())),
                "failed": self.failed,
                "figures": self.figures,
                "said": self.said,
            }
            self.file.write_text(json.dumps({"date": date.today().isoformat(), "machine": machine(), **found}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Where that was."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kernel, python = platform.release().split("-")[0], platform.python_version()
    return {"cores": os.cpu_count(), "memory_gib": round(memory_bytes / (1 << 30)), "kernel": kernel, "python": python}

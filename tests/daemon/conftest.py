"""Daemons for tests: started in short directories, stopped by their pid, their logs shown when a test fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import SEGMENT_BYTES, Daemon, settings

Start = Callable[..., Daemon]


@pytest.fixture
def make(short_path: Path) -> Iterator[Start]:
    """Makes daemons, not started yet: `make(cpu_bytes=..., held=True)`; each has its folder, or the one given."""
    made: list[Daemon] = []

    def build(*, name: str = "d", held: bool = False, environ: dict[str, str] | None = None, **values: Any) -> Daemon:
        folder = short_path / name
        folder.mkdir(exist_ok=True)
        flags = settings(
            **{
                "cpu_bytes": 4 * SEGMENT_BYTES,
                "cpu_segment_bytes": SEGMENT_BYTES,
                "nvme_bytes": 16 * SEGMENT_BYTES,
                "nvme_segment_bytes": SEGMENT_BYTES,
                "cpu_huge_pages": "off",
                **values,
            }
        )
        made.append(Daemon(folder, flags, held, **(environ or {})))
        return made[-1]

    yield build
    for daemon in made:
        daemon.end()
    for log in sorted({daemon.log_file for daemon in made}):
        text = log.read_text() if log.exists() else ""
        print(f"-- {log}\n{text}")  # pytest shows it when the test failed
        for bug in ("Traceback", "never awaited"):
            assert bug not in text, f"the daemon's log has {bug!r}:\n{text}"


@pytest.fixture
def start(make: Start) -> Start:
    """Makes daemons and starts them."""
    return lambda **options: make(**options).start()


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """A small daemon: four cpu segments, sixteen nvme ones."""
    return start()

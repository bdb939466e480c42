"""tierd with a clock that its driver sets: `python benchmarks/trace_clock.py FILE serve ...` is `tierd serve ...`.

FILE has eight bytes, a little-endian number of Unix milliseconds. It is the daemon's wall clock, so blocks of a trace that is
over in a minute are as old as they would be in the hour that it took. Deadlines are real, of the monotonic clock.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tierd import clock
from tierd.cli import main

MILLISECONDS = np.dtype("<i8")


class TraceClock:
    """The time in a file, made with it if need be."""

    def __init__(self, file: Path, mode: str) -> None:
        self._now = np.memmap(file, MILLISECONDS, mode, shape=(1,))

    def __call__(self) -> int:
        return int(self._now[0])

    def set(self, milliseconds: int) -> None:
        """It is so late now."""
        self._now[0] = milliseconds


if __name__ == "__main__":
    clock.unix_milliseconds = TraceClock(Path(sys.argv.pop(1)), "r")
    sys.exit(main())

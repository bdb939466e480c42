"""`tierd`, but its Nth write to a file is its last: a process that kills itself at a chosen call, without any tracer.

`python -m tests.faults.deadly MARKER N HOW serve ...` dies at write call N, before it ("before") or after half of its
bytes ("half"). It leaves MARKER behind, and a life that finds it is an ordinary one. While MARKER.wait exists, no call
is counted.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

from tierd.cli import main

CALLS = ("pwrite", "pwritev", "posix_fallocate", "rename", "fsync", "unlink")


def arm(marker: Path, fatal: int, half: bool) -> None:
    """Count every call that changes a file; the process ends at the fatal one."""
    numbers, waiting = count(1), marker.with_suffix(".wait")

    def armed(name: str, call: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            if not waiting.exists() and next(numbers) == fatal:
                if half:
                    write_half(name, call, arguments)
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return counted

    for name in CALLS:
        setattr(os, name, armed(name, getattr(os, name)))


def write_half(name: str, call: Any, arguments: tuple[Any, ...]) -> None:
    """Do the first half of a write, in whole pages where it is that long; of what cannot be halved, all."""
    if name in ("pwrite", "pwritev"):
        descriptor, data, offset = arguments
        data = memoryview(data if name == "pwrite" else data[0])
        part = data[: len(data) // 2 // 4096 * 4096] if len(data) > 4096 else data[: len(data) // 2]
        arguments = (descriptor, part if name == "pwrite" else [part], offset)
    call(*arguments)


if __name__ == "__main__":
    file, number, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if not file.exists():
        arm(file, number, how == "half")
    sys.exit(main(sys.argv[4:]))

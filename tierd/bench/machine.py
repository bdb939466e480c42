"""What a bench ran on, as far as the kernel tells an unprivileged user."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tierd.clock import unix_milliseconds

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
CACHE_BYTES_UNKNOWN = 32 << 20


def describe(directory: Path) -> dict[str, Any]:
    """The machine by name and numbers; `directory` is where the disk is measured."""
    return {
        "date": datetime.fromtimestamp(unix_milliseconds() / 1000, UTC).isoformat(timespec="seconds"),
        "cpu": _first(r"^model name\s*: (.*)$", "/proc/cpuinfo") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gpu": gpu(),
        "filesystem": filesystem(directory),
    }


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the first core can use."""
    sizes = [_first(r"^(\d+)K$", cache / "size") for cache in CACHES.glob("index*")]
    return max((int(text) << 10 for text in sizes if text), default=CACHE_BYTES_UNKNOWN)


def gpu() -> str:
    """The names of the NVIDIA GPUs, or "none"."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return ", ".join(_first(r"^Model:\s*(.*)$", file) for file in files) or "none"


def filesystem(directory: Path) -> str:
    """Kind and device of the file system that a directory is on: the longest mount point above it."""
    path = directory.resolve()
    best, found = -1, "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, point, kind = line.split()[:3]
        if path.is_relative_to(point.encode().decode("unicode_escape")) and len(point) >= best:
            best, found = len(point), f"{kind} on {device}"
    return found


class Steal:
    """Share of the processors' time that the hypervisor gave to others since this object was made."""

    def __init__(self) -> None:
        self._before = _processor_times()

    def share(self) -> float:
        """0.0 to 1.0."""
        spent = [after - before for before, after in zip(self._before, _processor_times(), strict=True)]
        return spent[7] / max(sum(spent), 1)


def _processor_times() -> list[int]:
    """Ticks of all cores: user, nice, system, idle, iowait, irq, softirq, steal."""
    return [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


def _first(pattern: str, file: str | Path) -> str:
    try:
        found = re.search(pattern, Path(file).read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""

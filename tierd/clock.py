"""The only place that reads a clock. Everything else is given the time as an argument."""

from __future__ import annotations

import time


def monotonic_seconds() -> float:
    """Seconds of the monotonic clock, for deadlines and durations."""
    return time.monotonic()


def thread_seconds() -> float:
    """Processor time of the calling thread, in seconds."""
    return time.thread_time()


def unix_milliseconds() -> int:
    """Wall clock in Unix milliseconds, for recency that must survive a restart."""
    return time.time_ns() // 1_000_000


def unix_nanoseconds() -> int:
    """Wall clock in Unix nanoseconds, for creation stamps."""
    return time.time_ns()

"""A real daemon under `tierd hold` in a folder of its own, for tests that are unkind to it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tierd.cli.admin import ask
from tierd.errors import Closed
from tierd.layout import Layout

ROOT = Path(__file__).parents[2]
SERVE = [sys.executable, "-m", "tierd", "serve"]
HOLD = [sys.executable, "-m", "tierd", "hold", "--restarts-max", "100000", "--"]
POLL_SECONDS = 0.002
READY_SECONDS_MAX = 30.0
"""Patience with a loaded machine and its disk; what is promised is asked for where it is tested."""
LAYOUT = Layout(layers=1, kv_heads=1, head_dim=1023, dtype="uint8")
"""Blocks of 32,736 bytes in slots of 32 KiB, so that there is padding."""
SMALL = {
    "metrics.listen": "",
    "cpu.bytes": "32MiB",
    "cpu.segment_bytes": "4MiB",
    "cpu.huge_pages": "off",
    "nvme.bytes": "128MiB",
    "nvme.segment_bytes": "4MiB",
    "nvme.io_engine": "posix",
    "nvme.io_threads": "2",
    "limits.wait_seconds_max": "30",
}
T = TypeVar("T")


class House:
    """A daemon with small tiers. `held` puts it under the holder, which starts it again after each `kill`."""

    def __init__(self, folder: Path, *, held: bool = True, serve: Sequence[str] = SERVE, **settings: str) -> None:
        self.folder, self.held, self._serve = folder, held, list(serve)
        self.socket, self.admin = folder / "t.sock", folder / "admin.sock"
        self.state, self.log = folder / "state", folder / "log"
        self._settings = SMALL | {name.replace("__", "."): value for name, value in settings.items()}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> House:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.crash()

    def start(self, wait: bool = True) -> None:
        """Start the daemon, and wait until it answers."""
        places = ["--socket", self.socket, "--runtime-dir", self.folder, "--state-dir", self.state]
        settings = [word for item in self._settings.items() for word in ("--set", "=".join(item))]
        command = [*(HOLD if self.held else []), *self._serve, *map(str, places), *settings]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> dict[str, Any]:
        """The status of a daemon that answers."""
        try:
            return until(self.status, "the daemon is not ready", READY_SECONDS_MAX)
        except AssertionError as error:
            raise AssertionError(f"{error}; the log ends with: {self.log.read_text()[-3000:]}") from error

    def status(self) -> dict[str, Any] | None:
        """What `tierd status` says, None while nobody answers."""
        with suppress(Closed):
            return ask(self.admin, "status", 2.0)
        return None

    def slots(self, tier: str = "cpu") -> dict[str, int]:
        """Slots of a tier by state."""
        return dict(self.wait_ready()["tiers"][tier]["slots"])

    def sync(self) -> None:
        """Wait until everything that was committed is on NVMe."""
        ask(self.admin, "sync", 31.0, deadline_ms=30_000)

    def child(self) -> int:
        """The pid of the daemon that was started last; 0 when there is none."""
        assert self.process
        if not self.held:
            return self.process.pid
        with suppress(OSError, IndexError):
            return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])
        return 0

    def kill(self) -> int:
        """SIGKILL the daemon and wait until it is gone; returns its pid. The holder starts another one at once."""
        pid = until(self.child, "the holder has started no daemon")
        kill_process(pid)
        return pid

    def crash(self) -> None:
        """SIGKILL daemon and holder: what only memory had is gone."""
        if self.process is None:
            return
        if self.held:
            os.kill(self.process.pid, signal.SIGSTOP)  # so that it starts no other one
        if child := self.child():
            with suppress(ProcessLookupError):
                kill_process(child)
        self.process.kill()
        self.process.wait()
        self.process = None

    def stop(self) -> int:
        """SIGTERM, and wait for the end; returns the exit code."""
        assert self.process
        self.process.terminate()
        code = self.process.wait(20)
        self.process = None
        return code

    def errors(self) -> list[str]:
        """Lines of the log that no fault explains: bugs and tracebacks."""
        words = ("bug", "Traceback", "Error:", "background work failed", "transfer failed")
        return [line for line in self.log.read_text().splitlines() if any(word in line for word in words)]


def kill_process(pid: int) -> None:
    """SIGKILL a process and wait until it is dead (its parent may still have to collect it)."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], READY_SECONDS_MAX)[0], f"process {pid} does not die"
    finally:
        os.close(pidfd)


def until(question: Callable[[], T | None], complaint: str, seconds: float = 5.0) -> T:
    """Ask until the answer is true; AssertionError with the complaint and the last answer at the deadline."""
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, f"{complaint} after {seconds} s: {answer!r}"
        time.sleep(POLL_SECONDS)
    return answer

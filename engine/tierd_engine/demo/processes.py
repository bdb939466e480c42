"""The daemon under its holder, and engine processes: started with a deadline, stopped by pid whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tierd.clock import monotonic_seconds
from tierd.errors import Closed, Invalid

READY_SECONDS_MAX = 20.0
SYNC_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 20.0
ENGINE_SECONDS_MAX = 600.0
POLL_SECONDS = 0.02
LOG_LINES_SHOWN = 12
ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # torch's threads spin at barriers by default, which on cores that others use too costs ten times what waiting does.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def run_python(module: str, *arguments: object, log: Path) -> str:
    """Run a module in a fresh interpreter and return what it printed; raises Invalid with its log's end if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = os.environ | ENGINE_ENVIRONMENT
    with log.open("w") as errors:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=ENGINE_SECONDS_MAX, env=environment
            )
        except subprocess.TimeoutExpired:
            raise Closed(f"{module} did not end within {ENGINE_SECONDS_MAX:g} seconds and was killed") from None
    if done.returncode:
        raise Invalid(f"{module} failed with exit code {done.returncode}:\n{_tail(log)}")
    return done.stdout


class Daemon:
    """`tierd hold -- tierd serve` with tiers of so many bytes (gpu: 0, none); all methods have deadlines.

    Raises Closed when the daemon does not do in time what was asked.
    """

    def __init__(
        self, runtime_dir: Path, state_dir: Path, log: Path, *, cpu: str = "1GiB", nvme: str = "4GiB", gpu: int = 0
    ) -> None:
        self.socket = runtime_dir / "tierd.sock"
        self._runtime_dir = runtime_dir
        self._log = log
        serve = ["serve", "--socket", self.socket, "--state-dir", state_dir, "--runtime-dir", runtime_dir]
        for setting in (f"gpu.bytes={gpu}", f"cpu.bytes={cpu}", f"nvme.bytes={nvme}", "metrics.listen=127.0.0.1:0"):
            serve += ["--set", setting]
        self._command = [*_tierd("hold"), "--", *_tierd(*serve)]
        self._holder: subprocess.Popen[bytes] | None = None
        self._pidfd: int | None = None
        self.pid = 0
        """Of the daemon that runs now."""

    def start(self) -> None:
        """Start holder and daemon; returns when the daemon answers."""
        with self._log.open("a") as log:
            # A session of its own: Ctrl-C reaches only the demo, which then stops all in order.
            self._holder = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._wait_ready(other_than=0)

    def kill(self) -> None:
        """Kill the daemon with SIGKILL; returns when the holder has started another one and that one answers."""
        assert self._pidfd is not None
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._wait_ready(other_than=self.pid)

    def cpu_seconds(self) -> float:
        """CPU time of the daemon that runs now, since its start."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def sync(self) -> None:
        """Wait until everything that was stored is on NVMe."""
        command = _tierd("sync", "--runtime-dir", self._runtime_dir)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SYNC_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            raise Closed(f"tierd sync did not end within {SYNC_SECONDS_MAX:g} seconds") from None
        if done.returncode:
            raise Closed(f"tierd sync failed with exit code {done.returncode}:\n{done.stderr}")

    def stop(self) -> None:
        """Stop holder and daemon, by force when they take too long; harmless when they are not running."""
        if self._holder:
            self._holder.terminate()
            try:
                self._holder.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self._holder.kill()
                self._holder.wait()
            self._holder = None
        if self._pidfd is not None:
            with suppress(ProcessLookupError):  # it ended with its holder, as it should
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = None

    def _wait_ready(self, other_than: int) -> None:
        """Wait for a daemon with another pid than the given one to accept, and remember it."""
        deadline = monotonic_seconds() + READY_SECONDS_MAX
        while (pid := _listener_pid(self.socket)) in (0, other_than):
            assert self._holder is not None
            if self._holder.poll() is not None:
                raise Closed(f"tierd ended with exit code {self._holder.returncode}:\n{_tail(self._log)}")
            if monotonic_seconds() > deadline:
                raise Closed(f"tierd does not answer after {READY_SECONDS_MAX:g} seconds:\n{_tail(self._log)}")
            time.sleep(POLL_SECONDS)
        if self._pidfd is not None:
            os.close(self._pidfd)
        self.pid, self._pidfd = pid, os.pidfd_open(pid)


def _tierd(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tierd", *map(str, arguments)]


def _listener_pid(path: Path) -> int:
    """Process that accepts on a Unix socket (SO_PEERCRED); 0 when nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return 0
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])

"""A daemon of the bench's own, in a temporary directory, gone with everything it stored when the bench ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tierd.cli.admin import ask
from tierd.clock import monotonic_seconds
from tierd.errors import Closed, Invalid
from tierd.layout import Layout
from tierd.values import KIB, MIB

READY_SECONDS_MAX = 20.0
ANSWER_SECONDS_MAX = 5.0
STOP_SECONDS_MAX = 10.0
POLL_SECONDS = 0.01
SPARE_BYTES = 256 * MIB
"""What is left free on a file system at least."""

LAYOUTS = {
    4 * KIB: Layout(layers=1, kv_heads=1, head_dim=64, dtype="bfloat16"),
    64 * KIB: Layout(layers=4, kv_heads=4, head_dim=64, dtype="bfloat16"),
    360 * KIB: Layout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16"),
    2 * MIB: Layout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16"),
}
"""Block bytes -> a layout of that size: 360 KiB is SmolLM2-135M's, 2 MiB is Llama-3.1-8B's."""


class Daemon:
    """A running `tierd serve`, with no metrics port and no configuration but the settings that it was started with."""

    def __init__(self, sockets: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self.socket = sockets / "tierd.sock"
        self._admin_socket = sockets / "admin.sock"
        self._process = process
        self._log = log

    def status(self) -> dict[str, Any]:
        """What `tierd status` would say."""
        return ask(self._admin_socket, "status", ANSWER_SECONDS_MAX)

    def sync(self, seconds_max: float) -> None:
        """Return when everything that was admitted is on NVMe; raises Busy."""
        ask(self._admin_socket, "sync", seconds_max + 1.0, deadline_ms=int(seconds_max * 1000))

    def written_bytes(self) -> int:
        """Bytes that the process has handed to disks so far, as the kernel counts them."""
        lines = Path(f"/proc/{self._process.pid}/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))

    def wait_ready(self) -> None:
        """Return when it answers; raises Closed with the end of its log if it does not."""
        deadline = monotonic_seconds() + READY_SECONDS_MAX
        while self._process.poll() is None and monotonic_seconds() < deadline:
            try:
                self.status()
                return
            except Closed:
                time.sleep(POLL_SECONDS)
        code = self._process.poll()
        what = f"was not ready within {READY_SECONDS_MAX:g} s" if code is None else f"ended with exit code {code}"
        last = "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
        raise Closed(f"the scratch daemon {what}; its log ends with:\n{last}")

    def stop(self) -> None:
        """End the process and wait for it."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def scratch_daemon(directory: Path, *, program: Sequence[str] = ("-m", "tierd"), **settings: str | int) -> Iterator[Daemon]:
    """A ready daemon; `settings` are configuration keys with `__` for the dot (`cpu__bytes="1GiB"`). `program` is what Python
    runs.
    """
    with scratch_folder(directory) as state, tempfile.TemporaryDirectory(prefix="tierd-") as sockets:
        nothing = state / "empty.toml"
        nothing.touch()
        given = {
            "server.runtime_dir": sockets,
            "server.state_dir": str(state),
            "metrics.listen": "",
            "limits.drain_seconds_max": "0.01",
            **{name.replace("__", "."): str(value) for name, value in settings.items()},
        }
        command = [sys.executable, *program, "serve", "--config", str(nothing)]
        command += [f"--set={name}={value}" for name, value in given.items()]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("TIERD_", "LISTEN_"))}
        log = state / "log"
        with log.open("wb") as errors:
            # Its own session: Ctrl-C ends the bench, and the bench ends the daemon.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environ, start_new_session=True
            )
        daemon = Daemon(Path(sockets), process, log)
        try:
            daemon.wait_ready()
            yield daemon
        finally:
            daemon.stop()


@contextmanager
def scratch_folder(directory: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """An empty folder in `directory`, removed afterwards; Invalid when there are not `needed_bytes` to spare."""
    try:
        free_bytes = shutil.disk_usage(directory).free
        folder = Path(tempfile.mkdtemp(prefix="tierd-bench-", dir=directory))
    except OSError as error:
        raise Invalid(f"--directory {directory} cannot be used ({error.strerror}): name another one") from error
    try:
        if free_bytes < needed_bytes + SPARE_BYTES:
            need, have = (needed_bytes + SPARE_BYTES) // MIB, free_bytes // MIB
            raise Invalid(f"--directory {directory}: this needs {need} MiB free, there are {have}: name another one")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

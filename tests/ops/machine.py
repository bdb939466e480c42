"""A machine of the tests' own: Debian in a container, booted by a real systemd, in which tierd is installed as a service.

The root is made once by mmdebstrap and kept in `.build/`; what a boot writes is on an overlay in memory and goes with it. The
checkout and its interpreter are bound to where they are, read-only, so that `tierd install-service` finds the same environment.

Where there can be no such machine, tests are skipped with the reason. What goes wrong once it has come up is a failure.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from tierd.clock import monotonic_seconds

CHECKOUT = Path(__file__).parents[2]
ROOT = CHECKOUT / ".build/systemd-root"
TOOLS = ("mmdebstrap", "systemd-nspawn", "nsenter")
SUITE = "bookworm"
PACKAGES = "systemd,systemd-sysv,dbus,python3,procps"
MAKE_SECONDS_MAX, BOOT_SECONDS_MAX, HALT_SECONDS_MAX = 300.0, 60.0, 30.0
COMMAND_SECONDS_MAX = 60.0
POLL_SECONDS = 0.05
DISK = "/disk"
"""In the machine: a directory of the real disk, for an nvme tier."""
SHARED = tuple(path for path in (CHECKOUT, Path(sys.base_prefix)) if path != Path("/usr"))
"""An interpreter in /usr is the distribution's: the machine has one of its own there."""
SANDBOX = ("User=nobody", "ProtectSystem=strict", "ProtectHome=tmpfs", "PrivateTmp=yes", "PrivateNetwork=yes")
"""Of what the shipped unit asks for, what a systemd in a container may be unable to do."""
T = TypeVar("T")


class Impossible(Exception):
    """There can be no such machine here, and why."""


@contextmanager
def booted(shared: Sequence[Path] = SHARED, root: Path = ROOT) -> Iterator[Machine]:
    """A machine while it is up, with a disk of its own; whoever wants it is skipped where there can be none."""
    root.parent.mkdir(exist_ok=True)
    disk = Path(tempfile.mkdtemp(prefix="disk-", dir=root.parent))
    disk.chmod(0o755)
    machine = Machine(disk, shared, root)
    try:
        try:
            machine.boot()
        except Impossible as error:
            pytest.skip(f"a systemd cannot be booted here: {error}")
        yield machine
    finally:
        machine.halt()
        shutil.rmtree(disk, ignore_errors=True)


def check_tools() -> None:
    """Raises Impossible."""
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise Impossible(f"{', '.join(missing)} not found: apt-get install mmdebstrap systemd-container")
    if os.geteuid():
        raise Impossible("only root can boot a container")


def make(root: Path) -> None:
    """Make the root file system, all of it or nothing; raises Impossible."""
    fresh = root.with_suffix(f".{os.getpid()}")
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(fresh)]
    with tempfile.TemporaryFile("w+") as log:
        making = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            ended = f"it ended with {making.wait(MAKE_SECONDS_MAX)}"
        except subprocess.TimeoutExpired:
            os.killpg(making.pid, signal.SIGKILL)
            ended = f"not within {MAKE_SECONDS_MAX:g} s"
        if making.wait():
            subprocess.run(["rm", "-rf", "--one-file-system", str(fresh)], check=False)
            log.seek(0)
            raise Impossible(f"mmdebstrap cannot make a root, {ended}: {log.read()[-500:].strip()}")
    fresh.rename(root)


class Machine:
    """One boot of `root`. `disk` is bound to DISK, and what is `shared` to where it is, read-only."""

    def __init__(self, disk: Path, shared: Sequence[Path] = SHARED, root: Path = ROOT) -> None:
        self.disk = disk
        self._shared, self._root = shared, root
        self._console = disk / "console"
        self._container: subprocess.Popen[bytes] | None = None
        self.tierd = Path(sys.executable).with_name("tierd")

    def boot(self) -> None:
        """Until systemd has started everything; raises Impossible where that cannot be."""
        check_tools()
        if not self._root.exists():
            make(self._root)
        binds = [*(f"--bind-ro={path}" for path in self._shared), f"--bind={self.disk}:{DISK}"]
        options = ["--quiet", "--volatile=overlay", "--register=no", "--keep-unit", "--console=passive", "--private-network"]
        with self._console.open("wb") as console:
            command = ["systemd-nspawn", *options, *binds, f"--directory={self._root}", "--boot"]
            self._container = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        try:
            until(self._up, "the machine does not come up", BOOT_SECONDS_MAX)
            self._check_services()
        except (AssertionError, subprocess.TimeoutExpired) as error:
            raise Impossible(f"{error}: {self._said()}") from None

    def _check_services(self) -> None:
        """A sandboxed service that is not ours can run there, with the interpreter that it will have; raises Impossible."""
        what = [sys.executable, "-c", "import numpy"] if self._shared else ["true"]
        options = ["--quiet", "--wait", "--collect", "--pipe", *(f"--property={setting}" for setting in SANDBOX)]
        binds = [f"--property=BindReadOnlyPaths={path}" for path in self._shared]
        done = self.run("systemd-run", *options, *binds, *what, check=False)
        if done.returncode:
            raise Impossible(f"a service of its own cannot run {what[0]}: {done.stdout}{done.stderr}".strip())

    def _said(self) -> str:
        return self._console.read_text(errors="replace")[-500:].strip()

    def halt(self) -> None:
        """Take it down, and everything in it."""
        if self._container is None:
            return
        if leader := self._leader():
            with suppress(ProcessLookupError):
                os.kill(leader, signal.SIGKILL)  # the init of a PID namespace takes all others with it
        else:
            self._container.terminate()
        try:
            self._container.wait(HALT_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._container.kill()
            self._container.wait()

    def enter(self, *command: str) -> list[str]:
        """The command line that runs a command in the machine."""
        inside = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", f"PYTHONPATH={CHECKOUT}", "PYTHONDONTWRITEBYTECODE=1"]
        return ["nsenter", "-t", str(self._leader()), "-m", "-u", "-i", "-n", "-p", "-C", "--", *inside, *command]

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in it; where it must not fail, what it said is in the error."""
        done = subprocess.run(self.enter(*command), capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, cwd="/")
        assert not check or not done.returncode, f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def write(self, path: str, text: str) -> None:
        """Make a file in it."""
        subprocess.run(self.enter("tee", path), input=text.encode(), stdout=subprocess.DEVNULL, check=True, timeout=10)

    def journal(self, *options: str) -> str:
        """What the service has logged in this boot."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--unit=tierd", "--output=cat", "--no-pager", *options).stdout

    @contextmanager
    def network(self) -> Iterator[None]:
        """Be in its network, which has a loopback of its own: this thread, and the processes that it starts."""
        enter = ctypes.CDLL(None, use_errno=True).setns
        with open("/proc/thread-self/ns/net") as ours, open(f"/proc/{self._leader()}/ns/net") as its:
            assert not enter(its.fileno(), 0), os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert not enter(ours.fileno(), 0), os.strerror(ctypes.get_errno())

    def _leader(self) -> int:
        """The pid of the machine's init; 0 when there is none."""
        assert self._container
        with suppress(OSError, IndexError):
            pid = self._container.pid
            return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        return 0

    def _up(self) -> bool:
        assert self._container
        if (ended := self._container.poll()) is not None:
            raise Impossible(f"systemd-nspawn ended with {ended}: {self._said()}")
        return bool(self._leader()) and self.run("systemctl", "is-system-running", check=False).stdout.strip() in (
            "running",
            "degraded",
        )


class Unit:
    """tierd.service of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def configure(self, *sections: str) -> None:
        """Write /etc/tierd/tierd.toml anew."""
        self.machine.write("/etc/tierd/tierd.toml", "\n".join(sections) + "\n")

    def systemctl(self, verb: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One verb for the service."""
        return self.machine.run("systemctl", verb, "tierd.service", check=check)

    def show(self, *names: str) -> list[str]:
        """Properties of the service."""
        lines = self.machine.run("systemctl", "show", "tierd.service", *(f"--property={name}" for name in names)).stdout
        values = dict(line.split("=", 1) for line in lines.splitlines())
        return [values[name] for name in names]

    def pid(self) -> int:
        """The daemon's, in the machine; 0 when it does not run."""
        return int(self.show("MainPID")[0])

    def seconds_to_ready(self) -> float:
        """From the start of the last life's process to its READY=1."""
        began, ready = self.show("ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
        return (int(ready) - int(began)) / 1e6

    def signal(self, name: str) -> None:
        """Send the daemon a signal."""
        self.machine.run("systemctl", "kill", f"--signal={name}", "--kill-whom=main", "tierd.service")

    def wait_next_life(self, pid: int, seconds: float = 30.0) -> None:
        """Wait until another process than `pid` is ready."""

        def ready() -> bool:
            now, state = self.show("MainPID", "ActiveState")
            return state == "active" and int(now) not in (0, pid)

        until(ready, f"there is no new life after process {pid}", seconds)


def until(so: Callable[[], T], otherwise: str, seconds: float) -> T:
    """Ask until it is so; the answer that was."""
    deadline = monotonic_seconds() + seconds
    while not (answer := so()):
        assert monotonic_seconds() < deadline, f"{otherwise} within {seconds:g} s"
        select.select([], [], [], POLL_SECONDS)
    return answer

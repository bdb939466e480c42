"""`tierd hold -- COMMAND`: keep a daemon's descriptors over its death, and start it again, where there is no systemd.

The holder does nothing but wait: it has no threads, keeps no state but the descriptors, and speaks sd_notify's
datagrams (`FDSTORE=1`, `FDSTOREREMOVE=1`) towards the command and `LISTEN_FDS` when it starts it. Everything else
that the command notifies is passed on to the manager that started the holder, if any.
The command is started again when it died by a signal or with an exit code other than 0, unless it was told to stop.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import selectors
import signal
import socket
import struct
import sys
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NoReturn

from tierd import systemd
from tierd.clock import monotonic_seconds

MESSAGE_BYTES_MAX = 8192
BACKOFF_SECONDS, BACKOFF_SECONDS_MAX = 0.1, 5.0
RESTART_WINDOW_SECONDS = 60.0
EXIT_CANNOT_EXECUTE = 127

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_CREDENTIALS = struct.Struct("3i")
_DESCRIPTORS_SPARE = 64


def add_arguments(parser: ArgumentParser) -> None:
    """How often and how much; what follows `--` is another command's line."""
    parser.add_argument("--restarts-max", type=int, default=20, metavar="N", help="restarts a minute (default 20)")
    parser.add_argument("--descriptors-max", type=int, default=4096, metavar="N", help="descriptors kept (default 4096)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --")


def run(options: Namespace) -> int:
    """Run the command; returns the exit code of its last life (128 + n when signal n ended it)."""
    return Holder(options.command, options.restarts_max, options.descriptors_max).run()


class Store:
    """Descriptors by name, at most `descriptors_max` of them and as many as a command can be told the names of; several
    under one name keep their order.
    """

    def __init__(self, descriptors_max: int) -> None:
        self.descriptors_max = descriptors_max
        self._names_bytes = 0
        self._by_name: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((name, descriptor) for name, kept in self._by_name.items() for descriptor in kept)

    def add(self, name: str, descriptors: Sequence[int]) -> int:
        """Keep descriptors, which are the store's from then on; returns how many there was no room for.

        Like systemd, it does not keep a second descriptor of a file that it has under that name already.
        """
        refused = 0
        known = {key for kept in self._by_name.get(name, ()) if (key := _file_key(kept))}
        for descriptor in descriptors:
            key = _file_key(descriptor)
            full = len(self) >= self.descriptors_max or self._names_bytes + len(name) >= systemd.NAMES_BYTES_MAX
            if full or key in known:
                os.close(descriptor)
                refused += full
                continue
            self._by_name.setdefault(name, []).append(descriptor)
            self._names_bytes += len(name) + 1
            known |= {key} if key else set()
        return refused

    def remove(self, name: str) -> None:
        """Close all descriptors of that name."""
        for descriptor in self._by_name.pop(name, ()):
            os.close(descriptor)
            self._names_bytes -= len(name) + 1


class Holder:
    """The command, its notification socket and what is kept for it."""

    def __init__(self, command: Sequence[str], restarts_max: int, descriptors_max: int) -> None:
        self._command = list(command)
        self._restarts_max = restarts_max
        self._store = Store(min(descriptors_max, _descriptors_possible()))
        for name, descriptors in systemd.inherited().items():
            self._store.add(name, descriptors)
        self._outer = os.environ.get("NOTIFY_SOCKET")
        self._notifications = _listen()
        self._wakeup, signal_end = socket.socketpair()
        for end in (self._wakeup, signal_end):
            end.setblocking(False)
        self._signal_end = signal_end
        self._restarts: deque[float] = deque()
        self._backoff_seconds = 0.0
        self._was_ready = self._stopping = False

    def run(self) -> int:
        """Run the command until it ends for good; returns its exit code."""
        signal.set_wakeup_fd(self._signal_end.fileno(), warn_on_full_buffer=False)
        for number in _FORWARDED:
            signal.signal(number, lambda *_: None)  # the wakeup descriptor carries the number
        while True:
            child = self._spawn()
            code = self._attend(child)
            if self._is_over(code):
                return code if code >= 0 else 128 - code
            _say(f"{self._command[0]} {_ending(code)}; restarting it with {len(self._store)} descriptors")
            self._wait_backoff()
            if self._stopping:
                return 0

    def _attend(self, child: int) -> int:
        """Serve notifications and signals until the child is dead; returns its exit code, or minus the signal."""
        death = os.pidfd_open(child)
        with selectors.DefaultSelector() as selector:
            for source in (self._notifications, self._wakeup, death):
                selector.register(source, selectors.EVENT_READ)
            alive = True
            while alive:
                alive = death not in [key.fileobj for key, _ in selector.select()]
                self._pass_signals(death)
                self._take_notifications()  # after its death too: what it sent last counts
        os.close(death)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _is_over(self, code: int) -> bool:
        """Whether the command shall not be started again."""
        if code == 0 or self._stopping:
            return True
        if code > 0 and not self._was_ready:
            _say(f"{self._command[0]} {_ending(code)} before it was ever ready: not restarted")
            return True
        now = monotonic_seconds()
        while self._restarts and self._restarts[0] < now - RESTART_WINDOW_SECONDS:
            self._restarts.popleft()
        if len(self._restarts) >= self._restarts_max:
            _say(f"{self._command[0]} {_ending(code)}: restarted {len(self._restarts)} times in a minute, giving up")
            return True
        self._restarts.append(now)
        return False

    def _wait_backoff(self) -> None:
        """Wait a while that doubles with each life that never became ready; a signal to stop ends it."""
        deadline = monotonic_seconds() + self._backoff_seconds
        self._backoff_seconds = min(max(BACKOFF_SECONDS, 2 * self._backoff_seconds), BACKOFF_SECONDS_MAX)
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakeup, selectors.EVENT_READ)
            while not self._stopping and (left := deadline - monotonic_seconds()) > 0:
                selector.select(left)
                self._pass_signals(None)

    def _pass_signals(self, child: int | None) -> None:
        """Forward the signals that came; TERM and INT mean that the command's next end is the last."""
        try:
            numbers = self._wakeup.recv(256)
        except BlockingIOError:
            return
        for number in numbers:
            self._stopping |= number in (signal.SIGTERM, signal.SIGINT)
            if child is not None and number in _FORWARDED:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(child, number)

    def _take_notifications(self) -> None:
        while True:
            try:
                message, ancillary, flags, _ = self._notifications.recvmsg(
                    MESSAGE_BYTES_MAX,
                    socket.CMSG_SPACE(4 * systemd.DESCRIPTORS_PER_MESSAGE) + socket.CMSG_SPACE(_CREDENTIALS.size),
                    socket.MSG_CMSG_CLOEXEC,
                )
            except BlockingIOError:
                return
            descriptors, uid = _unpack(ancillary)
            if uid not in (0, os.getuid()) or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                _say(f"ignored a notification of uid {uid} with {len(descriptors)} descriptors (flags {int(flags):#x})")
                _close_all(descriptors)
                continue
            self._obey(message.decode("utf-8", "replace").splitlines(), descriptors)

    def _obey(self, lines: list[str], descriptors: list[int]) -> None:
        """Do what one notification asks for."""
        values = dict(line.split("=", 1) for line in lines if "=" in line)
        name = values.get("FDNAME") or "stored"
        if values.get("FDSTORE") == "1":
            if refused := self._store.add(name, descriptors):
                most = f"{self._store.descriptors_max} descriptors, and {systemd.NAMES_BYTES_MAX} bytes of their names"
                _say(f"no room for {refused} descriptors {name!r}: the limit is {most}")
        else:
            _close_all(descriptors)
        if values.get("FDSTOREREMOVE") == "1":
            self._store.remove(name)
        if values.get("READY") == "1":
            self._was_ready, self._backoff_seconds = True, 0.0
        if self._outer and (passed := [line for line in lines if not line.startswith(("FD", "MAINPID="))]):
            systemd.notify("\n".join(passed))

    def _spawn(self) -> int:
        """Fork and execute the command with the kept descriptors from 3 on; returns its pid."""
        holder = os.getpid()
        child = os.fork()
        if child == 0:
            try:
                self._become_command(holder)
            except OSError as error:
                _say(f"{self._command[0]} cannot be executed: {error}")
            finally:
                os._exit(EXIT_CANNOT_EXECUTE)
        return child

    def _become_command(self, holder: int) -> NoReturn:
        signal.set_wakeup_fd(-1)
        for number in (*_FORWARDED, signal.SIGPIPE):  # Python ignores the last, which a program would inherit
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)  # Ctrl-C reaches the holder alone, which forwards it once
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != holder:
            os._exit(0)
        environment = os.environ | {
            "NOTIFY_SOCKET": "@" + self._notifications.getsockname()[1:].decode(),
            "FDSTORE": str(self._store.descriptors_max),
        }
        if kept := list(self._store):
            environment |= {
                "LISTEN_PID": str(os.getpid()),
                "LISTEN_FDS": str(len(kept)),
                "LISTEN_FDNAMES": ":".join(name for name, _ in kept),
            }
        _line_up([descriptor for _, descriptor in kept])
        os.execvpe(self._command[0], self._command, environment)


def _line_up(descriptors: list[int]) -> None:
    """Put these descriptors at 3, 4, 5 ... for the program that will be executed; all others close then."""
    above = systemd.FIRST_DESCRIPTOR + len(descriptors)
    out_of_the_way = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above) for descriptor in descriptors]
    for index, descriptor in enumerate(out_of_the_way):
        os.dup2(descriptor, systemd.FIRST_DESCRIPTOR + index, inheritable=True)


def _listen() -> socket.socket:
    """A notification socket in the abstract namespace: it leaves nothing behind, and senders are known by
    credentials."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    channel.bind("\0tierd-hold-" + os.urandom(8).hex())
    return channel


def _unpack(ancillary: list[tuple[int, int, bytes]]) -> tuple[list[int], int]:
    """The descriptors and the sender's uid (-1: unknown) of a message."""
    descriptors: list[int] = []
    uid = -1
    for _, kind, data in ancillary:
        if kind == socket.SCM_RIGHTS:
            descriptors += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
        elif kind == socket.SCM_CREDENTIALS:
            uid = _CREDENTIALS.unpack(data)[1]
    return descriptors, uid


def _file_key(descriptor: int) -> tuple[int, int, int] | None:
    """What two descriptors of the same open file have in common; None where that cannot be known (anonymous inodes)."""
    try:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith("anon_inode:"):
            return None
    except OSError:
        return None
    about = os.fstat(descriptor)
    return about.st_dev, about.st_ino, fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE


def _descriptors_possible() -> int:
    """How many descriptors can be kept: the child has each one twice while it lines them up."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(0, (hard - _DESCRIPTORS_SPARE) // 2)


def _ending(code: int) -> str:
    return f"exited with {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _say(text: str) -> None:
    print(f"tierd hold: {text}", file=sys.stderr, flush=True)

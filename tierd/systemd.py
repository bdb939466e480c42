"""The service manager's side of a daemon's life, by hand: readiness, progress, and descriptors that outlive the process.

The same datagrams go to systemd and to `tierd hold`; without a manager (no NOTIFY_SOCKET) everything here does
nothing. A manager that does not listen cannot stop us: a message that it does not take within a second is given up.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence

from tierd.clock import monotonic_seconds
from tierd.errors import Invalid

FIRST_DESCRIPTOR = 3
DESCRIPTORS_PER_MESSAGE = 253
"""The kernel's limit on descriptors in one datagram (SCM_MAX_FD)."""
NAMES_BYTES_MAX = (128 << 10) - 64
"""Of the names of all descriptors that are passed to a process, each with a separator: the kernel's limit on one variable of
the environment (MAX_ARG_STRLEN), less the variable's own name and those of the sockets."""
DATA_SOCKET, METRICS_SOCKET = "data", "metrics"
"""Under which names listening sockets come (FileDescriptorName= of the socket units)."""

_SEND_SECONDS_MAX = 1.0
_NAME = re.compile(r"[\x20-\x39\x3b-\x7e]{1,255}")


def notify(state: str, descriptors: Sequence[int] = (), seconds_max: float = _SEND_SECONDS_MAX) -> bool:
    """Send one message of `KEY=VALUE` lines; returns whether a manager took it. With `seconds_max` 0 it never waits."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.settimeout(seconds_max)
        try:
            channel.connect("\0" + address[1:] if address.startswith("@") else address)
            socket.send_fds(channel, [state.encode()], list(descriptors))
        except OSError:
            return False
    return True


def ready() -> bool:
    """Say that the daemon serves."""
    return notify("READY=1")


def stopping(seconds: float) -> bool:
    """Say that the daemon is on its way out, which may take so many seconds from now."""
    return notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")


def reloading() -> bool:
    """Say that the configuration is read again, until `ready`; systemd from 253 on asks for the time (CLOCK_MONOTONIC)."""
    return notify(f"RELOADING=1\nMONOTONIC_USEC={int(monotonic_seconds() * 1e6)}")


def watchdog_seconds() -> float:
    """How often at least the manager wants to hear `alive` from this process; 0 when it does not."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(microseconds) / 1e6 if ours and microseconds.isdigit() else 0.0


def alive() -> bool:
    """Say that the daemon makes progress; never waits."""
    return notify("WATCHDOG=1", seconds_max=0)


def status(text: str) -> bool:
    """Say in one line what the daemon is doing."""
    return notify("STATUS=" + text.replace("\n", " "))


def can_store() -> bool:
    """Whether there is a manager that keeps descriptors."""
    return descriptors_max() > 0


def descriptors_max() -> int:
    """How many descriptors the manager keeps; systemd before 254 does not say it, which counts as a great many."""
    allowed = os.environ.get("FDSTORE", str(1 << 20))
    return int(allowed) if os.environ.get("NOTIFY_SOCKET") and allowed.isdigit() else 0


def short(value: bytes) -> str:
    """Bytes as a part of a descriptor's name: those of all that are kept must fit into NAMES_BYTES_MAX."""
    return urlsafe_b64encode(value).rstrip(b"=").decode()


def long(text: str) -> bytes:
    """What `short` was given."""
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def store(name: str, descriptors: Sequence[int]) -> bool:
    """Have descriptors kept under a name until `remove`, over any death of this process; ours stay open.

    Returns whether the manager took them all. Names have 1 to 255 printable ASCII characters without a colon, else
    Invalid.
    systemd promises no order among descriptors of one name.
    """
    if not _NAME.fullmatch(name):
        raise Invalid(f"descriptor name {name!r} is not 1 to 255 printable ASCII characters without a colon")
    batches = range(0, len(descriptors), DESCRIPTORS_PER_MESSAGE)
    message = f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0"
    return all(notify(message, descriptors[at : at + DESCRIPTORS_PER_MESSAGE]) for at in batches)


def remove(name: str) -> bool:
    """Have all descriptors of that name given up."""
    return notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def inherited() -> dict[str, list[int]]:
    """The descriptors that the manager passed to this process, by name; they are ours from then on, and asked for
    once."""
    count, pid = (os.environ.pop(key, "") for key in ("LISTEN_FDS", "LISTEN_PID"))
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    by_name: dict[str, list[int]] = {}
    for index in range(int(count)):
        descriptor = FIRST_DESCRIPTOR + index
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFD)
        fcntl.fcntl(descriptor, fcntl.F_SETFD, flags | fcntl.FD_CLOEXEC)
        name = names[index] if index < len(names) and names[index] else "unknown"
        by_name.setdefault(name, []).append(descriptor)
    return by_name

"""Who is at the other end of a Unix socket, in a way that stays true when process numbers are used again."""

from __future__ import annotations

import os
import select
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from tierd.errors import Closed, Invalid

CREDENTIALS = Struct("3i")
SO_PEERPIDFD = 77


@dataclass(frozen=True)
class Peer:
    """A process: `pid` as this PID namespace sees it (0: not at all), effective `uid` and `gid` when it connected.

    `pidfd` is readable once the process is gone. It belongs to the connection; whoever wants it longer duplicates it.
    """

    pid: int
    uid: int
    gid: int
    pidfd: int


def peer_of(connection: socket.socket) -> Peer:
    """The process that connected, or to a client the one that listens; raises Invalid with the remedy when it cannot be told,
    Closed when it is gone.
    """
    pid, uid, gid = CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    try:
        pidfd = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        os.set_inheritable(pidfd, False)
    except OSError:  # a kernel before 6.5, or the peer is gone
        pidfd = pidfd_by_number(pid, uid)
    return Peer(pid, uid, gid, pidfd)


def pidfd_by_number(pid: int, uid: int) -> int:
    """A pidfd of a process known by its number, where the kernel cannot name a socket's peer itself.

    The number may have been given to another process meanwhile, so what it names must have the same start time and user
    before and after the pidfd was opened, and still run. Raises as `peer_of`.
    """
    if pid <= 0:
        raise Invalid(
            f"your process cannot be told from others (its pid here is {pid}: another PID namespace): "
            "let client and daemon share one (docker --pid=host, hostPID: true), or run Linux 6.5 or newer"
        )
    try:
        before = start_and_uid(pid)
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError) as error:
        raise Closed(f"process {pid} was gone before it could be identified: {error}") from error
    try:
        same = start_and_uid(pid) == before and before[1] == uid and not has_ended(pidfd)
    except (OSError, ValueError):
        same = False
    if not same:
        os.close(pidfd)
        raise Closed(f"process {pid} is not the one of user {uid} that connected: connect again")
    return pidfd


def has_ended(pidfd: int) -> bool:
    """Whether the process of a pidfd is gone."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def pid_of(pidfd: int) -> int:
    """The number of a pidfd's process, for people; 0 when it is gone, or lives outside this PID namespace."""
    with suppress(OSError), open(f"/proc/self/fdinfo/{pidfd}") as lines:
        return next((max(0, int(line.split()[1])) for line in lines if line.startswith("Pid:")), 0)
    return 0


def start_and_uid(pid: int) -> tuple[int, int]:
    """A process's start in clock ticks since boot, and its effective user."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    status = Path(f"/proc/{pid}/status").read_text()
    start = int(stat.rpartition(")")[2].split()[19])
    uids = next(line for line in status.splitlines() if line.startswith("Uid:"))
    return start, int(uids.split()[2])

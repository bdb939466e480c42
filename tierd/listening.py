"""Listening Unix sockets: one that we make at a path and nobody else may have, or one that the service manager passes to us."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from tierd.errors import Invalid

BACKLOG = 128


def listen(path: Path, mode: int, key: str = "server.socket") -> socket.socket:
    """A listening Unix socket at `path`. Replaces a dead one; raises Invalid over a live one or anything else."""
    try:
        remove_stale(path, key)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            listener.bind(str(path))
            os.chmod(path, mode)  # before listen: until then nobody can connect
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise Invalid(f"socket {path} cannot be used: {error.strerror or error}; set another {key}") from error
    return listener


def taken_over(inherited: socket.socket, path: Path) -> socket.socket:
    """The service manager's listening socket; raises Invalid when it is not at the configured path."""
    if inherited.family != socket.AF_UNIX or inherited.getsockname() != str(path):
        where = inherited.getsockname()
        raise Invalid(f"tierd.socket listens on {where}, server.socket = {path}: make ListenStream= of the unit the same")
    inherited.setblocking(False)
    return inherited


def remove_stale(path: Path, key: str) -> None:
    """Remove a socket that nobody listens on."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Invalid(f"{path} exists and is no socket: remove it, or set another {key}")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        answer = probe.connect_ex(str(path))
    if answer not in (errno.ECONNREFUSED, errno.ENOENT):
        raise Invalid(f"another daemon listens on {path}: stop it, or set another {key}")
    with suppress(FileNotFoundError):
        os.unlink(path)

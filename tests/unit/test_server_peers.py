"""Who talks to the server, with which descriptors, and where: identity, SCM_RIGHTS and the socket's file."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_daemon import LIMITS, Daemon
from tests.unit.peer import BYE, STATS, Peer, Scripted, wait_until
from tierd.errors import Invalid
from tierd.listening import listen, taken_over
from tierd.server import Connection, Server
from tierd.wire.framing import encode
from tierd.wire.messages import Request
from tierd.wire.peer import has_ended, peer_of, pidfd_by_number


def is_closed(descriptor: int) -> bool:
    """Whether a descriptor number is free."""
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False


def test_descriptors_travel_with_their_frame(server: Daemon, handler: Scripted) -> None:
    """A push with descriptors between replies; they are duplicates, close-on-exec for the receiver to choose."""
    read_end, write_end = os.pipe()

    def answer(connection: Connection, _: Request) -> dict[str, Any]:
        connection.send({"id": 0, "push": "attach"}, [write_end] * 100)
        return {"after": True}

    handler.answers["stats"] = answer
    with Peer(server.path) as peer:
        assert peer.ask(STATS) == {"id": 0, "push": "attach"}
        assert len(peer.fds) == 100
        assert peer.next()["after"] is True
        os.close(write_end)
        os.write(peer.fds[57], b"x")
        assert os.read(read_end, 1) == b"x"
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_descriptors_that_a_peer_sends_are_not_kept(server: Daemon) -> None:
    """Nobody can fill the server's table of files: what arrives unasked is closed by the kernel."""
    read_end, write_end = os.pipe()
    with Peer(server.path) as peer:
        socket.send_fds(peer.socket, [encode({"id": 1, **BYE})], [write_end] * 50)
        assert peer.next()["ok"]
        os.close(write_end)
        assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_the_peer_is_known_by_pid_uid_gid_and_pidfd(server: Daemon, handler: Scripted) -> None:
    """The pidfd says when the process is gone, and is closed with the connection."""
    script = "import socket,sys;s=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1]);print(1,flush=True);sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", script, str(server.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"1\n"
    wait_until(server, lambda: handler.open)
    peer = handler.open[0].peer
    assert (peer.pid, peer.uid, peer.gid) == (child.pid, os.geteuid(), os.getegid())
    assert not has_ended(peer.pidfd)
    kept = os.dup(peer.pidfd)
    child.kill()
    assert select.select([kept], [], [], 10)[0]
    child.communicate(timeout=10)
    wait_until(server, lambda: handler.ended)
    wait_until(server, lambda: is_closed(peer.pidfd))
    os.close(kept)


def test_without_peer_pidfds_a_process_is_checked_by_its_start_and_user() -> None:
    """The way for old kernels: right for us, refused for an unseen pid, a dead pid and another user."""
    pidfd = pidfd_by_number(os.getpid(), os.geteuid())
    assert not has_ended(pidfd)
    os.close(pidfd)
    with pytest.raises(Invalid, match=r"another PID namespace.*hostPID"):
        pidfd_by_number(0, 0)
    child = subprocess.Popen(["true"])
    child.wait(10)
    for pid, uid in ((child.pid, os.geteuid()), (os.getpid(), os.geteuid() + 1)):
        with pytest.raises(Exception, match=f"process {pid}"):
            pidfd_by_number(pid, uid)


def test_a_socketpair_peer_is_this_process() -> None:
    """`peer_of` asks the kernel, not the peer."""
    here, there = socket.socketpair()
    with here, there:
        peer = peer_of(here)
        assert peer.pid == os.getpid()
        os.close(peer.pidfd)


def test_a_peer_that_the_handler_refuses_is_told_why(server: Daemon, handler: Scripted) -> None:
    """And is never said to have disconnected."""
    handler.answers["connected"] = Invalid("not you")
    with Peer(server.path, hello=False) as peer:
        assert peer.next() == {"id": 0, "ok": False, "error": "invalid", "message": "not you"}
        assert peer.next() == {}
    assert handler.ended == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_the_admin_socket_is_for_root_and_the_daemons_user(tmp_path: Path) -> None:
    """Another uid is refused even where the file's mode would let it in; there is no hello there."""
    folder = Path("/tmp") / f"tierd-test-{os.getpid()}"
    folder.mkdir(mode=0o755)
    handler = Scripted()
    handler.answers["status"] = {"fine": True}
    server = Daemon(folder / "a", handler, admin=True)
    try:
        with Peer(server.path, hello=False) as peer:
            assert peer.ask({"verb": "status"})["fine"] is True
            assert peer.ask(BYE)["error"] == "invalid"
        os.chmod(server.path, 0o777)
        script = "import socket,sys;s=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1]);print(s.recv(999))"
        output = subprocess.run(
            ["/usr/bin/env", "python3", "-c", script, str(server.path)], user=65534, capture_output=True, timeout=20
        )
        assert b"only root and uid 0 may use the admin socket, not uid 65534" in output.stdout
    finally:
        server.close()
        shutil.rmtree(folder)


def test_a_live_socket_is_not_taken_over_and_a_dead_one_is(tmp_path: Path) -> None:
    """The second server says what to do; after a crash the leftover is replaced; the mode is as asked."""
    path = tmp_path / "s"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    server = Daemon(path, Scripted())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(Invalid, match="another daemon listens"):
        listen(path, 0o600)
    with Peer(path) as peer:
        assert peer.ask(BYE)["ok"]
    server.close()
    assert not path.exists()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """A file in the way is not removed; neither a path that is too long nor a missing directory is a crash."""
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(Invalid, match="is no socket"):
        listen(path, 0o600)
    assert path.read_text() == "precious"
    for bad in (tmp_path / ("x" * 120), tmp_path / "missing" / "s"):
        with pytest.raises(Invalid, match="cannot be used"):
            listen(bad, 0o600)


def test_a_socket_that_was_replaced_is_not_unlinked(tmp_path: Path) -> None:
    """At its end a server removes its own socket only."""
    server = Daemon(tmp_path / "s", Scripted())
    os.unlink(server.path)
    successor = socket.socket(socket.AF_UNIX)
    successor.bind(str(server.path))
    server.close()
    assert server.path.exists()
    successor.close()


def test_a_socket_of_the_service_manager_is_not_made_or_removed_by_us(short_path: Path) -> None:
    """Who connected before is served, and after the end the path still leads to the manager's queue."""
    path = short_path / "s"

    async def story() -> None:
        with listen(path, 0o660) as managers, socket.socket(socket.AF_UNIX) as early:
            early.connect(str(path))
            server = Server(path, 0o660, Scripted(), LIMITS, inherited=managers.dup())
            await server.start()
            while not server.connections:
                await asyncio.sleep(0.001)
            server.leave_queue()
            with socket.socket(socket.AF_UNIX) as late:
                late.connect(str(path))
                await server.close()
                assert early.recv(1) == b""
                accepted, _ = managers.accept()  # by the next life
                accepted.close()

    asyncio.run(asyncio.wait_for(story(), 20))
    assert path.is_socket()


def test_a_socket_at_another_path_than_configured_is_refused(short_path: Path) -> None:
    """Both paths and the remedy are named."""
    says = rf"listens on {short_path}/s, server\.socket = {short_path}/t: make ListenStream="
    with listen(short_path / "s", 0o660) as managers, pytest.raises(Invalid, match=says):
        taken_over(managers, short_path / "t")

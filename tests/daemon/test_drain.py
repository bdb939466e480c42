"""`tierd drain`: everything is on NVMe and the daemon has ended, or it serves on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import CAN_CONTAIN, Daemon, hashes_of
from tierd.cli import FAILED, OK, UNREACHABLE

SLOW = ("tests.faults.slow", "6", "serve")
"""Seconds for each write: more than a busy machine needs to start a command."""


def test_what_was_stored_is_warm_after_a_drain_and_a_start(daemon: Daemon) -> None:
    """The command returns when the process is gone; the next life finds every block on NVMe."""
    hashes = hashes_of(1, 30)
    with daemon.peer() as peer:
        assert peer.store(hashes) == 30
    done = daemon.run("drain", "--json")
    assert (done.returncode, done.stderr) == (OK, "")
    assert daemon.process is not None and daemon.process.wait(5) == 0
    found = json.loads(done.stdout)
    assert found["pid"] == daemon.pid and found["blocks"] <= 30 and found["given_up"] == 0
    assert "stopped unwritten=0" in daemon.log
    daemon.start()
    with daemon.peer() as peer:
        assert peer.load(hashes) == 30
    assert daemon.run("drain").stdout.startswith("drained: 0 blocks written; pid ")


def test_a_disk_that_is_too_slow_leaves_the_daemon_serving(make: Start) -> None:
    """1 and the reason when not all can be written in time: nothing was stopped, and clients go on."""
    daemon = make(limits_drain_seconds_max=0.1)
    daemon.serve = SLOW
    daemon.start()
    with daemon.peer() as peer:
        assert peer.store(hashes_of(1, 30)) == 30
        done = daemon.run("drain", "--timeout", "0.3")
        assert done.returncode == FAILED
        assert "not everything was on NVMe after 0.3 s" in done.stderr
        assert daemon.process is not None and daemon.process.poll() is None
        assert peer.load(hashes_of(1, 30)) == 30


OLD_KERNEL = "import sys, tierd.wire.peer as p; p.SO_PEERPIDFD = 9999; from tierd.cli import main; sys.exit(main(sys.argv[1:]))"
"""`tierd` where a socket's other end cannot be had as a pidfd: before Linux 6.5."""


@pytest.mark.skipif(not CAN_CONTAIN, reason="no PID namespace can be made here")
@pytest.mark.parametrize(("command", "says"), [(["-m", "tierd"], ""), (["-c", OLD_KERNEL], "waiting for its socket to go")])
def test_from_a_container_the_daemon_outside_is_drained(daemon: Daemon, command: list[str], says: str) -> None:
    """The command sees no process with that number, or somebody else's: the kernel knows whose the socket is, and where an old
    one does not, that is said, and the socket's end is waited for.
    """
    contained = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, *command, "drain"]
    done = subprocess.run([*contained, "--runtime-dir", daemon.runtime], capture_output=True, text=True, timeout=60)
    assert done.returncode == OK, done.stderr
    assert says in done.stderr and bool(says) == bool(done.stderr)
    assert done.stdout.startswith(f"drained: 0 blocks written; pid {daemon.pid} has ended")
    assert daemon.process is not None and daemon.process.wait(20) == 0


def test_without_a_daemon_there_is_nothing_to_drain(make: Start) -> None:
    """3, as for every command."""
    assert make().run("drain").returncode == UNREACHABLE

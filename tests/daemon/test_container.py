"""An engine in a container, as far as a kernel knows one: namespaces of its own, and the sockets' directory in them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import CAN_CONTAIN, Daemon, readable

EXAMPLE = Path(__file__).parents[2] / "examples/first_hit.py"
NAMESPACES = ("--pid", "--fork", "--mount-proc", "--mount", "--ipc", "--net")
INSIDE = 'mount --bind "$1" /mnt && while read -r go; do "$2" "$3"; done'
FIRST_HIT = "found 64 of 64 blocks again, every byte right"
SECONDS_MAX = 60.0

pytestmark = pytest.mark.skipif(not CAN_CONTAIN, reason="no PID namespace can be made here")


class Container:
    """Processes that see the daemon's runtime directory as /mnt and nothing else of it: not its pid, network or /dev/shm."""

    def __init__(self, daemon: Daemon) -> None:
        command = ["unshare", *NAMESPACES, "sh", "-c", INSIDE, "sh", str(daemon.runtime), sys.executable, str(EXAMPLE)]
        environment = {**os.environ, "TIERD_SOCKET": "/mnt/tierd.sock"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def run_example(self) -> str:
        """What an engine says that stores a prompt and finds it again."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()
        said = b""
        while b"found" not in said or not said.endswith(b"\n"):
            assert readable(self.process.stdout.fileno(), SECONDS_MAX), said
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            assert more, said
            said += more
        return said.decode()


@pytest.fixture
def container(start: Start) -> Iterator[tuple[Daemon, Container]]:
    """A daemon outside, and a container."""
    daemon = start(cpu_bytes=64 << 20, cpu_segment_bytes=16 << 20, nvme_bytes=64 << 20, nvme_segment_bytes=16 << 20)
    made = Container(daemon)
    yield daemon, made
    assert made.process.stdin
    made.process.stdin.close()
    assert made.process.wait(SECONDS_MAX) == 0


def test_an_engine_in_a_container_needs_the_sockets_directory_and_nothing_else(container: tuple[Daemon, Container]) -> None:
    """Memory comes over the socket. It finds its blocks, also in the next life of the daemon, whose socket is a new file."""
    daemon, inside = container
    assert FIRST_HIT in inside.run_example()
    daemon.ask("sync")
    daemon.stop()
    daemon.start()
    assert FIRST_HIT in inside.run_example()
    assert daemon.status()["lookup_blocks"]["nvme"] == 64

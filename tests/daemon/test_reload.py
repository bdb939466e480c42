"""SIGHUP and `tierd reload` on a running daemon, without a service manager."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import Daemon, Wire, hashes_of, readable
from tierd.clock import monotonic_seconds
from tierd.config import KEYS

LIVE = {
    "server.domains",
    "nvme.scrub_bytes_per_second",
    "log.level",
    "log.format",
    "limits.sessions_per_namespace_max",
    "limits.drain_seconds_max",
    "limits.namespaces_max",
}


@pytest.fixture
def configured(make: Start, tmp_path: Path) -> Iterator[tuple[Daemon, Path]]:
    """A running daemon, and the file that it is configured by."""
    file = tmp_path / "tierd.toml"
    file.write_text("[limits]\nnamespaces_max = 1\n")
    daemon = make()
    daemon.flags += ["--config", str(file)]
    yield daemon.start(), file


def reload(daemon: Daemon, file: Path, text: str) -> tuple[int, str]:
    """`tierd reload` after a change: its exit code, and what it says."""
    file.write_text(text)
    done = daemon.run("reload", "--config", str(file))
    return done.returncode, done.stdout + done.stderr


def test_a_limit_that_was_raised_holds_at_once(configured: tuple[Daemon, Path]) -> None:
    """Two namespaces where there was room for one, with the first client still attached."""
    daemon, file = configured
    with daemon.peer() as first:
        first.store(hashes_of(1, 2))
        assert reload(daemon, file, "[limits]\nnamespaces_max = 2\n") == (0, "changed: limits.namespaces_max\n")
        with daemon.peer(model="second") as second:
            assert second.store(hashes_of(2, 2)) == 2
        assert first.load(hashes_of(1, 2)) == 2


def test_what_needs_a_restart_is_named_and_does_not_change(configured: tuple[Daemon, Path]) -> None:
    """The rest of the same file is applied; asked again, there is still the same to wait for."""
    daemon, file = configured
    text = '[policy]\npromotion_window_share = 0.5\n[log]\nlevel = "debug"\n[limits]\nnamespaces_max = 1\n'
    restart = "after a restart only: policy.promotion_window_share\n"
    assert reload(daemon, file, text) == (0, f"changed: log.level\n{restart}")
    assert reload(daemon, file, text) == (0, f"changed: nothing\n{restart}")


@pytest.mark.parametrize("text", ["[limits]\nnamespaces_max = 0\n", "[log]\nlevel = 'info'\n[limits]\nnamespaces = 2\n", "[["])
def test_a_mistake_changes_nothing(text: str, configured: tuple[Daemon, Path]) -> None:
    """`tierd reload` ends with 2 and says what is wrong; SIGHUP logs it; good keys beside the bad one are not applied."""
    daemon, file = configured
    code, said = reload(daemon, file, text)
    assert code == 2 and said.startswith(f"tierd reload: {file}: ")
    os.kill(daemon.pid, signal.SIGHUP)
    deadline = monotonic_seconds() + 20
    while "reload: configuration not reloaded" not in daemon.log:
        assert monotonic_seconds() < deadline, daemon.log
        daemon.status()
    assert reload(daemon, file, "[limits]\nnamespaces_max = 1\n") == (0, "changed: nothing\n")


def test_the_live_keys_are_those_of_the_document() -> None:
    """docs/operations.md names every key that a reload changes, and no other."""
    live = {dotted for dotted, item in KEYS.items() if item["live"]}
    text = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("Live: "))
    assert live == LIVE == set(line.removeprefix("Live: ").rstrip(".").replace("`", "").split(", "))


def test_a_manager_that_hangs_costs_who_says_hello_a_second_and_others_nothing(make: Start, short_path: Path) -> None:
    """Nobody reads the manager's socket and it is full: while a session waits to be kept, another one's requests go on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short_path / "n"))
        daemon = make(environ={"NOTIFY_SOCKET": str(short_path / "n")}).start()
        with daemon.peer() as first:
            first.store(hashes_of(1, 4))
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as noise:
                noise.connect(str(short_path / "n"))
                full = False
                while not full:
                    try:
                        noise.send(b"x")
                    except BlockingIOError:
                        full = True
            second = Wire(daemon.socket)
            hello = Thread(target=second.hello)
            began = monotonic_seconds()
            hello.start()
            lookups = 0
            while not readable(second.socket.fileno(), 0) and hello.is_alive():
                before = monotonic_seconds()
                assert first.load(hashes_of(1, 4)) == 4
                lookups += monotonic_seconds() - before < 0.5
            hello.join(20)
            waited = monotonic_seconds() - began
            second.end()
    assert 0.9 < waited < 10 and lookups > 20
    assert "the service manager does not keep a session" in daemon.log

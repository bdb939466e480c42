"""The service manager's protocol, against a real datagram socket."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tierd import systemd
from tierd.clock import monotonic_seconds
from tierd.errors import Invalid


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A notification socket, named in the environment as a manager does it."""
    name = f"tierd-test-{os.getpid()}-{os.urandom(4).hex()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.settimeout(5)
    if request.param == "path":
        listener.bind(str(tmp_path / "n"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
    else:
        listener.bind("\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
    with listener:
        yield listener


def received(manager: socket.socket) -> tuple[str, int]:
    """One message and how many descriptors came with it."""
    message, descriptors, _, _ = socket.recv_fds(manager, 4096, 300)
    for descriptor in descriptors:
        os.close(descriptor)
    return message.decode(), len(descriptors)


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message is refused quietly."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not any([systemd.ready(), systemd.store("a", [0]), systemd.remove("a"), systemd.can_store()])


def test_a_manager_that_went_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that is not there any more answers like none."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/socket")
    assert systemd.ready() is False


def test_states_arrive_as_lines(manager: socket.socket) -> None:
    """Ready, stopping and a status that stays on its line."""
    assert systemd.ready() and systemd.stopping(1.5) and systemd.status("two\nlines")
    assert [received(manager)[0] for _ in range(3)] == [
        "READY=1",
        "STOPPING=1\nEXTEND_TIMEOUT_USEC=1500000",
        "STATUS=two lines",
    ]


def test_a_reload_comes_with_its_time(manager: socket.socket) -> None:
    """systemd from 253 on waits for ever without it, in microseconds of the monotonic clock."""
    before = int(monotonic_seconds() * 1e6)
    assert systemd.reloading()
    first, second = received(manager)[0].splitlines()
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= monotonic_seconds() * 1e6


def test_descriptors_travel_with_their_name(manager: socket.socket) -> None:
    """Stored without polling, removed by name."""
    assert systemd.store("cpu-1", [0, 1]) and systemd.remove("cpu-1")
    assert received(manager) == ("FDSTORE=1\nFDNAME=cpu-1\nFDPOLL=0", 2)
    assert received(manager) == ("FDSTOREREMOVE=1\nFDNAME=cpu-1", 0)


def test_more_descriptors_than_a_message_holds_take_several(manager: socket.socket) -> None:
    """The kernel's limit of 253 is nobody's problem."""
    assert systemd.store("many", [0] * 300)
    assert [received(manager)[1] for _ in range(2)] == [253, 47]


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "x" * 256, "ä"])
def test_a_name_that_would_break_the_protocol_is_refused(name: str) -> None:
    """Colons separate names, newlines messages."""
    with pytest.raises(Invalid, match="without a colon"):
        systemd.store(name, [0])


@pytest.mark.parametrize(("limit", "expected"), [(None, True), ("12", True), ("0", False), ("x", False)])
def test_the_manager_may_say_that_it_stores_nothing(limit: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FDSTORE is how many it keeps; absent in older systemd."""
    monkeypatch.setenv("NOTIFY_SOCKET", "@x")
    monkeypatch.setenv("FDSTORE", limit) if limit else monkeypatch.delenv("FDSTORE", raising=False)
    assert systemd.can_store() is expected


def test_a_full_manager_does_not_stall_us(manager: socket.socket) -> None:
    """When nobody reads, sending gives up within its second."""
    sent = [systemd.status("x") for _ in range(1)]
    while sent[-1]:
        sent.append(systemd.status("x"))
        assert len(sent) < 10_000
    assert received(manager)[0] == "STATUS=x"


INHERIT = """
import json, os, sys
if sys.argv[1] == "ours":
    os.environ["LISTEN_PID"] = str(os.getpid())
from tierd import systemd
first, again = systemd.inherited(), systemd.inherited()
kept = [name for name in os.environ if name.startswith("LISTEN_")]
print(json.dumps([first, again, kept, [os.get_inheritable(d) for ds in first.values() for d in ds]]))
"""


@pytest.mark.parametrize(
    ("whose", "expected"),
    [("ours", '[{"a": [3, 5], "b": [4]}, {}, [], [false, false, false]]'), ("others", "[{}, {}, [], []]")],
)
def test_inherited_descriptors_are_taken_once_and_only_if_they_are_ours(whose: str, expected: str) -> None:
    """By name and in order, closed on exec, with nothing left in the environment for children."""
    descriptors = array.array("i", [os.open(os.devnull, os.O_RDONLY) for _ in range(3)])
    script = f"exec {sys.executable} -c '{INHERIT}' {whose} 3<&{descriptors[0]} 4<&{descriptors[1]} 5<&{descriptors[2]}"
    environment = os.environ | {"LISTEN_PID": "1", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b:a"}
    done = subprocess.run(
        ["bash", "-c", script],
        env=environment,
        pass_fds=descriptors,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    for descriptor in descriptors:
        os.close(descriptor)
    assert done.stdout.strip() == expected

"""The command line: what it prints, its exit codes, and that it starts quickly."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from threading import Thread
from typing import Any

import pytest

from tierd import __version__
from tierd.cli import COMMANDS, FAILED, UNREACHABLE, USAGE, main
from tierd.wire.framing import decode, encode

Answer = Callable[[dict[str, Any]], bytes]


@pytest.fixture
def admin(short_path: Path) -> Iterator[Callable[[Answer], Path]]:
    """Starts an admin socket in a runtime directory: every request gets the bytes that `answer` makes of it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(short_path / "admin.sock"))
    listener.listen()

    def serve(answer: Answer) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                length = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little")
                connection.sendall(answer(decode(connection.recv(length, socket.MSG_WAITALL))))

    def start(answer: Answer) -> Path:
        Thread(target=serve, args=(answer,), daemon=True).start()
        return short_path

    yield start
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def tierd(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """One run of the command in a process of its own."""
    command = [sys.executable, "-m", "tierd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, **environ})


def children_seconds() -> float:
    """CPU time of all processes that were run and have ended."""
    spent = getrusage(RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_version_starts_quickly_and_loads_nothing_heavy() -> None:
    """Under 150 ms of CPU time at best of five: neither numpy nor uvloop nor asyncio is imported for it."""
    fastest = float("inf")
    for _ in range(5):
        before = children_seconds()
        assert tierd("version").stdout == f"tierd {__version__}\n"
        fastest = min(fastest, children_seconds() - before)
    assert fastest < 0.15
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys; from tierd.cli import main; main(['version']); print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=30,
    ).stdout.split()
    assert not {"numpy", "uvloop", "asyncio", "torch", "tomllib"} & set(loaded)


def test_help_names_every_command() -> None:
    """`tierd --help` is enough to find the way."""
    assert all(f"  {name} " in tierd("--help").stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [[], ["frobnicate"], ["status", "--frob"], ["serve", "--set", "cpu.bytes"], ["sync", "--timeout", "-1"]],
)
def test_a_wrong_command_line_ends_with_two(arguments: list[str]) -> None:
    """Usage errors have their own exit code and say something on stderr."""
    done = tierd(*arguments)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr.startswith(("usage: tierd", "tierd serve: "))


def test_a_wrong_configuration_ends_with_two_before_anything_is_made(tmp_path: Path) -> None:
    """`tierd serve` with an impossible value says source, key, value and remedy, and leaves no directory behind."""
    done = tierd("serve", "--runtime-dir", f"{tmp_path}/r", TIERD_CPU_BYTES="lots")
    says = "environment variable TIERD_CPU_BYTES: cpu.bytes = 'lots' must be a number of bytes"
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr.startswith(f"tierd serve: {says}")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", ["status", "sync", "reload", "record trace.jsonl"])
def test_without_a_daemon_commands_end_with_three(command: str, short_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the socket and how to start a daemon."""
    assert main([*command.split(), "--runtime-dir", str(short_path)]) == UNREACHABLE
    assert f"no daemon at {short_path}/admin.sock" in capsys.readouterr().err


STATUS = {
    "version": "1",
    "pid": 12,
    "uptime_seconds": 93_784.5,
    "socket": "/run/tierd/tierd.sock",
    "metrics": "",
    "io": {"engine": "posix", "path": "direct", "gpu": "none"},
    "tiers": {"cpu": {"used_bytes": 3 << 29, "limit_bytes": 3 << 30, "slots": {"free": 7, "ready": 1234}}},
    "lookup_blocks": {"cpu": 750, "nvme": 0, "miss": 250},
    "evicted_blocks": {"cpu.clean": 1000, "cpu.drop": 0},
    "prefetched_blocks": {"useful": 1500, "late": 20, "wasted": 0},
    "checksum_failures": 0,
    "written": {"blocks": 100, "given_up": 2},
    "unwritten_runs": 3,
    "recording": {"requests": 12, "left": 0, "missed": 0},
    "namespaces": [],
    "incarnation": b"\x0f",
}
PAGE = """\
tierd 1, pid 12, up 1 d 2 h, nvme by posix, direct
socket   /run/tierd/tierd.sock
metrics  off

tier     used    limit       free  ready
cpu   1.5 GiB  3.0 GiB  50%     7  1,234

lookups  1,000 blocks asked: cpu 75.0%, miss 25.0%
evicted  1,000 from cpu (clean)
ahead    1,500 useful, 20 late, 0 wasted of the blocks that were prefetched
waiting  3 runs to be written to nvme
damaged  0 blocks whose checksum was wrong
record   12 requests since somebody began to record them

no namespace was opened yet
"""


def test_status_prints_for_people_and_for_programs(admin: Callable[[Answer], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The same answer as a page with units, and as JSON with every value as it is."""
    runtime = admin(lambda request: encode({"id": request["id"], "ok": True, **STATUS}))
    assert main(["status", "--runtime-dir", str(runtime)]) == 0
    assert capsys.readouterr().out == PAGE
    assert main(["status", "--json", "--runtime-dir", str(runtime)]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS | {"incarnation": "0f"}


def test_sync_asks_again_while_the_daemon_is_busy(admin: Callable[[Answer], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon's own limit on waiting is shorter than the user's patience: `busy` is asked again, with a deadline.
    What is said is what was written over all requests.
    """
    requests = []

    def answer(request: dict[str, Any]) -> bytes:
        requests.append(request)
        if request["verb"] == "status":
            return encode({"id": request["id"], "ok": True, **STATUS})
        if len(requests) < 4:
            return encode({"id": request["id"], "ok": False, "error": "busy", "message": "not yet"})
        return encode({"id": request["id"], "ok": True, "blocks": 105, "given_up": 4})

    assert main(["sync", "--timeout", "20", "--runtime-dir", str(admin(answer))]) == 0
    assert capsys.readouterr().out == "synced: 5 blocks written meanwhile, 2 given up: no room, or the disk failed\n"
    assert [request["verb"] for request in requests] == ["status"] + ["sync"] * 3
    assert all(0 < request["deadline_ms"] <= 20_000 for request in requests[1:])


def test_sync_gives_up_with_one_when_time_is_over(admin: Callable[[Answer], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A daemon that stays busy makes the command fail, not hang."""
    no = {"ok": False, "error": "busy", "message": "9 blocks left"}
    replies = {"status": {"ok": True, **STATUS}, "sync": no}
    busy = admin(lambda request: encode({"id": request["id"], **replies[request["verb"]]}))
    assert main(["sync", "--timeout", "0.1", "--runtime-dir", str(busy)]) == FAILED
    assert "not everything was on NVMe after 0.1 s: 9 blocks left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "closed the connection"),
        (b"\xff\xff\xff\xff", "a frame of 4294967295 bytes"),
        (b"\x03\x00\x00\x00\xc1\xc1\xc1", "not"),
    ],
)
def test_garbage_from_the_socket_is_an_error_and_no_traceback(
    admin: Callable[[Answer], Path], capsys: pytest.CaptureFixture[str], answer: bytes, says: str
) -> None:
    """Whatever listens there instead of tierd, the command ends with a message."""
    assert main(["status", "--runtime-dir", str(admin(lambda request: answer))]) in (USAGE, UNREACHABLE)
    assert says in capsys.readouterr().err


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    """`tierd version | true` is quiet."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tierd", "version"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=30)
    os.close(writer)
    assert (done.returncode, done.stderr) == (FAILED, "")

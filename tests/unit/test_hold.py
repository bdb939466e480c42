"""`tierd hold`: real holders, real commands, real kills."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tierd.cli.hold import Store

HOLD = [sys.executable, "-m", "tierd", "hold"]
PROLOGUE = """
import os, signal, sys
from pathlib import Path
from tierd import systemd
log = Path(sys.argv[1])
life = len(log.read_text().splitlines()) if log.exists() else 0
kept = systemd.inherited()
def note(*words):
    with log.open("a") as file: print(*words, file=file, flush=True)
def memfd(content):
    descriptor = os.memfd_create("m")
    os.write(descriptor, content)
    return descriptor
def contents(name):
    return [os.pread(descriptor, 100, 0).decode() for descriptor in kept.get(name, [])]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def command(tmp_path: Path, body: str, options: Sequence[str] = ()) -> list[str]:
    """A holder's command line for a Python body; `log` has one line per life in the tests."""
    return [*HOLD, *options, "--", sys.executable, "-c", PROLOGUE + body, str(tmp_path / "log")]


def hold(tmp_path: Path, body: str, *options: str) -> tuple[int, list[str], str]:
    """Run a holder to its end; returns its exit code, the log's lines and what it said."""
    done = subprocess.run(command(tmp_path, body, options), capture_output=True, text=True, timeout=60, check=False)
    log = tmp_path / "log"
    return done.returncode, log.read_text().splitlines() if log.exists() else [], done.stderr


def start(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """Start a holder, whose command says when it is there."""
    process = subprocess.Popen(command(tmp_path, body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("there")
    return process


def test_memory_survives_a_kill_minus_9(tmp_path: Path) -> None:
    """What a command stored just before it was killed is there for the next one, by name and in order."""
    body = """
if life == 0:
    systemd.store("cpu", [memfd(b"directory"), memfd(b"slots")])
    systemd.store("other", [memfd(b"third")])
    note("first")
    die()
note(contents("cpu"), contents("other"), sorted(kept))
"""
    code, log, said = hold(tmp_path, body)
    assert (code, log) == (0, ["first", "['directory', 'slots'] ['third'] ['cpu', 'other']"])
    assert "was ended by SIGKILL; restarting it with 3 descriptors" in said


def test_memory_survives_many_lives_and_grows_no_copies(tmp_path: Path) -> None:
    """A life that stores again what it was given changes nothing; what it removes is gone in the next."""
    body = """
note(life, contents("a"), contents("b"))
if life == 0:
    systemd.store("a", [memfd(b"one"), memfd(b"two")])
    systemd.store("b", [memfd(b"three")])
elif life < 3:
    systemd.store("a", kept["a"])
elif life == 3:
    systemd.remove("b")
systemd.ready()
if life < 4: die()
"""
    code, log, _ = hold(tmp_path, body)
    assert code == 0 and log == [
        "0 [] []",
        *(f"{life} ['one', 'two'] ['three']" for life in (1, 2, 3)),
        "4 ['one', 'two'] []",
    ]


def test_a_command_gets_the_kept_descriptors_and_no_others(tmp_path: Path) -> None:
    """The holder's own sockets do not leak into it."""
    body = """
if life == 0:
    systemd.store("a", [memfd(b"x")])
    note("first")
    die()
listing = os.open("/proc/self/fd", os.O_RDONLY)
open_ones = [int(name) for name in os.listdir(listing) if os.path.exists(f"/proc/self/fd/{name}")]
note(sorted(set(open_ones) - {listing}), os.environ["FDSTORE"])
"""
    code, log, _ = hold(tmp_path, body, "--descriptors-max", "5")
    assert (code, log[1]) == (0, "[0, 1, 2, 3] 5")


def test_descriptors_over_the_limit_are_refused_aloud(tmp_path: Path) -> None:
    """The first ones stay, and the holder says how many did not."""
    body = """
if life == 0:
    systemd.store("a", [memfd(b"%d" % i) for i in range(5)])
    note("first")
    die()
note(contents("a"))
"""
    _, log, said = hold(tmp_path, body, "--descriptors-max", "3")
    assert log[1] == "['0', '1', '2']" and "no room for 2 descriptors 'a': the limit is 3" in said


def test_a_command_is_started_again_however_many_names_are_kept(tmp_path: Path) -> None:
    """What it could not be told the names of is refused when it comes: kept, it would keep the command from starting."""
    body = """
if life == 0:
    note("first")
    for number in range(3000):
        systemd.store(f"segment-{number:060}", [0])
    die()
note(len(kept))
"""
    code, log, said = hold(tmp_path, body)
    assert code == 0 and 1500 < int(log[1]) < 3000 and "bytes of their names" in said


@pytest.mark.parametrize(("body", "expected"), [("note(1)", 0), ("note(1); sys.exit(3)", 3)])
def test_an_exit_before_it_was_ever_ready_is_final(tmp_path: Path, body: str, expected: int) -> None:
    """A command that does its job, or is configured wrongly, is not started again; its exit code is the holder's."""
    code, log, _ = hold(tmp_path, body)
    assert (code, log) == (expected, ["1"])


def test_a_failure_after_it_was_ready_is_not_final(tmp_path: Path) -> None:
    """An exit code other than 0 is a crash like any other."""
    code, log, _ = hold(tmp_path, "note(life); systemd.ready(); sys.exit(0 if life else 4)")
    assert (code, log) == (0, ["0", "1"])


def test_restarts_are_limited(tmp_path: Path) -> None:
    """A command that always dies is given up, with the shell's code for its signal."""
    code, log, said = hold(tmp_path, "note(life); systemd.ready(); die()", "--restarts-max", "2")
    assert (code, log) == (128 + signal.SIGKILL, ["0", "1", "2"]) and "restarted 2 times in a minute" in said


def test_a_command_that_is_not_there_is_an_exit_code(tmp_path: Path) -> None:
    """127, as a shell has it, and the reason."""
    done = subprocess.run([*HOLD, "--", "/no/such/command"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 127 and "/no/such/command cannot be executed" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_forwarded_and_final(tmp_path: Path, number: signal.Signals) -> None:
    """The command ends in its own time with its own code, and is not started again, whatever that code is."""
    body = """
signal.signal(signal.SIGTERM, lambda *_: (note("told"), sys.exit(7)))
signal.signal(signal.SIGINT, lambda *_: (note("told"), sys.exit(7)))
systemd.ready()
print("there", flush=True)
signal.pause()
"""
    process = start(tmp_path, body)
    process.send_signal(number)
    assert process.wait(20) == 7 and (tmp_path / "log").read_text() == "told\n"


def test_a_reload_is_forwarded_and_not_a_stop(tmp_path: Path) -> None:
    """SIGHUP reaches the command; the kill after it is still a reason to restart."""
    body = """
systemd.ready()
if life:
    note("second")
    sys.exit(0)
signal.signal(signal.SIGHUP, lambda *_: (note("reloaded"), die()))
print("there", flush=True)
signal.pause()
"""
    process = start(tmp_path, body)
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 0 and (tmp_path / "log").read_text() == "reloaded\nsecond\n"


def test_a_dead_holder_takes_its_command_along(tmp_path: Path) -> None:
    """kill -9 of the holder ends the command with SIGTERM: nobody is left behind without a keeper."""
    body = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("there", os.getpid(), flush=True)
signal.pause()
"""
    process = subprocess.Popen(command(tmp_path, body), stdout=subprocess.PIPE, text=True)
    orphan = os.pidfd_open(int(process.stdout.readline().split()[1]))
    process.kill()
    process.wait(20)
    assert select.select([orphan], [], [], 20)[0], "the command went on without its holder"
    os.close(orphan)


def test_what_is_not_for_the_holder_goes_to_the_outer_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """READY and STATUS reach the manager that started the holder; descriptors stay with the holder."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outer:
        outer.settimeout(10)
        outer.bind(str(tmp_path / "o"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "o"))
        hold(tmp_path, 'systemd.store("a", [0]); systemd.notify("READY=1\\nSTATUS=up\\nMAINPID=1"); systemd.stopping(1)')
        assert [outer.recv(100) for _ in range(2)] == [b"READY=1\nSTATUS=up", b"STOPPING=1\nEXTEND_TIMEOUT_USEC=1000000"]


def test_a_store_keeps_order_and_closes_what_it_gives_up() -> None:
    """Names keep their descriptors in order; a removed name's are closed, a known file's second one too."""
    store = Store(descriptors_max=4)
    files = [os.memfd_create("m") for _ in range(3)]
    again = os.dup(files[0])
    assert store.add("a", files) == 0 and store.add("a", [again]) == 0 and len(store) == 3
    pidfds = [os.pidfd_open(os.getpid()), os.pidfd_open(os.getppid())]
    assert store.add("b", pidfds) == 1
    assert [name for name, _ in store] == ["a", "a", "a", "b"] and [fd for _, fd in store][:3] == files
    store.remove("a")
    store.remove("b")
    for descriptor in (*files, again, *pidfds):
        with pytest.raises(OSError):
            os.fstat(descriptor)

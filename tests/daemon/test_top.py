"""`tierd top` in a real pseudo-terminal: what is on the screen, and how it is left."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from copy import deepcopy
from io import StringIO

import pytest
from rich.console import Console

from tests.daemon.conftest import Start
from tests.daemon.harness import Daemon, hashes_of, readable
from tierd.cli import OK, UNREACHABLE, USAGE
from tierd.cli.screen import screen
from tierd.cli.top import look
from tierd.clock import monotonic_seconds

SIZES = ((24, 80), (45, 140))
"""Lines and columns: the smallest terminal that anybody has, and a large one."""
SECONDS_MAX = 20.0
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
HOME = "\x1b[H"
LEAVES_SCREEN = "\x1b[?1049l"


class Terminal:
    """A pseudo-terminal with `tierd top` in it."""

    def __init__(self, daemon: Daemon, lines: int, columns: int) -> None:
        self._ours, self._theirs = os.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
        self.before = termios.tcgetattr(self._theirs)
        command = [sys.executable, "-m", "tierd", "top", "--interval", "0.2", "--runtime-dir", str(daemon.runtime)]
        files = {"stdin": self._theirs, "stdout": self._theirs, "stderr": self._theirs}
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        environment["TERM"] = "xterm-256color"
        self.process = subprocess.Popen(command, env=environment, **files)  # type: ignore[call-overload]
        self._received = b""

    @property
    def output(self) -> str:
        """All that was drawn so far; a character may be on its way still."""
        return self._received.decode(errors="ignore")

    @property
    def frame(self) -> str:
        """What was drawn last, without colours."""
        return ESCAPES.sub("", self.output.rpartition(HOME)[2])

    def read_until(self, so: Callable[[str], object]) -> str:
        """Read on until the frame is as it should be."""
        deadline = monotonic_seconds() + SECONDS_MAX
        while not so(self.frame):
            assert monotonic_seconds() < deadline, f"it is still not so:\n{self.frame}"
            if readable(self._ours, 0.1):
                self._received += os.read(self._ours, 1 << 16)
        return self.frame

    def press(self, key: str) -> None:
        """Type."""
        os.write(self._ours, key.encode())

    def modes(self) -> list[object]:
        """How the terminal treats lines and keys."""
        return termios.tcgetattr(self._theirs)

    def end(self) -> None:
        """Make sure that nothing is left."""
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@pytest.fixture(params=SIZES, ids=["80x24", "140x45"])
def terminal(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    """A terminal that watches a small daemon."""
    terminal = Terminal(daemon, *request.param)
    yield terminal
    terminal.end()


def test_the_screen_follows_the_daemon_and_is_left_as_it_was(daemon: Daemon, terminal: Terminal) -> None:
    """Tiers, hits, transfers, clients and namespaces, as they become; then `q`."""
    terminal.read_until(lambda frame: "none yet" in frame and "since start 0" in frame)
    with daemon.peer(client="engine-7") as peer:
        assert peer.store(hashes_of(1, 30)) == 30
        daemon.ask("sync")
        peer.load(hashes_of(1, 30))
        peer.lookup(hashes_of(2, 10))
        is_whole = re.compile("since start 40.*write_back +cpu.*engine-7", re.DOTALL)
        frame = terminal.read_until(is_whole.search)
        assert re.search(r"cpu +\S+ +\d+\.\d KiB +1\.0 MiB +30 ", frame), frame
        assert re.search(r"nvme .*4\.0 MiB +30 ", frame), frame
        assert re.search(r"since start 40 +\S+ +75\.0% +cpu 75\.0%  miss 25\.0%", frame), frame
        assert re.search(r"[0-9a-f]{16} +model +\d+ +\S+ +30 +engine-7 \(\d+\)", frame), frame
        # What is asked now is not what was asked once.
        terminal.read_until(lambda frame: re.search(r"now 0 ", frame))
    terminal.read_until(lambda frame: re.search(r"[0-9a-f]{16} +model .* 30 +- *$", frame, flags=re.MULTILINE))
    assert terminal.modes() != terminal.before
    terminal.press("xq")
    terminal.read_until(lambda _: LEAVES_SCREEN in terminal.output)
    assert terminal.process.wait(SECONDS_MAX) == OK
    assert terminal.modes() == terminal.before


@pytest.mark.parametrize("kinds", [{}, {"pending": 5, "gpu": 123_456_789}])
def test_numbers_and_headings_are_whole_in_80_columns(daemon: Daemon, kinds: dict[str, int]) -> None:
    """A large machine, whose names are long, in the smallest terminal: names give way, and all is on 24 lines."""
    with daemon.peer(model="organisation/model-of-the-largest-size-instruct", client="vllm-scheduler"):
        small = look(daemon.admin)
    large = deepcopy(small)
    large["uptime_seconds"] += 1.0
    large["lookup_blocks"] |= {"cpu": 456_789_012, "nvme": 345_678_901, "miss": 234_567_890, **kinds}
    for tier in large["tiers"].values():
        tier["slots"] |= {"ready": 1_234_567, "free": 2_345_678, "filling": 12_345}
        tier["limit_bytes"], tier["used_bytes"] = 999 << 40, 998 << 40
    large["transfers"] = [
        {"reason": reason, "source": source, "target": target, "bytes": 123 << 40}
        for reason, source, target in (("demand", "nvme", "cpu"), ("prefetch", "nvme", "cpu"), ("write_back", "cpu", "nvme"))
    ]
    large["namespaces"][0]["blocks"] = 3_456_789
    console = Console(width=SIZES[0][1], file=StringIO())
    console.print(screen(large, small))
    shown = console.file.getvalue()
    assert len(shown.splitlines()) <= SIZES[0][0], shown
    for whole in (
        *(
            "tier",
            "used",
            "limit",
            "ready",
            "free",
            "filling",
            "evict/s",
            "drop/s",
            "blocks asked",
            "found",
            "where",
            "transfers",
        ),
        *("bytes/s", "since start", "namespace", "model", "asked now", "blocks", "clients", "998.0 TiB", "999.0 TiB"),
        *("1,234,567", "2,345,678", "12,345", "123.0 TiB", "3,456,789", f"{sum(large['lookup_blocks'].values()):,}"),
    ):
        assert re.search(rf"(?<![\w,.]){re.escape(whole)}(?![\w,.…])", shown), f"{whole}:\n{shown}"


def test_a_daemon_that_goes_away_is_waited_for(daemon: Daemon, terminal: Terminal) -> None:
    """Its place on the screen says so; the next one is shown as soon as it is there."""
    terminal.read_until(lambda frame: f"pid {daemon.pid}" in frame)
    daemon.stop()
    terminal.read_until(lambda frame: "waiting for it; q ends" in frame)
    daemon.start()
    terminal.read_until(lambda frame: f"pid {daemon.pid}" in frame)


def test_once_is_for_a_file(daemon: Daemon) -> None:
    """One look, without colours or a terminal; without --once it says that it needs one."""
    done = daemon.run("top", "--once", "--interval", "0.1")
    assert done.returncode == OK and "\x1b" not in done.stdout
    assert done.stdout.startswith("tierd ") and "blocks asked" in done.stdout
    refused = daemon.run("top")
    assert refused.returncode == USAGE and "needs a terminal: use --once" in refused.stderr


def test_without_a_daemon_it_does_not_begin(make: Start) -> None:
    """As every command: 3."""
    assert make().run("top", "--once").returncode == UNREACHABLE


def test_names_that_clients_choose_do_nothing_to_the_terminal(daemon: Daemon) -> None:
    """Neither markup nor escape sequences: whoever may use the socket may not write to the operator's screen."""
    with daemon.peer(model="[/x] \x1b]0;owned\x07 [bold]m", client="[red]e\n\x1b[2J"):
        for command in (["top", "--once", "--interval", "0.1"], ["status"]):
            done = daemon.run(*command)
            assert done.returncode == OK, done.stderr
            assert not {"\x1b", "\x07"} & set(done.stdout)
        assert r"[/x] \x1b]0;owned\x07 [bold]m" in done.stdout

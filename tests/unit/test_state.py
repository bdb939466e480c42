"""The state directory and its lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tierd.errors import Busy, Invalid
from tierd.layout import Layout, Namespace
from tierd.tiers.io.posix import PosixEngine
from tierd.tiers.nvme import FileSegment, slots_path
from tierd.tiers.state import StateDirectory

NAMESPACE = Namespace("uid:1000", "model", Layout(2, 1, 8, "float16", block_tokens=4))
IO = PosixEngine()

HOLD_THE_LOCK = """
import sys
from pathlib import Path
from tierd.tiers.state import StateDirectory
state = StateDirectory(*map(Path, sys.argv[1:]))
print("locked", flush=True)
sys.stdin.read()
"""


def make_segment(state: StateDirectory) -> FileSegment:
    """A new segment file where it belongs."""
    return FileSegment.create(state.folder(NAMESPACE), NAMESPACE, 1 << 16, 1, IO)


def test_a_second_daemon_is_refused_by_name_until_the_first_is_dead(tmp_path: Path) -> None:
    """The message names the pid and the remedy; a kill -9 of the owner is enough to let the next one in."""
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(tmp_path / "state")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(Busy, match=rf"pid {owner.pid}: stop that one, or"):
            StateDirectory(tmp_path / "state")
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
        StateDirectory(tmp_path / "state").close()


def test_segments_elsewhere_are_locked_too(tmp_path: Path) -> None:
    """Two daemons with state directories of their own cannot share one nvme path."""
    first = StateDirectory(tmp_path / "a", tmp_path / "disk")
    with pytest.raises(Busy, match=f"disk is used by the tierd with pid {os.getpid()}"):
        StateDirectory(tmp_path / "b", tmp_path / "disk")
    first.close()
    StateDirectory(tmp_path / "b", tmp_path / "disk").close()


def test_a_place_that_cannot_be_used_is_invalid(tmp_path: Path) -> None:
    """A file where the directory should be is refused with the reason."""
    (tmp_path / "file").touch()
    with pytest.raises(Invalid, match="cannot be used"):
        StateDirectory(tmp_path / "file")


def test_whole_segments_are_opened_and_everything_else_is_removed(tmp_path: Path) -> None:
    """Unfinished, damaged, foreign and misplaced files go, each with its reason; strangers' files stay."""
    state = StateDirectory(tmp_path)
    good, cut, misplaced = (make_segment(state) for _ in range(3))
    for segment in (good, cut, misplaced):
        segment.close()
    os.truncate(cut.path, 5000)
    elsewhere = tmp_path / "nvme" / "0123456789abcdef"
    elsewhere.mkdir()
    moved = elsewhere / misplaced.path.name
    for path, target in ((misplaced.path, moved), (slots_path(misplaced.path), slots_path(moved))):
        path.rename(target)
    unfinished = state.folder(NAMESPACE) / "ab.new"
    unfinished.write_bytes(b"x")
    strange = state.folder(NAMESPACE) / "README"
    strange.touch()
    opened = state.open_segments(IO)
    assert [segment.path for segment in opened.segments] == [good.path]
    reasons = dict(opened.removed)
    assert reasons.keys() == {unfinished, cut.path, moved, slots_path(cut.path), slots_path(moved)}
    assert reasons[unfinished] == "unfinished" and "5000 bytes" in reasons[cut.path] and "folder" in reasons[moved]
    assert not any(path.exists() for path in reasons) and strange.exists()
    assert StateDirectory.open_segments(state, IO).removed == []


def test_directories_are_private(tmp_path: Path) -> None:
    """Only the daemon's own user can look into its state."""
    state = StateDirectory(tmp_path / "state")
    segment = make_segment(state)
    for folder in (state.path, state.nvme_path, segment.path.parent):
        assert folder.stat().st_mode & 0o777 == 0o700

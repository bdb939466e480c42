"""Logs: one line an event, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tierd import log


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leaves logging as it was."""
    root = logging.getLogger("tierd")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before


def written(format: str, level: str = "info") -> io.StringIO:
    """Logging configured to a buffer."""
    stream = io.StringIO()
    log.configure(level, format, stream)
    return stream


def test_text_is_key_value_and_cannot_be_broken_by_its_values() -> None:
    """Plain values stand as they are; spaces, quotes and line ends are escaped; bytes are hex."""
    stream = written("text")
    log.get_logger("server").info("listening", socket=Path("/run/t.sock"), why='a "b"\nc', id=b"\x01\xff", share=0.25)
    time, rest = stream.getvalue().split(" ", 1)
    assert time.endswith("Z")
    assert rest == 'info server: listening socket=/run/t.sock why="a \\"b\\"\\nc" id=01ff share=0.25\n'


def test_json_is_one_object_a_line_and_fields_cannot_pose_as_ours() -> None:
    """A field named like one of the fixed keys does not replace it."""
    stream = written("json")
    log.get_logger("nvme").warning("slow", level="none", blocks=3)
    entry = json.loads(stream.getvalue())
    assert (entry["level"], entry["logger"], entry["event"], entry["blocks"]) == ("warning", "nvme", "slow", 3)


def test_an_exception_brings_its_traceback() -> None:
    """A bug is logged with where it happened."""
    stream = written("json")
    try:
        raise ZeroDivisionError("seven")
    except ZeroDivisionError:
        log.get_logger("core").exception("bug")
    assert "ZeroDivisionError: seven" in json.loads(stream.getvalue())["traceback"]


def test_below_the_level_nothing_is_written() -> None:
    """At `warning` an info is silent."""
    stream = written("text", "warning")
    log.get_logger("core").info("event")
    log.get_logger("core").debug("event")
    assert stream.getvalue() == ""


def test_the_journal_gets_a_priority_a_line_and_no_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is each line of a traceback found by `journalctl -p err`; a file that is not the journal stays as it is."""
    with open(tmp_path / "stderr", "w+") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        log.configure("debug", "text", stream)
        log.get_logger("audit").warning("denied", uid=7)
        try:
            raise ZeroDivisionError("seven")
        except ZeroDivisionError:
            log.get_logger("core").exception("bug")
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + 1}")
        log.configure("debug", "text", stream)
        log.get_logger("core").info("elsewhere")
        stream.seek(0)
        first, *traceback, last = stream.read().splitlines()
    assert first == "<4>warning audit: denied uid=7"
    assert traceback[0] == "<3>error core: bug" and traceback[-1] == "<3>ZeroDivisionError: seven"
    assert all(line.startswith("<3>") for line in traceback)
    assert last.endswith("Z info core: elsewhere")

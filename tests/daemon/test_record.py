"""`tierd record` beside a running daemon, and the replay of what it wrote."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.daemon.harness import LAYOUT, Daemon, hashes_of, readable
from tierd.replay.trace import read_trace

SECONDS_MAX = 20.0


@contextmanager
def recording(daemon: Daemon, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command, running."""
    command = [sys.executable, "-m", "tierd", "record", "--runtime-dir", str(daemon.runtime), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr and readable(process.stderr.fileno(), SECONDS_MAX)
            assert process.stderr.readline().startswith("recording"), "it does not record"
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    """All that it says until it ends."""
    return "".join(process.communicate(timeout=SECONDS_MAX))


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_what_engines_ask_is_replayed(name: str, daemon: Daemon, tmp_path: Path) -> None:
    """Every lookup is a request, with why its turn ended; a replay of them has the hits that they had."""
    file = tmp_path / name
    with daemon.peer() as peer, recording(daemon, str(file)) as process:
        hits = asked = 0
        for turn in range(1, 10):
            for talk in range(3):
                hashes = hashes_of(talk, 2 * turn)
                hits += peer.load(hashes)
                asked += 2 * turn
                peer.store(hashes)
                peer.ask("ended", block=hashes[-32:], turn="tool_use", conversation=f"talk {talk}")
        process.send_signal(signal.SIGINT)
        text = said(process)
    assert process.returncode == 0 and f"27 requests for {asked} blocks of {LAYOUT.block_tokens} tokens" in text
    trace = read_trace(file)
    assert trace.accesses == asked and trace.block_tokens == LAYOUT.block_tokens
    assert [request.stop for request in trace.requests] == ["tool_use"] * 27
    assert [len(request.blocks) for request in trace.requests] == [2 * turn for turn in range(1, 10) for _ in range(3)]
    assert hits and replay(file) == pytest.approx(hits / asked)
    daemon.wait_until(lambda status: status["recording"] is None)


def replay(file: Path) -> float:
    """The share of hits of `tierd replay` in a tier that holds all."""
    command = [sys.executable, "-m", "tierd", "replay", str(file), "--policy", "lru", "--capacity", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return float(json.loads(done.stdout)["rows"][0]["block_hit"])


def test_the_namespace_that_was_chosen_is_recorded(daemon: Daemon, tmp_path: Path) -> None:
    """By the beginning of its id; the requests of others are counted."""
    file = tmp_path / "trace.jsonl"
    with daemon.peer() as one, daemon.peer(model="other") as other, ExitStack() as stack:
        name = other.welcome["namespace"].hex()[:16]
        process = stack.enter_context(recording(daemon, str(file), "--namespace", name))
        one.lookup(hashes_of(1, 3))
        other.lookup(hashes_of(2, 5))
        one.lookup(hashes_of(1, 3))
        process.send_signal(signal.SIGTERM)
        text = said(process)
    assert "1 requests for 5 blocks" in text and "2 messages were for other namespaces" in text
    assert read_trace(file).accesses == 5


def test_a_daemon_that_ends_leaves_a_whole_file(daemon: Daemon, tmp_path: Path) -> None:
    """What was recorded is there, and the command says that the daemon has gone."""
    file = tmp_path / "trace.jsonl.gz"
    with daemon.peer() as peer, recording(daemon, str(file)) as process:
        peer.lookup(hashes_of(1, 3))
        peer.lookup(hashes_of(1, 4))
        daemon.wait_until(lambda status: status["recording"] == {"requests": 2, "left": 0, "missed": 0})
        daemon.kill()
        text = said(process)
    assert process.returncode == 3 and "no daemon at" in text
    assert read_trace(file).accesses == 7


def test_one_recording_at_a_time_and_no_file_is_lost(daemon: Daemon, tmp_path: Path) -> None:
    """A second one is refused, and may begin when the first has ended; a file that is there is never written over."""
    file, other = tmp_path / "trace.jsonl", tmp_path / "other.jsonl"
    with recording(daemon, str(file)) as process:
        done = daemon.run("record", str(other))
        assert done.returncode == 1 and "one recording at a time" in done.stderr and not other.exists()
        process.send_signal(signal.SIGINT)
        assert "nothing was asked for" in said(process)
    assert not file.exists()
    file.write_text("precious")
    done = daemon.run("record", str(file), "--seconds", "0")
    assert done.returncode == 2 and "File exists" in done.stderr and file.read_text() == "precious"
    done = daemon.run("record", str(other), "--seconds", "0", "--json")
    assert (done.returncode, json.loads(done.stdout)["requests"]) == (0, 0)
    assert daemon.run("record", str(other), "--namespace", "xyz").returncode == 2

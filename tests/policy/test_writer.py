"""A trace that is written as requests come: `read_trace` finds the same requests in it, and nobody finds their hashes."""

from __future__ import annotations

import json
import random
from io import BytesIO
from pathlib import Path

import pytest

from tests.sim.clients import chain
from tierd.block import HASH_BYTES
from tierd.replay import writer as module
from tierd.replay.trace import read_trace
from tierd.replay.writer import OPEN_MS_MAX, TraceWriter

KEY = b"k" * 32


def ids(out: BytesIO) -> list[list[int]]:
    """Block ids of every line."""
    return [json.loads(line)["hash_ids"] for line in out.getvalue().splitlines()]


def packed(*tokens: int) -> bytes:
    """A chain of blocks."""
    return b"".join(chain(tokens))


def test_what_is_read_is_what_was_asked(tmp_path: Path) -> None:
    """The same blocks are shared by the same requests, at the same times after the first, with the same lengths."""
    dice, out = random.Random(3), BytesIO()
    talks = [[number] for number in range(8)]
    chains, times, now = [], [], 1_800_000_000_000
    writer = TraceWriter(out, KEY, 16)
    for _ in range(200):
        talk = dice.choice(talks)
        talk += [dice.getrandbits(30) for _ in range(dice.randint(0, 4))]
        now += dice.randrange(5000)
        chains.append(packed(*talk))
        times.append(now)
        writer.asked(now, chains[-1])
    writer.close()
    file = tmp_path / "trace.jsonl"
    file.write_bytes(out.getvalue())
    trace = read_trace(file)
    numbers: dict[bytes, int] = {}
    expected = [
        [numbers.setdefault(hashes[at : at + HASH_BYTES], len(numbers)) for at in range(0, len(hashes), HASH_BYTES)]
        for hashes in chains
    ]
    assert [request.blocks.tolist() for request in trace.requests] == expected
    assert [request.now for request in trace.requests] == [time - times[0] for time in times]
    assert [request.tokens for request in trace.requests] == [16 * len(blocks) for blocks in expected]
    assert trace.block_tokens == 16 and writer.requests == 200 and writer.blocks == trace.accesses


def test_why_a_turn_ended_is_told_of_the_request_that_it_was(tmp_path: Path) -> None:
    """Of the one that went furthest along its chain, once, while others are open; conversations have keyed names."""
    out = BytesIO()
    writer = TraceWriter(out, KEY, 16)
    for at, tokens in enumerate(((1, 2), (1, 2, 3, 4), (9, 8))):
        writer.asked(at, packed(*tokens))
    writer.ended(packed(1, 2, 3, 4, 5, 6), "tool_use", "somebody's name")
    writer.ended(packed(9, 8), "end_turn", None)
    writer.ended(packed(9, 8), "stop", None)
    writer.ended(packed(7, 7, 7), "stop", None)
    assert not out.getvalue()
    writer.close()
    file = tmp_path / "trace.jsonl"
    file.write_bytes(out.getvalue())
    assert [request.stop for request in read_trace(file).requests] == [None, "tool_use", "end_turn"]
    assert b"somebody" not in out.getvalue() and b"session_id" in out.getvalue().splitlines()[1]


def test_nothing_of_a_hash_is_in_the_file() -> None:
    """No 4 bytes of one in a row as any part of an id, and another key gives other ids of the same blocks."""
    hashes = packed(*range(50))
    files = []
    for key in (KEY, b"l" * 32):
        files.append(BytesIO())
        writer = TraceWriter(files[-1], key, 16)
        writer.asked(0, hashes)
        writer.close()
    one, other = (set(ids(out)[0]) for out in files)
    assert len(one) == len(other) == 50 and not one & other
    written = b"".join(number.to_bytes(8) for number in one)
    assert not any(hashes[at : at + 4] in written for at in range(len(hashes) - 3))


def test_a_request_waits_for_its_turn_to_end_for_a_bounded_time_in_a_bounded_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come in the order of their times, the oldest when it is too old or there are too many behind it."""
    out = BytesIO()
    writer = TraceWriter(out, KEY, 16)
    writer.asked(0, packed(1))
    writer.asked(OPEN_MS_MAX, packed(2))
    assert not out.getvalue()
    writer.asked(OPEN_MS_MAX + 1, packed(3))
    assert len(ids(out)) == 1
    monkeypatch.setattr(module, "OPEN_BLOCKS_MAX", 20)
    for at in range(100):
        writer.asked(OPEN_MS_MAX + 2, packed(*range(1000 * at, 1000 * at + 7)))
        assert sum(len(line.ids) for line in writer._open) <= 20 * 8 and len(writer._last) <= 20
    writer.close()
    assert len(ids(out)) == writer.requests == 103


def test_a_clock_that_is_set_back_stops_time(tmp_path: Path) -> None:
    """No line is earlier than the one before it."""
    out = BytesIO()
    writer = TraceWriter(out, KEY, 16)
    for now in (5000, 9000, 1000, 9500):
        writer.asked(now, packed(1))
    writer.close()
    assert [json.loads(line)["timestamp"] for line in out.getvalue().splitlines()] == [0, 4000, 4000, 4500]

"""The engine with a real daemon: the same tokens, whatever is a hit and wherever it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.engine.test_engine_tokens import NEW, prompt
from tierd.client import Client
from tierd_engine.demo.processes import Daemon
from tierd_engine.llm import LLM


@pytest.fixture
def daemon(short_path: Path) -> Iterator[Daemon]:
    """A daemon under its holder, in a directory of its own."""
    running = Daemon(short_path, short_path / "state", short_path / "log")
    running.start()
    yield running
    running.stop()


def test_hits_of_every_length_from_a_real_daemon_leave_the_tokens_as_they_are(llama: Path, daemon: Daemon) -> None:
    """Nothing, a part and all of a prompt come from tierd, for a second engine and after `kill -9`."""
    whole, part = prompt(200), prompt(200)[:96] + prompt(104, seed=3)
    with LLM(llama, pages=48) as plain:
        expected = [plain.generate(tokens, NEW).tokens for tokens in (whole, part)]
    connect = partial(Client, daemon.socket)
    with LLM(llama, pages=48, connect=connect) as first:
        cold, shared = first.generate(whole, NEW), first.generate(part, NEW)
    assert (cold.hit_tokens, shared.hit_tokens) == (0, 96)
    daemon.kill()
    with LLM(llama, pages=48, connect=connect) as second:
        warm = second.generate(whole, NEW)
    assert warm.hit_tokens == 192
    assert [cold.tokens, shared.tokens] == expected
    assert warm.tokens == expected[0]


def test_an_engine_survives_the_daemon(llama: Path, daemon: Daemon) -> None:
    """The daemon goes away for good in the middle of a conversation: every lookup misses, nothing else changes."""
    with LLM(llama, pages=48, connect=partial(Client, daemon.socket)) as llm:
        before = llm.generate(prompt(100), NEW)
        daemon.stop()
        after = llm.generate(prompt(100), NEW)
    assert after.hit_tokens == 0
    assert after.tokens == before.tokens

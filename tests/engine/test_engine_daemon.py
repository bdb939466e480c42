"""The engine with a real daemon: the same tokens, whatever is a hit and wherever it comes from."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread

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


def test_bfloat16_goes_to_a_real_daemon_and_back(llama: Path, daemon: Daemon) -> None:
    """Half the bytes, the same tokens: cold, warm in another engine, and without tierd, with chunks that end where hits do."""
    settings = {"pages": 48, "dtype": "bfloat16", "chunk_tokens": 96}
    with LLM(llama, **settings) as plain:
        expected = plain.generate(prompt(100), NEW).tokens
    answers = []
    for _ in range(2):
        with LLM(llama, **settings, connect=partial(Client, daemon.socket)) as llm:
            answers.append(llm.generate(prompt(100), NEW))
            llm.check()
    assert [answer.hit_tokens for answer in answers] == [0, 96]
    assert [answer.tokens for answer in answers] == [expected, expected]


def test_an_engine_survives_the_daemon(llama: Path, daemon: Daemon) -> None:
    """The daemon goes away for good in the middle of a conversation: every lookup misses, nothing else changes."""
    with LLM(llama, pages=48, connect=partial(Client, daemon.socket)) as llm:
        before = llm.generate(prompt(100), NEW)
        daemon.stop()
        after = llm.generate(prompt(100), NEW)
    assert after.hit_tokens == 0
    assert after.tokens == before.tokens


def test_no_request_fails_and_no_step_waits_while_the_daemon_dies(llama: Path, daemon: Daemon) -> None:
    """kill -9 in the middle of a batch of twelve: the tokens are the same, and afterwards the engine hits again."""
    prompts = [prompt(60, seed=9)[:48] + prompt(50, seed=seed) for seed in range(12)]
    with LLM(llama, pages=160) as plain:
        expected = [answer.tokens for answer in plain.generate(prompts, 60)]
    with LLM(llama, pages=160, connect=partial(Client, daemon.socket), chunk_tokens=64) as llm:
        llm.generate(prompts[0], NEW)
        killer = Thread(target=daemon.kill)
        seconds = watch_steps(llm, lambda step: killer.start() if step == 10 else None)
        answers = llm.generate(prompts, 60)
        killer.join()
        assert [answer.tokens for answer in answers] == expected
        assert max(seconds) < llm.client.deadline_seconds
        llm.check()
        for _ in range(100):
            again = llm.generate(prompts[3], 60)
            assert again.tokens == expected[3]
            if again.hit_tokens:
                break
            time.sleep(0.1)
        assert again.hit_tokens >= 48
        llm.check()


def test_a_daemon_that_stands_still_stalls_nobody(llama: Path, daemon: Daemon) -> None:
    """SIGSTOP: whoever looks up computes after a while, and those who run do not notice."""
    prompts = [prompt(100, seed=seed) for seed in range(6)]
    with LLM(llama, pages=160) as plain:
        expected = [answer.tokens for answer in plain.generate(prompts, NEW)]
    with LLM(llama, pages=160, connect=partial(Client, daemon.socket)) as llm:
        llm.generate(prompts[0], NEW)
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            seconds = watch_steps(llm, lambda step: None)
            answers = llm.generate(prompts, NEW)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert [answer.tokens for answer in answers] == expected
        assert max(seconds) < 0.5
        assert llm.engine.scheduler.counts.loads_declined > 0
        llm.check()


def watch_steps(llm: LLM, between: Callable[[int], object]) -> list[float]:
    """From now on note how long each step takes, and do something between them."""
    seconds: list[float] = []
    step = llm.engine.step

    def watched() -> list:
        between(len(seconds))
        began = time.monotonic()
        done = step()
        seconds.append(time.monotonic() - began)
        return done

    llm.engine.step = watched
    return seconds

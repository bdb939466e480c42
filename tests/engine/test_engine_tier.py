"""The daemon's slots as the engine's pages: the same tokens whatever is evicted, brought up, taken away or killed."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from tests.cuda.build import environ, load
from tests.daemon.harness import Daemon
from tests.engine.test_engine_schedules import NEW_MAX, PROMPTS, Twins, run
from tests.engine.test_engine_tokens import prompt
from tests.engine.tier import check_nothing_is_held, gpu_daemon, slots, tier_memory
from tierd.block import chain
from tierd.client.pages import PageClient
from tierd.cuda import DeviceArray
from tierd.errors import Invalid
from tierd_engine.engine import Engine
from tierd_engine.llm import LLM
from tierd_engine.request import Sampling
from tierd_engine.sequence import Sequence

NEW = 24
LONG = [prompt(100, seed=9)[:48] + prompt(120, seed=seed) for seed in range(12)]
"""Twelve prompts of 168 tokens that share three blocks: 87 blocks together."""


@pytest.fixture(scope="module")
def twins(write_model: Callable[..., Path]) -> Twins:
    """A tiny Llama, twice."""
    return Twins(write_model("llama", num_key_value_heads=2, head_dim=16))


@pytest.fixture
def launch(short_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts the daemon, which is stopped at the end; its log must have no traceback."""
    made: list[Daemon] = []

    def start(**options: object) -> Daemon:
        made.append(gpu_daemon(short_path, **options))
        return made[-1].start()

    yield start
    for daemon in made:
        daemon.end()
        print(daemon.log)
        assert "Traceback" not in daemon.log


def ask(engine: Engine, prompts: list[list[int]], new: int = NEW, **sampling: int) -> list[Sequence]:
    """Queue one request for each prompt."""
    return [one for tokens in prompts for one in engine.add(tokens, Sampling(max_tokens=new, **sampling))]


def check_answers(twins: Twins, sequences: list[Sequence]) -> None:
    """They are what transformers says."""
    for sequence in sequences:
        assert sequence.reason == "abort" or len(sequence.new_tokens) == sequence.sampling.max_tokens
        twins.oracle.check(sequence.tokens[: sequence.prompt_tokens], sequence.new_tokens, NEW_MAX)


def steps_until(engine: Engine, so: Callable[[], bool], between: Callable[[int], object] = lambda step: None) -> float:
    """Step until something is so; returns how long the longest step took."""
    longest = 0.0
    for step in range(20_000):
        if so():
            return longest
        between(step)
        began = time.monotonic()
        engine.step()
        longest = max(longest, time.monotonic() - began)
    raise AssertionError(f"stuck: {engine.scheduler.waiting} wait, {engine.scheduler.running} run")


def test_a_prompt_that_comes_once_is_seen_once(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """Prompt and answer go to cpu; the second time the prompt goes to nvme, though the engine never let go of its pages."""
    daemon = launch(nvme_bytes=16 << 20, nvme_admission="second-sight")
    engine = twins.engine(tier_memory(daemon, twins.layout, 16))
    written = 'tierd_slots{state="ready",tier="nvme"}'
    ask(engine, LONG[:1])
    run(engine)
    assert daemon.run("sync").returncode == 0
    assert daemon.metrics()[written] == 0
    ask(engine, LONG[:1])
    run(engine)
    assert daemon.run("sync").returncode == 0
    assert daemon.metrics()[written] >= 10
    engine.close()


def copied_bytes(daemon: Daemon) -> float:
    """Bytes that were brought to the gpu tier from anywhere."""
    moved = daemon.metrics().items()
    return sum(value for key, value in moved if key.startswith("tierd_transfer_bytes_total") and 'target="gpu"' in key)


def test_a_hit_is_the_page_in_which_another_engine_computed_it(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """A second engine attends to the first one's pages, under the same numbers, and no byte is copied for it."""
    daemon = launch()
    one, two = (twins.engine(tier_memory(daemon, twins.layout, 16)) for _ in range(2))
    [first] = ask(one, LONG[:1])
    steps_until(one, lambda: bool(first.new_tokens))
    computed = first.table.pages[:10]
    [second] = ask(two, LONG[:1])
    steps_until(two, lambda: bool(second.new_tokens))
    assert second.hit_tokens == 160 and second.table.pages[:10] == computed and max(computed) < slots(twins.layout)
    run(one)
    run(two)
    check_answers(twins, [first, second])
    assert copied_bytes(daemon) == 0
    assert two.memory.statistics()["hit_gpu"] == 10
    assert daemon.metrics()['tierd_turns_total{turn="length"}'] == 2
    check_nothing_is_held(daemon, one, two)
    for engine in (one, two):
        engine.close()


def test_pages_on_a_gpu_give_the_same_answers(
    twins: Twins, launch: Callable[..., Daemon], emulation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tier is in the memory of a GPU that is emulated: prompts of three times its size, pages that come back from below and
    a daemon that is killed and adopts it change no token. (Only torch is told that the addresses are host memory, as they are.)
    """

    def tensor_over(memory: DeviceArray) -> torch.Tensor:
        size = memory.shape[0] * memory.shape[1]
        return torch.frombuffer((ctypes.c_ubyte * size).from_address(memory.address), dtype=torch.uint8).view(memory.shape)

    load(emulation)
    monkeypatch.setattr("tierd_engine.tier.tensor_over", tensor_over)
    daemon = launch(held=True, gpu_device="cuda:0", environ=environ(emulation))
    engine = twins.engine(tier_memory(daemon, twins.layout, 14, device="cuda:0"), chunk_tokens=64)
    done: list[Sequence] = []
    for turn in range(3):
        engine.scheduler.prefill_tokens_per_second = 0.0  # not measured yet: every load is worth its time
        done += ask(engine, LONG[turn:] + LONG[:turn])
        run(engine)
        daemon.ask("sync", deadline_ms=20_000)
        if turn == 1:
            daemon.kill()
            for is_alive in (False, True):
                steps_until(engine, lambda is_alive=is_alive: engine.memory.client.alive is is_alive)  # type: ignore[misc]
    check_answers(twins, done)
    assert copied_bytes(daemon) > 0 and "adopted segments=" in daemon.log and "given up" not in daemon.log
    check_nothing_is_held(daemon, engine)
    engine.close()


def test_answers_survive_a_tier_much_smaller_than_the_work(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """Batches over three times the gpu tier: blocks go down to cpu and nvme and come up again, and some are aborted."""
    daemon = launch()
    engine = twins.engine(tier_memory(daemon, twins.layout, 14), chunk_tokens=64)
    done: list[Sequence] = []

    def between(step: int) -> None:
        engine.scheduler.prefill_tokens_per_second = 0.0  # not measured yet: every load is worth its time
        if step == 40:
            engine.abort([one for one in done[-10:-8] if not one.reason])

    for turn in range(4):
        done += ask(engine, LONG[turn:] + LONG[:turn])
        steps_until(engine, lambda: engine.idle, between)
        daemon.ask("sync", deadline_ms=20_000)
    check_answers(twins, done)
    hits = engine.memory.statistics()
    assert hits["hit_gpu"] and hits["hit_cpu"] and hits["hit_nvme"], hits
    assert copied_bytes(daemon) > 0
    assert daemon.status()["evicted_blocks"]["gpu.clean"]
    check_nothing_is_held(daemon, engine)
    engine.close()


def test_blocks_come_up_as_pages_become_free_and_are_not_computed_again(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """The second time twelve prompts are asked, each has its blocks below a gpu tier that holds three of them at a time."""
    daemon = launch()
    engine = twins.engine(tier_memory(daemon, twins.layout, 14), chunk_tokens=64)
    for _ in range(2):
        before = engine.scheduler.counts.prefill_tokens
        done = ask(engine, LONG)
        steps_until(engine, lambda: engine.idle, lambda step: setattr(engine.scheduler, "prefill_tokens_per_second", 0.0))
        check_answers(twins, done)
        daemon.ask("sync", deadline_ms=20_000)
    counts = engine.scheduler.counts
    assert counts.prefill_tokens - before <= sum(len(tokens) - 160 for tokens in LONG) + counts.preemptions * len(LONG[0])
    check_nothing_is_held(daemon, engine)
    engine.close()


def test_a_prefix_that_the_tier_cannot_hold_is_loaded_as_far_as_it_goes(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """A prompt of more blocks than the gpu tier has slots: the rest is computed in private pages, and nothing hangs."""
    daemon = launch()
    longest = (slots(twins.layout) + 6) * twins.layout.block_tokens
    engine = twins.engine(tier_memory(daemon, twins.layout, longest // twins.layout.block_tokens + 8), chunk_tokens=64)
    for _ in range(2):
        done = ask(engine, [prompt(longest, seed=3)], 4)
        steps_until(engine, lambda: engine.idle)
        check_answers(twins, done)
        daemon.ask("sync", deadline_ms=20_000)
    assert done[0].hit_tokens > 0
    check_nothing_is_held(daemon, engine)
    engine.close()


def test_preempted_sequences_resume_from_their_blocks(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """Long answers to short prompts run out of slots and private pages; who gave up finds what it had computed."""
    daemon = launch()
    engine = twins.engine(tier_memory(daemon, twins.layout, 8), chunk_tokens=64)
    counts = engine.scheduler.counts
    for batch in range(10):  # how many run at a time depends on when the daemon answers: rarely few enough to fit
        sequences = ask(engine, [prompt(40, seed=seed) for seed in range(10 * batch, 10 * batch + 10)], NEW_MAX)
        run(engine)
        check_answers(twins, sequences)
        if counts.preemptions:
            break
    assert counts.preemptions
    assert counts.prefill_tokens < counts.prompt_tokens + counts.preemptions * 40, "a victim's blocks were computed again"
    check_nothing_is_held(daemon, engine)
    engine.close()


@pytest.mark.parametrize("held", [True, False], ids=["kept", "cold"])
def test_no_request_fails_and_no_step_waits_while_the_daemon_dies(
    twins: Twins, launch: Callable[..., Daemon], held: bool
) -> None:
    """kill -9 in the middle of a batch: it goes on in the pages that it has and in private ones, and joins again."""
    daemon = launch(held=held)
    engine = twins.engine(tier_memory(daemon, twins.layout, 40), chunk_tokens=64)
    run_first = ask(engine, LONG[:2])
    run(engine)
    sequences = ask(engine, LONG, 60) + ask(engine, LONG[:1], 30, n=3)
    killer, away = Thread(target=daemon.kill), []

    def between(step: int) -> None:
        if step == 12:
            killer.start()
        if not engine.memory.client.alive:
            away.append(len(engine.scheduler.running))

    longest = steps_until(engine, lambda: engine.idle, between)
    killer.join()
    assert longest < 0.5 and any(away)
    check_answers(twins, run_first + sequences)
    engine.check()
    if not held:
        alone = ask(engine, LONG[5:9], n=2)
        run(engine)
        assert alone[1].hit_tokens == 160, "samples share their prompt, daemon or not"
        check_answers(twins, alone)
        engine.check()
        daemon.start()
    steps_until(engine, lambda: engine.memory.client.alive)
    again = ask(engine, LONG[:1])
    run(engine)
    more = ask(engine, LONG[:1])
    run(engine)
    assert more[0].hit_tokens == 160 and engine.memory.statistics()["hit_gpu"] > 0
    check_answers(twins, again + more)
    check_nothing_is_held(daemon, engine)
    engine.close()


@pytest.mark.parametrize("held", [True, False], ids=["kept", "cold"])
def test_engines_under_pressure_answer_right_through_kills(twins: Twins, launch: Callable[..., Daemon], held: bool) -> None:
    """Two engines share a tier too small for one, requests come and go at random, and the daemon is killed three times."""
    daemon, dice = launch(held=held), random.Random(held)
    engines = [twins.engine(tier_memory(daemon, twins.layout, 18), chunk_tokens=size) for size in (16, 512)]
    done: list[Sequence] = []
    killer = Thread()
    for step in range(1200):
        engine = dice.choice(engines)
        if len(engine.scheduler.waiting) < 6 and dice.random() < 0.15:
            done += ask(engine, [dice.choice(PROMPTS)], dice.randint(1, NEW_MAX), n=dice.choice([1, 1, 1, 2, 3]))
        if dice.random() < 0.02:
            engine.abort(engine.scheduler.waiting[-1:] + engine.scheduler.running[-1:])
        if step % 400 == 200:
            killer = Thread(target=kill, args=(daemon,))
            killer.start()
        engine.step()
        if step % 400 == 399:
            killer.join()
    for engine in engines:
        run(engine)
        steps_until(engine, lambda: engine.memory.client.alive)  # noqa: B023
    check_answers(twins, done)
    check_nothing_is_held(daemon, *engines)
    for engine in engines:
        engine.close()


def kill(daemon: Daemon) -> None:
    """kill -9, and another life."""
    daemon.kill()
    if not daemon.held:
        daemon.start()


def test_an_answer_begun_before_a_cold_restart_ends_after_it(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """Its pages are orphans then: read and written as before, never committed, and free when it has ended."""
    daemon = launch()
    engine = twins.engine(tier_memory(daemon, twins.layout, 20))
    [long] = ask(engine, LONG[:1], NEW_MAX)
    steps_until(engine, lambda: len(long.new_tokens) > 5)
    daemon.kill()
    steps_until(engine, lambda: not engine.memory.client.alive)
    daemon.start()
    while not engine.memory.client.alive:
        engine.memory.wait(0.01)
        engine.memory.poll()
    assert not long.reason and long.table.pages[0] < slots(twins.layout)
    beside = ask(engine, LONG[1:6])
    run(engine)
    check_answers(twins, [long, *beside])
    check_nothing_is_held(daemon, engine)
    engine.close()


def test_a_daemon_that_stands_still_stalls_nobody(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """SIGSTOP: who looks up computes after a while, and those who run do not notice."""
    daemon = launch()
    engine = twins.engine(tier_memory(daemon, twins.layout, 60))
    before = ask(engine, LONG[:1])
    run(engine)
    pid = daemon.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        stalled = ask(engine, LONG[1:6])
        longest = steps_until(engine, lambda: engine.idle)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert longest < 0.5
    steps_until(engine, lambda: engine.memory.client.alive)
    check_answers(twins, before + stalled)
    check_nothing_is_held(daemon, engine)
    engine.close()


def test_garbage_in_slots_harms_nobody(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """Slots are full of NaN from another life; what attention masks is multiplied all the same."""
    daemon = launch()
    spoiler, engine = tier_memory(daemon, twins.layout, 1), twins.engine(tier_memory(daemon, twins.layout, 1 + 14))
    asked = spoiler.reserve(slots(twins.layout))
    while not asked.done:
        spoiler.wait(0.01)
        spoiler.poll()
    assert len(asked.pages) == slots(twins.layout)
    spoiler.client.memory[asked.pages] = 255
    spoiler.release(asked.pages)
    spoiler.close()
    daemon.wait_until(lambda status: status["tiers"]["gpu"]["slots"]["filling"] == 0)
    sequences = ask(engine, LONG[:2])
    run(engine)
    check_answers(twins, sequences)
    check_nothing_is_held(daemon, engine)
    engine.close()


def test_two_engines_that_compute_the_same_end_with_one_page(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """In step with each other they ask for the same names: the later one goes on in the earlier one's pages."""
    daemon = launch()
    engines = [twins.engine(tier_memory(daemon, twins.layout, 16), chunk_tokens=16) for _ in range(2)]
    sequences = [ask(engine, LONG[:1])[0] for engine in engines]
    while not all(engine.idle for engine in engines):
        for engine, sequence in zip(engines, sequences, strict=True):
            if sequence.table and sequence.table.unanswered:
                engine.memory.wait(1.0)  # a step takes less time than an answer when the machine is busy
            engine.step()
        tables = [sequence.table.pages[:5] for sequence in sequences if sequence.table and sequence.computed > 120]
        if len(tables) == 2:
            assert len(set(tables[0]) & set(tables[1])) >= 4
    check_answers(twins, sequences)
    check_nothing_is_held(daemon, *engines)
    for engine in engines:
        engine.close()


def test_a_twin_of_a_page_that_is_held_is_held_once(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """The same block from two sequences: one page, one hold of the daemon's, two users."""
    memory = tier_memory(launch(), twins.layout, 2)
    asked = memory.reserve(3)
    hashes = chain(range(32), 16)
    pages = list(_answered(memory, asked).pages)
    parents = bytes(32) + hashes[:32]
    assert _answered(memory, memory.commit(pages[:2], parents, hashes)).codes.tolist() == [-1, -1]
    assert _answered(memory, memory.commit(pages[2:], parents[32:], hashes[32:])).codes.tolist() == [pages[1]]
    assert memory.client.held == 3
    memory.release(pages)
    assert memory.client.held == 1 and memory.pool.used(pages[1])
    memory.release([pages[1]])
    memory.check()
    memory.close()


def test_private_pages_are_the_last_resort(twins: Twins, launch: Callable[..., Daemon]) -> None:
    """With all slots held there is nothing, unless it is urgent; without a daemon there is nothing else."""
    daemon = launch()
    memory = tier_memory(daemon, twins.layout, 2)
    held = list(_answered(memory, memory.reserve(slots(twins.layout) + 5)).pages)
    assert len(held) == slots(twins.layout)
    assert list(_answered(memory, memory.reserve(1)).pages) == []
    urgent = list(_answered(memory, memory.reserve(5, urgent=True)).pages)
    assert urgent == list(memory.client.private)
    memory.release(urgent)
    daemon.kill()
    while memory.client.alive:
        memory.wait(0.01)
        memory.poll()
    away = memory.reserve(1)
    assert away.done and away.pages[0] in memory.client.private
    memory.release([*held, *away.pages])
    memory.check()
    memory.close()


def _answered(memory, ticket):
    while not ticket.done:
        memory.wait(0.01)
        memory.poll()
    return ticket


def test_an_llm_computes_in_slots_when_it_is_told_to(llama: Path, launch: Callable[..., Daemon]) -> None:
    """`memory="tier"` with a client for pages; a name of no memory and a client without private pages are refused."""
    daemon = launch()
    connect = partial(PageClient, daemon.socket)
    with LLM(llama, pages=48) as plain:
        expected = plain.generate(LONG[:3], NEW)
    for _ in range(2):
        with LLM(llama, pages=16, connect=connect, memory="tier") as llm:
            answers = llm.generate(LONG[:3], NEW)
            llm.check()
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert min(answer.hit_tokens for answer in answers) == 160
    with pytest.raises(Invalid, match="not one of copy, tier"):
        LLM(llama, memory="cloud")
    with pytest.raises(Invalid, match="at least 1"):
        LLM(llama, pages=0, connect=connect, memory="tier")


def test_without_a_daemon_the_private_pages_serve(llama: Path, short_path: Path) -> None:
    """Nobody listens: the engine starts, answers, and says why it has no slots."""
    with LLM(llama, pages=16, connect=partial(PageClient, short_path / "none", deadline_seconds=0.1), memory="tier") as llm:
        answer, [expected] = llm.generate(LONG[0], NEW), [np.array(llm.generate(LONG[0], NEW).tokens)]
        assert (np.array(answer.tokens) == expected).all()
        assert "no daemon" in llm.memory.client.trouble
        llm.check()

"""Holds a workload's talks with an engine, and counts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from tierd.block import chain, split
from tierd.clock import monotonic_seconds
from tierd_engine.bench.workloads import Turn, Workload
from tierd_engine.engine import Engine
from tierd_engine.request import Sampling
from tierd_engine.sequence import Sequence


@dataclass(frozen=True)
class Measured:
    """One workload in one mode.

    `utilisation` is live tokens over token slots of pages in use (over 1 where pages are shared), and so many sequences of
    that kind fit the pool; `contiguous` is what it would be if each reserved the longest talk's length.
    """

    requests: int
    seconds: float
    first_token_p50_seconds: float
    first_token_p95_seconds: float
    tokens_per_second: float
    prompt_tokens: int
    prefill_tokens: int
    prefill_tokens_min: int
    blocks_by_tier: dict[str, int]
    cpu_seconds_per_request: float
    daemon_cpu_seconds_per_request: float
    steps: int
    steps_waited: int
    preemptions: int
    loads_declined: int
    sequences_fit: int
    utilisation: float
    sequences_fit_contiguous: int
    utilisation_contiguous: float

    def to_map(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class InfiniteCache:
    """Counts what an engine would have to compute if nothing was ever forgotten."""

    def __init__(self, block_tokens: int) -> None:
        self.prefill_tokens = 0
        self._block_tokens = block_tokens
        self._names: set[bytes] = set()

    def ask(self, tokens: list[int]) -> None:
        """A prompt arrives."""
        hits = 0
        names = list(split(chain(tokens, self._block_tokens)))
        for name in names[: (len(tokens) - 1) // self._block_tokens]:
            if name not in self._names:
                break
            hits += 1
        self.prefill_tokens += len(tokens) - hits * self._block_tokens
        self._names.update(names)

    def learn(self, tokens: list[int]) -> None:
        """An answer has ended: its last token has no KV."""
        self._names.update(split(chain(tokens[:-1], self._block_tokens)))


@dataclass
class Talking:
    """A talk under way."""

    turns: list[Turn]
    history: list[int]
    sequence: Sequence | None = None


def measure(engine: Engine, workload: Workload, daemon_cpu_seconds: Callable[[], float]) -> Measured:
    """Hold all talks; returns when the last has ended and everything is stored."""
    block_tokens, counts = engine.memory.layout.block_tokens, engine.scheduler.counts
    infinite, ended = InfiniteCache(block_tokens), []
    waiting = [Talking(list(talk), []) for talk in workload.talks]
    talking: list[Talking] = []
    live, slots, held = 0, 0, 0
    cpu_before, daemon_before, began = cpu_seconds_used(), daemon_cpu_seconds(), monotonic_seconds()
    while waiting or talking:
        while waiting and len(talking) < workload.concurrency:
            talking.append(waiting.pop(0))
        for talk in list(talking):
            sequence = talk.sequence
            if sequence is not None and sequence.reason:
                ended.append(sequence)
                talk.history, talk.sequence = sequence.tokens, None
                infinite.learn(sequence.tokens)
            if talk.sequence is None and talk.turns:
                turn = talk.turns.pop(0)
                prompt = talk.history + turn.tokens
                infinite.ask(prompt)
                [talk.sequence] = engine.add(prompt, Sampling(max_tokens=turn.answer_tokens, ignore_eos=True))
            elif talk.sequence is None:
                talking.remove(talk)
        engine.step()
        running = engine.scheduler.running
        live += sum(sequence.computed for sequence in running)
        slots += len({page for sequence in running if sequence.table for page in sequence.table.pages}) * block_tokens
        held += len(running)
    seconds = monotonic_seconds() - began
    engine.settle()
    engine.check()
    daemon = daemon_cpu_seconds() - daemon_before
    cpu_seconds = cpu_seconds_used() - cpu_before + daemon
    first = [sequence.seconds["first"] - sequence.seconds["arrived"] for sequence in ended]
    pool_tokens = engine.memory.count * block_tokens
    return Measured(
        requests=len(ended),
        seconds=seconds,
        first_token_p50_seconds=median(first),
        first_token_p95_seconds=quantiles(first, n=20)[-1],
        tokens_per_second=sum(len(sequence.new_tokens) for sequence in ended) / seconds,
        prompt_tokens=counts.prompt_tokens,
        prefill_tokens=counts.prefill_tokens,
        prefill_tokens_min=infinite.prefill_tokens,
        blocks_by_tier={
            key.removeprefix("hit_"): count for key, count in engine.memory.statistics().items() if key.startswith("hit_")
        },
        cpu_seconds_per_request=cpu_seconds / len(ended),
        daemon_cpu_seconds_per_request=daemon / len(ended),
        steps=counts.steps,
        steps_waited=counts.steps_waited,
        preemptions=counts.preemptions,
        loads_declined=counts.loads_declined,
        sequences_fit=pool_tokens * held // max(slots, 1),
        utilisation=live / max(slots, 1),
        sequences_fit_contiguous=pool_tokens // workload.longest,
        utilisation_contiguous=sum(len(sequence.tokens) for sequence in ended) / len(ended) / workload.longest,
    )


def cpu_seconds_used() -> float:
    """Of this process, all threads."""
    times = os.times()
    return times.user + times.system

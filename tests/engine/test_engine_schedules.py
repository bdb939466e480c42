"""Whatever is in the batch: every request's tokens are those that transformers gives it alone, and no page is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.daemon.harness import Daemon
from tests.engine.conftest import DictionaryCache
from tests.engine.greedy import Greedy
from tests.engine.late import LateMemory
from tests.engine.test_engine_tokens import prompt
from tests.engine.tier import gpu_daemon, tier_memory
from tierd_engine.copying import CopyingMemory
from tierd_engine.engine import Engine
from tierd_engine.memory import Memory, PrivateMemory
from tierd_engine.model import layout_of, load_model
from tierd_engine.request import Limits, Sampling
from tierd_engine.sequence import Sequence

NEW_MAX = 64
STEPS_MAX = 20_000
SHORT = range(10)
PROMPTS = [
    prompt(shared, seed=5)[:shared] + prompt(own, seed=seed) for shared in (0, 37, 80) for own in (1, 11, 40) for seed in (1, 2)
]


met: Counter[str] = Counter()


class Twins:
    """A model under the engine and its untouched twin as the oracle."""

    def __init__(self, path: Path) -> None:
        self.model: PreTrainedModel = load_model(path)
        self.oracle = Greedy(AutoModelForCausalLM.from_pretrained(path))
        self.layout = layout_of(self.model, "float32")

    def engine(self, memory: Memory, **limits: int) -> Engine:
        return Engine(self.model, memory, Limits(**limits), frozenset())

    def answer(self, tokens: list[int], new: int) -> list[int]:
        return self.oracle(tokens, NEW_MAX)[:new]


@pytest.fixture(scope="module")
def twins(write_model: Callable[..., Path]) -> Twins:
    """A tiny Llama, twice."""
    return Twins(write_model("llama", num_key_value_heads=2, head_dim=16))


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A daemon with a small gpu tier, which keeps what earlier schedules left."""
    with TemporaryDirectory(prefix="tierd-", dir="/tmp") as folder:
        running = gpu_daemon(Path(folder)).start()
        yield running
        running.end()
        assert "Traceback" not in running.log, running.log


def run(engine: Engine) -> None:
    """Until nothing is left, or for ever."""
    for _ in range(STEPS_MAX):
        if engine.idle:
            return
        engine.step()
    raise AssertionError(f"stuck: {engine.scheduler.waiting} wait, {engine.scheduler.running} run")


requests = st.fixed_dictionaries(
    {
        "prompt": st.integers(0, len(PROMPTS) - 1),
        "new": st.one_of(st.integers(1, 8), st.integers(1, NEW_MAX)),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "arrives": st.integers(0, 40),
        "lives": st.one_of(st.none(), st.none(), st.none(), st.integers(0, 60)),
    }
)
schedules = st.fixed_dictionaries(
    {
        "requests": st.lists(requests, min_size=1, max_size=9),
        "pages": st.integers(12, 28),
        "chunk_tokens": st.sampled_from([1, 5, 16, 30, 64, 512]),
        "running_max": st.integers(1, 12),
        "memory": st.sampled_from(["private", "copying", "tier"]),
        "forgets": st.integers(0, 3),
        "late": st.one_of(st.none(), st.integers(0, 99)),
    }
)


crowds = st.fixed_dictionaries(
    {
        "requests": st.lists(
            st.fixed_dictionaries(
                {
                    "prompt": st.sampled_from(SHORT),
                    "new": st.integers(NEW_MAX // 2, NEW_MAX),
                    "n": st.just(1),
                    "arrives": st.integers(0, 5),
                    "lives": st.none(),
                }
            ),
            min_size=4,
            max_size=8,
            unique_by=itemgetter("prompt"),
        ),
        "pages": st.integers(12, 18),
        "chunk_tokens": st.just(64),
        "running_max": st.just(8),
        "memory": st.sampled_from(["private", "copying", "tier"]),
        "forgets": st.integers(0, 3),
        "late": st.one_of(st.none(), st.integers(0, 99)),
    }
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=schedules)
def test_every_answer_is_the_one_it_would_be_alone(twins: Twins, daemon: Daemon, schedule: dict) -> None:
    """Arrivals, lengths, shared prefixes, samples, aborts, pools too small for all, a cache that forgets, late answers."""
    hold(twins, daemon, schedule)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=crowds)
def test_every_answer_survives_preemption(twins: Twins, daemon: Daemon, schedule: dict) -> None:
    """Long answers to short prompts: all are admitted, and then there is room for two."""
    hold(twins, daemon, schedule)


def hold(twins: Twins, daemon: Daemon, schedule: dict) -> None:
    """Run a schedule, compare every answer, and look for lost pages."""
    cache = DictionaryCache()
    memory: Memory = PrivateMemory(twins.layout, schedule["pages"])
    if schedule["memory"] == "copying":
        memory = CopyingMemory(twins.layout, schedule["pages"], cache.connect(model="m", layout=twins.layout))
    if schedule["memory"] == "tier":
        memory = tier_memory(daemon, twins.layout, schedule["pages"])
    if schedule["late"] is not None:
        memory = LateMemory(memory, schedule["late"])
    engine = twins.engine(memory, chunk_tokens=schedule["chunk_tokens"], running_max=schedule["running_max"])
    todo = sorted(schedule["requests"], key=lambda request: request["arrives"])
    alive: list[tuple[int, list[Sequence]]] = []
    done: list[Sequence] = []
    for step in range(STEPS_MAX):
        while todo and todo[0]["arrives"] <= step:
            request = todo.pop(0)
            added = engine.add(PROMPTS[request["prompt"]], Sampling(max_tokens=request["new"], n=request["n"]))
            done += added
            if request["lives"] is not None:
                alive.append((step + request["lives"], added))
        for ends, sequences in alive:
            if ends == step:
                engine.abort(sequences)
        engine.step()
        if schedule["forgets"] and step % 10 == schedule["forgets"]:
            for name in list(cache.blocks)[:: schedule["forgets"]]:
                cache.blocks.pop(name)
        if not todo and engine.idle:
            break
    assert engine.idle, f"stuck: {engine.scheduler.waiting} wait, {engine.scheduler.running} run"
    for sequence in done:
        assert sequence.reason in ("length", "abort")
        assert sequence.reason == "abort" or len(sequence.new_tokens) == sequence.sampling.max_tokens
        twins.oracle.check(sequence.tokens[: sequence.prompt_tokens], sequence.new_tokens, NEW_MAX)
    engine.check()
    met.update(vars(engine.scheduler.counts) | {"sequences": 0, "ties": 0})
    met["hits in slots"] += (schedule["memory"] == "tier") * engine.scheduler.counts.hit_tokens
    met["hits after sharing"] += sum(sequence.hit_tokens > 0 for sequence in done)
    engine.close()


def test_the_schedules_met_what_they_were_made_for(twins: Twins) -> None:
    """Were there no preemptions, hits or recomputed tokens among them, the test above would show little."""
    print(f"{dict(met)}, {twins.oracle.ties} answers differed by a tie")
    assert min(met["preemptions"], met["hit_tokens"], met["steps_waited"], met["hits after sharing"], met["hits in slots"]) > 20

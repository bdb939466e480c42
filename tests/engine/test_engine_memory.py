"""Where blocks come from, and what is done when they do not come: sharing, single flight, slow loads, a store under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.engine.conftest import DictionaryCache, DictionaryClient, DictionaryLookup
from tests.engine.test_engine_schedules import NEW_MAX, Twins, run
from tests.engine.test_engine_tokens import prompt
from tierd.block import chain
from tierd_engine.copying import CopyingMemory
from tierd_engine.engine import Engine
from tierd_engine.memory import PrivateMemory
from tierd_engine.request import Hints, Limits, Sampling

NEW = 12


@pytest.fixture(scope="module")
def twins(write_model: Callable[..., Path]) -> Twins:
    """A tiny Llama, twice."""
    return Twins(write_model("llama", num_key_value_heads=2, head_dim=16))


class SlowClient(DictionaryClient):
    """Finds everything at once, and copies when it is told to."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)
        self.go = Event()

    def lookup(self, hashes: bytes, parent: bytes = bytes(32)) -> DictionaryLookup:
        found = super().lookup(hashes, parent)
        found.copy_into = self._slowly(found.copy_into)
        return found

    def _slowly(self, copy: Callable[..., int]) -> Callable[..., int]:
        def wait_and_copy(*given: object) -> int:
            assert self.go.wait(30)
            return copy(*given)

        return wait_and_copy


@pytest.fixture
def slow(twins: Twins) -> Iterator[tuple[Engine, SlowClient]]:
    """An engine whose cache has `prompt(160)`, and whose client waits for `go`."""
    cache = DictionaryCache()
    client = SlowClient(cache, "m", twins.layout)
    cache.connections += 1
    warm = twins.engine(CopyingMemory(twins.layout, 40, cache.connect(model="m", layout=twins.layout)))
    warm.add(prompt(160), Sampling(max_tokens=1))
    run(warm)
    warm.close()
    engine = twins.engine(CopyingMemory(twins.layout, 40, client))
    yield engine, client
    client.go.set()
    run(engine)
    engine.check()
    engine.close()


def test_samples_share_all_full_blocks_and_one_prefill(twins: Twins) -> None:
    """Four samples of 100 tokens: six shared pages and four private ones, and six blocks are computed once."""
    engine = twins.engine(PrivateMemory(twins.layout, 64))
    samples = engine.add(prompt(100), Sampling(max_tokens=NEW, n=4))
    while not all(sample.table and len(sample.tokens) > 100 for sample in samples):
        engine.step()
    tables = [sample.table.pages for sample in samples]
    assert len({tuple(table[:6]) for table in tables}) == 1
    assert len({table[6] for table in tables}) == 4
    run(engine)
    assert engine.scheduler.counts.prefill_tokens == 100 + 3 * 4
    for sample in samples:
        twins.oracle.check(prompt(100), sample.new_tokens, NEW_MAX)
    engine.check()


def test_pages_may_lie_apart(twins: Twins) -> None:
    """Slots are padded to 4 KiB, pages that are slots too: what is between them is left alone."""
    memory = PrivateMemory(twins.layout, 20)
    wide = torch.full((20, 2048 + 1024), torch.nan)
    memory.tensor = wide[:, :2048].view(memory.tensor.shape).zero_()
    engine = twins.engine(memory)
    [sequence] = engine.add(prompt(50), Sampling(max_tokens=NEW))
    run(engine)
    twins.oracle.check(prompt(50), sequence.new_tokens, NEW_MAX)
    assert wide[:, 2048:].isnan().all()
    engine.check()


def test_identical_prompts_in_flight_are_computed_once(twins: Twins) -> None:
    """The second waits for the first's blocks, also when it arrives in the middle of them; a third shares a part."""
    engine = twins.engine(PrivateMemory(twins.layout, 64), chunk_tokens=16)
    sequences = engine.add(prompt(100), Sampling(max_tokens=NEW))
    engine.step()
    engine.step()
    sequences += engine.add(prompt(100), Sampling(max_tokens=NEW))
    sequences += engine.add(prompt(100)[:50] + prompt(20, seed=3), Sampling(max_tokens=NEW))
    run(engine)
    assert engine.scheduler.counts.prefill_tokens == 100 + 4 + 22
    for sequence in sequences:
        twins.oracle.check(sequence.tokens[: sequence.prompt_tokens], sequence.new_tokens, NEW_MAX)
    engine.check()


def test_who_waits_for_an_aborted_prefill_computes_it(twins: Twins) -> None:
    """The first is aborted half-way: the second shares what was done and computes the rest."""
    engine = twins.engine(PrivateMemory(twins.layout, 64), chunk_tokens=16)
    first = engine.add(prompt(100), Sampling(max_tokens=NEW))
    [second] = engine.add(prompt(100), Sampling(max_tokens=NEW))
    for _ in range(4):
        engine.step()
    engine.abort(first)
    run(engine)
    assert second.hit_tokens == 64
    twins.oracle.check(prompt(100), second.new_tokens, NEW_MAX)
    engine.check()


def test_a_slow_load_does_not_stall_the_batch(slow: tuple[Engine, SlowClient], twins: Twins) -> None:
    """While one request waits for its blocks, others arrive, run and end; no step waits."""
    engine, client = slow
    [waiting] = engine.add(prompt(160), Sampling(max_tokens=NEW))
    [quick] = engine.add(prompt(30, seed=2), Sampling(max_tokens=NEW))
    engine.scheduler.prefill_tokens_per_second = 0.0
    for _ in range(1000):
        engine.step()
        engine.scheduler.prefill_tokens_per_second = 0.0  # not measured yet: every load is worth its time
        if quick.reason:
            break
    assert quick.reason == "length" and not waiting.new_tokens
    client.go.set()
    run(engine)
    assert waiting.hit_tokens == 144
    twins.oracle.check(prompt(160), waiting.new_tokens, NEW_MAX)
    assert engine.scheduler.counts.steps_waited == 0


def test_a_hit_runs_in_the_step_that_it_arrived_before(slow: tuple[Engine, SlowClient], twins: Twins) -> None:
    """While another decodes, blocks that take a moment make a step a moment longer, and not the request a step later."""
    engine, client = slow
    client.go.set()
    [other] = engine.add(prompt(30, seed=2), Sampling(max_tokens=NEW))
    while not other.new_tokens:
        engine.step()
    [sequence] = engine.add(prompt(160), Sampling(max_tokens=NEW))
    engine.pause_seconds = 30.0
    engine.step()
    assert (sequence.hit_tokens, len(sequence.new_tokens)) == (144, 1)
    run(engine)
    twins.oracle.check(prompt(160), sequence.new_tokens, NEW_MAX)


def test_a_slow_load_is_waited_for_once(slow: tuple[Engine, SlowClient], twins: Twins) -> None:
    """The first step after a request has come waits a little for its blocks; the next do not, though it has none yet."""
    engine, _ = slow
    [other] = engine.add(prompt(30, seed=2), Sampling(max_tokens=NEW))
    while not other.new_tokens:
        engine.step()
    [sequence] = engine.add(prompt(160), Sampling(max_tokens=NEW))
    wait, waits = engine.memory.wait, []
    engine.memory.wait = lambda seconds: [waits.append(seconds), wait(seconds)]
    for waited in (True, False, False):
        engine.pause_seconds = 0.05
        engine.step()
        assert bool(waits) == waited
        assert all(seconds <= 0.05 for seconds in waits)
        waits.clear()
    assert len(other.new_tokens) == 4 and not sequence.new_tokens
    engine.memory.wait = wait


def test_a_load_that_takes_longer_than_computing_is_given_up(slow: tuple[Engine, SlowClient], twins: Twins) -> None:
    """The request waits as long as computing would take, and then computes; the copy under way harms nobody."""
    engine, _ = slow
    engine.scheduler.prefill_tokens_per_second = 144 / 0.2
    [sequence] = engine.add(prompt(160), Sampling(max_tokens=NEW))
    began = time.monotonic()
    while not sequence.reason:
        engine.step()
    assert time.monotonic() - began >= 0.2
    assert (sequence.hit_tokens, engine.scheduler.counts.loads_declined) == (0, 1)
    twins.oracle.check(prompt(160), sequence.new_tokens, NEW_MAX)


def test_a_load_that_is_known_to_be_slow_is_not_begun(slow: tuple[Engine, SlowClient], twins: Twins) -> None:
    """Measured bandwidth decides at once, and is measured again after a while."""
    engine, client = slow
    client.go.set()
    engine.scheduler.prefill_tokens_per_second = 1e4
    declined = 0
    for _ in range(40):
        engine.memory.speeds.measured("memory", 1, 1.0, whole=True)
        [sequence] = engine.add(prompt(160), Sampling(max_tokens=1))
        run(engine)
        declined += sequence.hit_tokens == 0
    assert declined >= 20
    for _ in range(60):
        [sequence] = engine.add(prompt(160), Sampling(max_tokens=1))
        run(engine)
    assert sequence.hit_tokens == 144, "the estimate ages until it is tried again"


def test_a_preempted_sequence_comes_back_from_the_cache(twins: Twins) -> None:
    """Two answers outgrow the pages: the younger gives way, was stored, and is loaded instead of computed."""
    cache = DictionaryCache()
    engine = twins.engine(CopyingMemory(twins.layout, 14, cache.connect(model="m", layout=twins.layout)))
    sequences = [engine.add(prompt(90, seed=seed), Sampling(max_tokens=24))[0] for seed in (1, 2)]
    run(engine)
    counts = engine.scheduler.counts
    assert counts.preemptions == 1
    assert counts.prefill_tokens <= 180 + 2 * 16, "but for the last block nothing was computed twice"
    for sequence in sequences:
        twins.oracle.check(sequence.tokens[:90], sequence.new_tokens, NEW_MAX)
    engine.check()
    engine.close()


def test_pages_stay_until_they_are_stored(twins: Twins) -> None:
    """A request ends while its blocks are being copied: their pages are not given to anybody else before."""
    cache, go = DictionaryCache(), Event()
    client = cache.connect(model="m", layout=twins.layout)
    store = client.store
    client.store = lambda *given: (go.wait(30), store(*given))
    engine = twins.engine(CopyingMemory(twins.layout, 10, client))
    engine.add(prompt(100), Sampling(max_tokens=NEW))
    while not engine.scheduler.counts.sequences:
        engine.step()
    [second] = engine.add(prompt(100, seed=2), Sampling(max_tokens=NEW))
    for _ in range(20):
        engine.step()
    assert not second.new_tokens, "its pages are still being copied from"
    go.set()
    run(engine)
    engine.check()
    assert {name for _, name in cache.blocks} >= {chain(prompt(16 * block), 16)[-32:] for block in range(1, 7)}
    twins.oracle.check(prompt(100, seed=2), second.new_tokens, NEW_MAX)
    engine.close()


def test_no_decode_step_waits_for_a_page(twins: Twins) -> None:
    """Twelve sequences with room for all: pages are there before they are needed, and none stays afterwards."""
    engine = twins.engine(PrivateMemory(twins.layout, 100))
    for seed in range(12):
        engine.add(prompt(20 + seed, seed=seed), Sampling(max_tokens=60))
    asked = []
    reserve = engine.memory.reserve
    engine.memory.reserve = lambda count, urgent: (asked.append(count), reserve(count, urgent))[1]
    run(engine)
    assert engine.scheduler.counts.steps_waited == 0
    assert len(asked) < engine.scheduler.counts.steps / 2, "reserved in batches"
    engine.check()


def test_a_short_prompt_overtakes_the_rest_of_a_long_one(twins: Twins) -> None:
    """Half of each step's prompt tokens are the oldest's, the other half go to who has least left."""
    engine = twins.engine(PrivateMemory(twins.layout, 100), chunk_tokens=32)
    [long] = engine.add(prompt(600), Sampling(max_tokens=4))
    [short] = engine.add(prompt(30, seed=2), Sampling(max_tokens=4))
    run(engine)
    assert short.seconds["first"] < long.seconds["first"]
    assert engine.scheduler.counts.steps <= 600 // 16
    engine.check()


def test_the_end_of_a_turn_is_told_to_memory(twins: Twins) -> None:
    """The last full block, the reason, the conversation and for how long to keep it; the block is there already."""
    cache = DictionaryCache()
    engine = twins.engine(CopyingMemory(twins.layout, 20, cache.connect(model="m", layout=twins.layout)))
    engine.add(prompt(20), Sampling(max_tokens=4), hints=Hints("c1", ttl_seconds=60, priority=3))
    aborted = engine.add(prompt(20, seed=2), Sampling(max_tokens=4), hints=Hints("c2"))
    while not aborted[0].new_tokens:
        engine.step()
    engine.abort(aborted)
    engine.add(prompt(20), Sampling(max_tokens=40, stop_tokens=tuple(range(128))))
    run(engine)
    engine.close()
    first, second = (chain(prompt(16, seed=seed), 16) for seed in (1, 2))
    assert set(cache.turns) == {(second, "abort", "c2"), (first, "stop", None), (first, "length", "c1")}
    assert len(cache.turns) == 3
    assert cache.kept == [(first, 60, 3)]
    assert {name for _, name in cache.blocks} == {first, second}


def test_loaded_blocks_are_the_stored_ones(twins: Twins) -> None:
    """A copy from the cache is exact, whatever page it lands in."""
    cache = DictionaryCache()
    client = cache.connect(model="m", layout=twins.layout)
    memory = CopyingMemory(twins.layout, 8, client)
    names = chain(prompt(64), 16)
    blocks = np.random.default_rng(1).random((4, twins.layout.block_bytes // 8)).view(np.uint8)
    client.store(names, np.ascontiguousarray(blocks), [0, 1, 2, 3])
    found = memory.lookup(names)
    while not (found.done and found.ready == found.blocks):
        memory.wait(1)
        memory.poll()
    assert found.blocks == 4
    assert (memory.pool.bytes[list(found.pages)] == blocks).all()
    found.release()
    memory.check()
    memory.close()


def test_a_turn_that_ends_with_a_tool_call_says_so(twins: Twins) -> None:
    """The model's stop token after a call means that a result will come; after anything else the turn is over."""
    told = []
    for said in ("Let me see. <tool_call>{}</tool_call>", "No."):
        engine = Engine(twins.model, PrivateMemory(twins.layout, 20), Limits(), frozenset(range(128)))
        engine.memory.ended = lambda block, turn, hints: told.append(turn)
        [sequence] = engine.add(prompt(20), Sampling(), tokenizer=SimpleNamespace(decode=lambda *_, **__: ""))
        sequence.text.whole = said
        run(engine)
        engine.check()
    assert told == ["tool_use", "end_turn"]

"""What a decode step of a running engine takes while blocks move through tierd beside it, and what it takes alone.

Quiet and busy rounds take turns. The traffic is a thread of the engine's own process, as its loads and stores are: it stores
new chains and loads them again through the engine's client, between tierd's memory and pages of the same GPU, at a steady pace.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from statistics import median, quantiles
from threading import Event
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu.measure import DIM, HEADS, LAYERS, TOKENS, Machine, Result, against
from benchmarks.gpu.service import DEADLINE_SECONDS, Chains, pages_of, pools_of, seconds_of, serving
from tierd.client import Client
from tierd_engine.copying import CopyingMemory
from tierd_engine.llm import LLM
from tierd_engine.request import Sampling
from tierd_engine.sequence import Sequence

BYTES_PER_SECOND = 2 << 30
MOVED_SHARE_MIN = 0.95
"""Of these bytes a second, both directions together: with less the latencies say nothing."""
WORSE_MAX = 1.05
SEQUENCES, PROMPT_TOKENS, CHUNK_TOKENS = 16, 1024, 512
ROUNDS, STEPS, WARM_UP_STEPS = 10, 20, 20
"""Rounds of each kind, steps of a round, and steps before the first."""
CHAIN_BLOCKS, TIER_CHAINS = 16, 32
VOCABULARY = 4096


def decode_beside_traffic(machine: Machine) -> Iterator[Result]:
    """Median and 99th percentile of a step, alone and beside 2 GiB/s."""
    layers, sequences, rounds = machine.count(LAYERS), machine.count(SEQUENCES), machine.count(ROUNDS)
    prompt = machine.count(PROMPT_TOKENS // TOKENS) * TOKENS
    answer = sequences * prompt // CHUNK_TOKENS + WARM_UP_STEPS + (2 * rounds + 1) * STEPS
    pages, whole = sequences * -(-(prompt + answer) // TOKENS), pages_of(machine, layers, CHAIN_BLOCKS)
    engine = {"pages": pages, "dtype": "bfloat16", "device": machine.device, "chunk_tokens": CHUNK_TOKENS}
    seconds: dict[str, list[float]] = {"alone": [], "beside": []}
    with (
        model_of(machine, layers) as path,
        serving(TIER_CHAINS * whole.nbytes) as daemon,
        LLM(path, connect=partial(Client, daemon.socket, deadline_seconds=DEADLINE_SECONDS), **engine) as llm,
    ):
        traffic = Traffic(chains_of(llm, pools_of(machine, whole)["one run"]), machine)
        traffic.chains.fill(daemon)
        decoding = start(llm, sequences, prompt, answer)
        for _ in range(rounds):
            seconds["alone"] += [seconds_of(llm.engine.step) for _ in range(STEPS)]
            with traffic.moving():
                seconds["beside"] += [seconds_of(llm.engine.step) for _ in range(STEPS)]
        llm.engine.abort(decoding)
        llm.engine.settle()
        kv_bytes = sequences * prompt // TOKENS * llm.layout.block_bytes
    yield from traffic.results()
    yield from compared(seconds, kv_bytes)


def compared(seconds: dict[str, list[float]], kv_bytes: int) -> Iterator[Result]:
    """Latencies as results: a step that takes 5 % longer has a share of 95 %. Bytes are the KV of the prompts."""
    for name, of in {"median": median, "99th percentile": percentile_99}.items():
        alone = Result(f"decode step alone, {name}", kv_bytes, of(seconds["alone"]))
        yield alone
        title = f"decode step beside traffic through tierd, {name}"
        yield against(alone, title, kv_bytes, of(seconds["beside"]), 1 / WORSE_MAX)


def percentile_99(seconds: list[float]) -> float:
    """What one in a hundred exceeds."""
    return quantiles(seconds, n=100)[-1]


class Traffic:
    """Moves chains to tierd and back at a steady pace, in a thread of its own."""

    def __init__(self, chains: Chains, machine: Machine) -> None:
        self.chains = chains
        self.wanted = max(BYTES_PER_SECOND * machine.scale, 2.0 * chains.bytes)
        self._bytes, self._seconds = 0, 0.0

    def results(self) -> Iterator[Result]:
        """What moved beside the engine, against what should have."""
        wanted = Result(f"{self.wanted / 2**30:.3g} GiB/s", int(self.wanted), 1.0)
        yield against(wanted, "traffic beside the engine", self._bytes, self._seconds, MOVED_SHARE_MIN)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Traffic within, and none afterwards."""
        end = Event()
        with ThreadPoolExecutor(1, "traffic") as thread:
            running = thread.submit(self._move, end)
            try:
                yield
            finally:
                end.set()
            running.result()

    def _move(self, end: Event) -> None:
        began, moved = perf_counter(), 0
        while not end.is_set():
            for verb in ("store", "load"):
                self.chains.seconds(verb)
                moved += self.chains.bytes
                end.wait(max(0.0, began + moved / self.wanted - perf_counter()))
        self._bytes += moved
        self._seconds += max(perf_counter() - began, moved / self.wanted)


def chains_of(llm: LLM, pool: Any) -> Chains:
    """Chains that go through the engine's client, with the segments that it has registered."""
    assert llm.client and isinstance(llm.memory, CopyingMemory)
    if llm.memory.copies:
        pool.pins = llm.memory.copies.pins
    return Chains(llm.client, pool, np.arange(len(pool)))


def start(llm: LLM, sequences: int, prompt_tokens: int, answer_tokens: int) -> list[Sequence]:
    """Requests that all decode from now on, and have not ended after so many steps."""
    prompts = np.random.default_rng(2).integers(0, VOCABULARY, (sequences, prompt_tokens)).tolist()
    endless = Sampling(max_tokens=answer_tokens, ignore_eos=True)
    added = [sequence for prompt in prompts for sequence in llm.engine.add(prompt, endless)]
    while any(len(sequence.tokens) == sequence.prompt_tokens for sequence in added):
        llm.engine.step()
    for _ in range(WARM_UP_STEPS):
        llm.engine.step()
    return added


@contextmanager
def model_of(machine: Machine, layers: int) -> Iterator[str]:
    """The directory of a random Llama whose KV has the geometry of Llama 3 8B's; half a billion parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=machine.count(16) * 64,
        intermediate_size=machine.count(32) * 64,
        num_hidden_layers=layers,
        num_attention_heads=4 * HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=4096,
    )
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(machine.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        yield folder

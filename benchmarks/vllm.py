"""What tierd costs and gives vLLM on this machine: `python -m benchmarks.vllm scheduler|ttft`, after `make test-vllm`.

scheduler   the two calls that the scheduler's thread waits for, with 128k tokens in tierd
ttft        time to the first token of a prompt whose 2,000 tokens are computed, in vLLM's own cache, in tierd, or in files
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.daemon.harness import Daemon, settings
from tests.vllm.conftest import transfer
from tests.vllm.engine import Engine
from tierd.block import chain, split
from tierd.client import Client
from tierd.layout import Layout

PROMPT_TOKENS, BLOCK_TOKENS = 128 * 1024, 16
ROUNDS = 200
WORKERS = (1, 2, 4, 8)
"""That share a model, each with its namespace."""
SMOL = Path(".build/models/SmolLM2-135M-Instruct")
PREFIX_TOKENS, SMOL_BLOCK = 2016, 32
SMOL_TOKEN_BYTES = 30 * 2 * 3 * 64 * 4
"""Layers, keys and values, heads, numbers of a head, bytes."""


def main() -> None:
    """The command."""
    {"scheduler": scheduler, "ttft": ttft}[sys.argv[1]]()


def scheduler() -> None:
    """Look-ups of a long prompt, all of it cached, and steps in which nothing is to be done."""
    layout = Layout(1, 1, 64, "uint8", block_tokens=BLOCK_TOKENS, kv_parts=1)
    hashes = chain(list(range(PROMPT_TOKENS + 1)), BLOCK_TOKENS)
    blocks = len(hashes) // 32
    with daemon(cpu_bytes=512 << 20, cpu_segment_bytes=16 << 20) as served:
        pool = np.zeros((blocks, layout.block_bytes), np.uint8)
        parts = [Client(served.socket, model=f"bench {rank}", layout=layout) for rank in range(max(WORKERS))]
        for client in parts:
            assert client.store(hashes, pool, np.arange(blocks)).stored == blocks
        for workers in WORKERS:
            report(f"look-up of 128k tokens, all cached, {workers} workers", lookups(parts[:workers], hashes, blocks))
        for count in (8, 64, 256):
            report(f"step of {count} requests without work", steps(parts[:1], hashes, blocks, count))
        for client in parts:
            client.close()


def side_of(clients: list[Client]) -> Any:
    """The connector's side in the scheduler."""
    from tierd_engine.connectors.vllm.scheduler import SchedulerSide
    from tierd_engine.connectors.vllm.shards import Shards

    return SchedulerSide(Shards(clients), BLOCK_TOKENS, True, True, True, 1 << 20)


def lookups(clients: list[Client], hashes: bytes, blocks: int) -> list[float]:
    """Seconds that the scheduler waits, each time for all of the prompt."""
    side, found = side_of(clients), []
    for number in range(ROUNDS):
        request = running(str(number), hashes, computed=0)
        found.append(seconds(lambda: side.match(request, 0)))  # noqa: B023
        assert side._requests[str(number)].offered == blocks
        side.finished(request, [])
    return found


def steps(clients: list[Client], hashes: bytes, blocks: int, count: int) -> list[float]:
    """Seconds of a step of so many requests of which everything is stored."""
    side = side_of(clients)
    requests = [running(f"d{number}", hashes, computed=PROMPT_TOKENS + 3) for number in range(count)]
    for request in requests:
        side._track(request).stored = blocks
    output = SimpleNamespace(num_scheduled_tokens={request.request_id: 1 for request in requests})
    return [seconds(lambda: side.plan(output)) for _ in range(ROUNDS)]


def ttft() -> None:
    """SmolLM2 in fp32; every figure is of prompts of their own, each with one token to say.

    Every prompt is asked for twice: the second time it is in vLLM's own cache. Pages are for five prompts, so that the second
    round of a life finds pages that were used before, and no prompt of the first round.
    """
    import random

    from tierd_engine.model import write_safetensors

    prompts = [random.Random(seed).choices(range(1000, 40000), k=PREFIX_TOKENS + 8) for seed in range(6)]
    with tempfile.TemporaryDirectory(prefix="tierd-", dir="/tmp") as folder, daemon(cpu_bytes=2 << 30) as served:
        model = Path(folder, "model")
        write_safetensors(SMOL, model)
        arguments: dict[str, Any] = {
            "model": str(model),
            "dtype": "float32",
            "block_size": SMOL_BLOCK,
            "max_model_len": 4096,
            "max_num_seqs": 1,
            "max_num_batched_tokens": 4096,
            "kv_cache_memory_bytes": 512 << 20,
            "enforce_eager": True,
        }
        files = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": f"{folder}/files"},
        }
        connectors = {"tierd": transfer(served.socket), "ExampleConnector": files}
        wanted = sys.argv[2:] or list(connectors)
        for name in wanted:
            for life, rounds in (("computed", 1), ("loaded", 3)):
                with Engine(Path(folder, "log"), apart=True, **arguments, kv_transfer_config=connectors[name]) as engine:
                    engine.run([list(range(2, 40))])  # what is set up with the first request
                    for number in range(1, rounds + 1):
                        answers = [(engine.run([prompt]), engine.run([prompt])) for prompt in prompts]
                        for what, each in zip((life, "vLLM's own cache"), zip(*answers, strict=True), strict=True):
                            cached = {answer["cached"][0] for answer in each}
                            report(f"{name}, round {number}: {what}, cached {cached}", [answer["seconds"] for answer in each])
        if blocks := served.status()["tiers"]["cpu"]["slots"].get("ready", 0) // len(prompts):
            report(f"memcpy of {blocks} blocks", memcpys(blocks))


def memcpys(blocks: int) -> list[float]:
    """The time that copying so many blocks takes by one memcpy, in memory that was touched before and is in no cache."""
    source, target = (np.ones((blocks, SMOL_BLOCK * SMOL_TOKEN_BYTES), np.uint8) for _ in range(2))
    return [seconds(lambda: np.copyto(target, source)) for _ in range(20)]


class daemon:  # noqa: N801
    """A daemon of its own in a folder that goes with it."""

    def __init__(self, **values: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tierd-", dir="/tmp")
        flags = settings(**{"nvme_bytes": 4 << 30, "cpu_huge_pages": "off", **values})
        self._daemon = Daemon(Path(self._folder.name), flags)

    def __enter__(self) -> Daemon:
        return self._daemon.start()

    def __exit__(self, *_: object) -> None:
        self._daemon.end()
        self._folder.cleanup()


def running(name: str, hashes: bytes, computed: int) -> Any:
    """A request as the connector sees it."""
    blocks = list(split(hashes))
    tokens = len(blocks) * BLOCK_TOKENS + 4
    return SimpleNamespace(
        request_id=name,
        block_hashes=blocks,
        num_tokens=tokens,
        num_computed_tokens=computed,
        kv_transfer_params=None,
        skip_reading_prefix_cache=False,
    )


def seconds(call: Callable[[], object]) -> float:
    """How long a call took."""
    began = perf_counter()
    call()
    return perf_counter() - began


def report(what: str, found: list[float]) -> None:
    """Median and 99th percentile, in microseconds."""
    ordered = sorted(found)
    print(f"{what}: p50 {statistics.median(found) * 1e6:,.0f} us, p99 {ordered[int(len(ordered) * 0.99) - 1] * 1e6:,.0f} us")


if __name__ == "__main__":
    main()

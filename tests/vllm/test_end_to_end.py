"""vLLM with tierd, from process to process: the same tokens with the same probabilities, computed or loaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.conftest import Start
from tests.daemon.harness import Daemon
from tests.vllm.conftest import BLOCK_TOKENS, transfer
from tests.vllm.server import Server
from tierd.clock import monotonic_seconds

pytestmark = pytest.mark.timeout(600)
Begin = Callable[..., Any]

MEBI = 1 << 20


ROOM = {"cpu_bytes": 64 * MEBI, "cpu_segment_bytes": 8 * MEBI, "nvme_bytes": 64 * MEBI, "nvme_segment_bytes": 8 * MEBI}
SMOL = Path(".build/models/SmolLM2-135M-Instruct")
ONE = {"max_num_seqs": 1}
"""One prompt at a time, since a sum depends on the shape of the batch that it is computed in."""


def prompt(seed: int, tokens: int) -> list[int]:
    """Token ids that no other seed has in the same order."""
    return random.Random(seed).choices(range(512), k=tokens)


def wait_stored(daemon: Daemon, blocks: int) -> None:
    """An answer does not wait for what is stored of it."""
    daemon.wait_until(lambda status: status["tiers"]["cpu"]["slots"].get("ready", 0) >= blocks)


def test_a_second_engine_process_says_the_same_without_computing(start: Start, engine: Begin) -> None:
    """What it loads is what the first one's own prefix cache has: log-probabilities differ by 0.0."""
    daemon = start(**ROOM)
    prompts = [prompt(seed, 20 * BLOCK_TOKENS + 7) for seed in range(3)]
    first = engine(daemon.socket, arguments=ONE)
    cold = first.run(prompts, max_tokens=8)
    assert cold["cached"] == [0, 0, 0]
    own = first.run(prompts, max_tokens=8)
    assert own["cached"] == [20 * BLOCK_TOKENS] * 3
    wait_stored(daemon, 3 * 20)
    first.end()
    loaded = engine(daemon.socket, arguments=ONE).run(prompts, max_tokens=8)
    assert loaded["cached"] == [20 * BLOCK_TOKENS] * 3
    assert loaded["tokens"] == own["tokens"] == cold["tokens"]
    assert loaded["logprobs"] == own["logprobs"]


def test_two_engines_share_and_a_restarted_daemon_hits(start: Start, engine: Begin) -> None:
    """What one engine computed the other loads while both run; after kill -9 of the daemon it comes from disk."""
    daemon = start(**ROOM)
    one, other = engine(daemon.socket, arguments=ONE), engine(daemon.socket, arguments=ONE)
    text = prompt(11, 12 * BLOCK_TOKENS + 3)
    computed = one.run([text], max_tokens=4)
    wait_stored(daemon, 12)
    shared = other.run([text], max_tokens=4)
    assert (computed["cached"], shared["cached"]) == ([0], [12 * BLOCK_TOKENS])
    assert shared["tokens"] == computed["tokens"]
    other.end()
    daemon.ask("sync")
    daemon.kill()
    daemon.start()
    read = engine(daemon.socket, arguments=ONE).run([text], max_tokens=4)
    assert read["cached"] == [12 * BLOCK_TOKENS]
    assert (read["tokens"], read["logprobs"]) == (shared["tokens"], shared["logprobs"])


def test_a_real_model_says_the_same_from_tierd(start: Start, engine: Begin, tmp_path: Path) -> None:
    """SmolLM2 in fp32: what a second process loads differs by 0.0 from what the first one's own cache has."""
    from tierd_engine.model import write_safetensors

    daemon = start(cpu_bytes=64 * MEBI, cpu_segment_bytes=16 * MEBI, nvme_bytes=64 * MEBI, nvme_segment_bytes=16 * MEBI)
    write_safetensors(SMOL, tmp_path / "smol")
    given = {**ONE, "model": str(tmp_path / "smol"), "max_model_len": 1024}
    text = random.Random(60).choices(range(1000, 40000), k=10 * BLOCK_TOKENS + 3)
    first = engine(daemon.socket, arguments=given)
    cold, own = (first.run([text], max_tokens=8) for _ in range(2))
    wait_stored(daemon, 10)
    first.end()
    loaded = engine(daemon.socket, arguments=given).run([text], max_tokens=8)
    assert (cold["cached"], own["cached"], loaded["cached"]) == ([0], [10 * BLOCK_TOKENS], [10 * BLOCK_TOKENS])
    assert loaded["tokens"] == own["tokens"] == cold["tokens"]
    assert loaded["logprobs"] == own["logprobs"]


def test_two_workers_share_a_model_and_load_what_two_others_stored(start: Start, engine: Begin) -> None:
    """Tensor parallelism: each worker copies its part, and the same is said with the same probabilities."""
    daemon = start(**ROOM)
    text = prompt(50, 12 * BLOCK_TOKENS + 3)
    first = engine(daemon.socket, arguments={**ONE, "tensor_parallel_size": 2})
    cold, own = (first.run([text], max_tokens=4) for _ in range(2))
    wait_stored(daemon, 2 * 12)
    first.end()
    loaded = engine(daemon.socket, arguments={**ONE, "tensor_parallel_size": 2}).run([text], max_tokens=4)
    assert (cold["cached"], own["cached"], loaded["cached"]) == ([0], [12 * BLOCK_TOKENS], [12 * BLOCK_TOKENS])
    assert loaded["tokens"] == own["tokens"] == cold["tokens"]
    assert loaded["logprobs"] == own["logprobs"]


def test_a_daemon_killed_under_a_running_engine_fails_no_request(start: Start, engine: Begin) -> None:
    """kill -9 with requests in every state: all end as they should, and hits return without an engine restart."""
    daemon = start(**ROOM)
    running = engine(daemon.socket, arguments={"enable_prefix_caching": True, "kv_cache_memory_bytes": 5 * MEBI})
    plain = engine(None, arguments={"kv_cache_memory_bytes": 64 * MEBI})
    prompts = [prompt(seed, 12 * BLOCK_TOKENS + 3) for seed in range(20, 36)]
    expected = plain.run(prompts, max_tokens=24)["tokens"]
    assert running.run(prompts, max_tokens=24)["tokens"] == expected
    again = running.run(prompts, max_tokens=24)
    assert again["tokens"] == expected and sum(again["cached"]) > 8 * 12 * BLOCK_TOKENS, (
        "5 MiB hold 6 prompts: these are hits of tierd"
    )
    for _ in range(3):
        running.ask(prompts, max_tokens=24)
        daemon.kill()
        daemon.start()
        answer = running.answer()
        assert answer["tokens"] == expected and set(answer["reasons"]) == {"length"}
    deadline = monotonic_seconds() + 60
    while sum(running.run(prompts, max_tokens=24)["cached"]) <= 8 * 12 * BLOCK_TOKENS:
        assert monotonic_seconds() < deadline, "no hits after the daemon is back"


def test_a_server_tells_what_came_from_tierd(start: Start, random_model: Path, tmp_path: Path) -> None:
    """One option; after a restart of the server, its usage and its /metrics say what was not computed."""
    daemon = start(**ROOM)
    text = prompt(40, 10 * BLOCK_TOKENS + 1)
    for life, cached in enumerate((0, 10 * BLOCK_TOKENS)):
        with Server(random_model, tmp_path / f"server{life}", transfer(daemon.socket)) as server:
            answer = server.complete(text)
            wait_stored(daemon, 10)
            assert (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0) == cached
            metrics = server.metrics()
            loaded = sum(value for name, value in metrics.items() if name.startswith("vllm:tierd_load_blocks_total"))
            assert loaded == cached // BLOCK_TOKENS
            assert any(name.startswith("vllm:tierd_lookups_total") for name in metrics)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"kv_load_failure_policy": "fail"}, '"kv_load_failure_policy": "recompute"'),
        ({"kv_connector_extra_config": {"sockt": "x"}}, "unknown key 'sockt'; known are"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(
    random_model: Path, tmp_path: Path, change: dict[str, Any], remedy: str
) -> None:
    """Before anything is served, in words that say what to change."""
    server = Server(random_model, tmp_path / "server", transfer(tmp_path / "none.sock") | change)
    assert server.process.wait(120) != 0
    assert remedy in server.log.read_text()

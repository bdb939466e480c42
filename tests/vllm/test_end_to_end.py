"""vLLM with tierd, from process to process: the same tokens with the same probabilities, computed or loaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.daemon.conftest import Start
from tests.vllm.conftest import BLOCK_TOKENS

Begin = Callable[..., Any]

MEBI = 1 << 20


ROOM = {"cpu_bytes": 64 * MEBI, "cpu_segment_bytes": 8 * MEBI, "nvme_bytes": 64 * MEBI, "nvme_segment_bytes": 8 * MEBI}
ONE = {"max_num_seqs": 1}
"""One prompt at a time, since a sum depends on the shape of the batch that it is computed in."""


def prompt(seed: int, tokens: int) -> list[int]:
    """Token ids that no other seed has in the same order."""
    return random.Random(seed).choices(range(512), k=tokens)


def test_a_second_engine_process_says_the_same_without_computing(start: Start, engine: Begin) -> None:
    """What it loads is what the first one's own prefix cache has: log-probabilities differ by 0.0."""
    daemon = start(**ROOM)
    prompts = [prompt(seed, 20 * BLOCK_TOKENS + 7) for seed in range(3)]
    first = engine(daemon.socket, arguments=ONE)
    cold = first.run(prompts, max_tokens=8)
    assert cold["cached"] == [0, 0, 0]
    own = first.run(prompts, max_tokens=8)
    assert own["cached"] == [20 * BLOCK_TOKENS] * 3
    first.end()
    loaded = engine(daemon.socket, arguments=ONE).run(prompts, max_tokens=8)
    assert loaded["cached"] == [20 * BLOCK_TOKENS] * 3
    assert loaded["tokens"] == own["tokens"] == cold["tokens"]
    assert loaded["logprobs"] == own["logprobs"]

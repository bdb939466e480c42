"""The pinned path on a real GPU: blocks to a daemon's memory and back, and an engine's tokens through it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.daemon.harness import LAYOUT, Daemon, hashes_of
from tests.engine.conftest import llama, write_model  # noqa: F401
from tests.engine.test_engine_tokens import prompt
from tierd.client import Client
from tierd_engine.device import device_pages, views_of
from tierd_engine.llm import LLM

BLOCKS = 20


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["one run", "staged"])
def test_blocks_of_a_gpu_come_back_as_they_were(daemon: Daemon, kind: str) -> None:
    """Stored, loaded to other pages, before and after the segments are registered; in one run a block and through staging."""
    shape = LAYOUT.kv_heads, LAYOUT.block_tokens, LAYOUT.head_dim
    numbers = torch.randn(2 * BLOCKS, LAYOUT.layers, 2, *shape, dtype=torch.float16, device="cuda")
    views = views_of(numbers) if kind == "one run" else [view.clone() for view in views_of(numbers)]
    pool = device_pages(views)
    with Client(daemon.socket, model="model", layout=LAYOUT, deadline_seconds=5) as client:
        client.pin(pool.pins)
        for seed in range(5):
            hashes = hashes_of(seed, BLOCKS)
            for view in views:
                view.normal_()
            assert client.store(hashes, pool.now(), range(BLOCKS)).stored == BLOCKS
            assert client.load(hashes, pool.now(), range(BLOCKS, 2 * BLOCKS)) == BLOCKS
            assert all(torch.equal(view[:BLOCKS], view[BLOCKS:]) for view in views)
        assert client.statistics["failures"] == {} and client.statistics["pins_refused"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_on_a_gpu_says_the_same_tokens_with_a_daemon(daemon: Daemon, llama: Path, dtype: str) -> None:  # noqa: F811
    """Cold, and warm in another engine, whose pages come from the daemon's memory."""
    answers = []
    for _ in range(2):
        with LLM(llama, pages=48, dtype=dtype, device="cuda", chunk_tokens=96, connect=partial(Client, daemon.socket)) as llm:
            answers.append(llm.generate(prompt(100), 20))
            llm.check()
    assert [answer.hit_tokens for answer in answers] == [0, 96]
    assert answers[0].tokens == answers[1].tokens

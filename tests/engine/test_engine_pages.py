"""Pages are never lost, never given twice, and look to a client exactly as the layout says."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tierd.block import chain
from tierd.errors import Busy, Invalid
from tierd.layout import Layout
from tierd_engine.llm import LLM
from tierd_engine.pages import PagePool
from tierd_engine.request import Sampling
from tierd_engine.sequence import Sequence

LAYOUT = Layout(layers=2, kv_heads=3, head_dim=4, dtype="float32")


def test_a_random_life_of_users_loses_no_page() -> None:
    """Users that take, share and give back in any order leave every page free, and no free page has a user."""
    pool, alive, choose = PagePool(LAYOUT, 40), [], random.Random(7)
    for _ in range(500):
        if alive and choose.random() < 0.5:
            pool.release(alive.pop(choose.randrange(len(alive))))
        elif alive and choose.random() < 0.5:
            alive.append(alive[choose.randrange(len(alive))])
            pool.share(alive[-1])
        else:
            alive.append(pool.allocate(min(choose.randrange(10), pool.free_count)))
        assert len({page for pages in alive for page in pages}) == pool.count - pool.free_count
        pool.check()
    for pages in alive:
        pool.release(pages)
    assert pool.free_count == 40


def test_an_exhausted_pool_takes_nothing_and_says_what_is_missing() -> None:
    """All or none: a failed allocation leaves the free pages free."""
    pool = PagePool(LAYOUT, 4)
    pool.allocate(3)
    with pytest.raises(Busy, match="2 wanted, 1 of 4 free"):
        pool.allocate(2)
    assert pool.free_count == 1


def test_a_page_given_back_twice_is_a_bug_that_shows() -> None:
    """The second release raises instead of putting the page on the free list again."""
    pool = PagePool(LAYOUT, 2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(KeyError):
        pool.release(pages)


def test_a_failing_request_gives_its_pages_back(llama: Path, cache) -> None:
    """An exception in the middle of a generation leaks nothing."""
    with LLM(llama, pages=8, connect=cache.connect) as llm:
        llm.generate([1] * 40, 4)
        llm.engine.runner.run = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            llm.generate([[3] * 40, [4] * 20], 4)
        llm.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_page_is_one_block_byte_for_byte(dtype: str) -> None:
    """What attention calls [page, layer, K/V, head, token, dim] is to a client one contiguous row."""
    layout = Layout(layers=2, kv_heads=3, head_dim=4, dtype=dtype)
    pool = PagePool(layout, 5)
    pool.tensor[3] = 1.0
    assert pool.bytes.shape == (5, layout.block_bytes)
    assert [bool(page.any()) for page in pool.bytes] == [False, False, False, True, False]
    pool.bytes[3] = 0
    assert not pool.tensor.any(), "the two views share memory"
    one = torch.arange(pool.tensor[1].numel()).to(pool.tensor.dtype)
    pool.tensor[1] = one.view(pool.tensor.shape[1:])
    assert np.array_equal(pool.bytes[1], one.view(torch.uint8).numpy())


def test_hashes_grow_with_the_tokens() -> None:
    """Hashing a sequence piece by piece names its blocks as hashing it at once does."""
    sequence = Sequence(range(20), 16, Sampling())
    for token in range(20, 100):
        sequence.hashes()
        sequence.tokens.append(token)
    assert sequence.hashes() == chain(range(100), 16)
    assert sequence.name(-1) == bytes(32)
    assert sequence.name(1) == chain(range(32), 16)[-32:]


@pytest.mark.parametrize(("dtype", "pages"), [("float16", 4), ("float32", 0)])
def test_a_pool_that_cannot_work_is_refused(dtype: str, pages: int) -> None:
    """A dtype the engine does not compute with, and no pages at all."""
    with pytest.raises(Invalid, match="pages"):
        PagePool(Layout(layers=1, kv_heads=1, head_dim=4, dtype=dtype), pages)

"""SGLang's host memory in every layout that tierd copies, and what is refused because it would be copied wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sglang", reason="SGLang is not installed in this environment: make test-sglang")

from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

from tests.sglang.house import PAGE_TOKENS, POOL_PAGES, host_pool
from tierd_engine.connectors.sglang.pages import host_pages, page_numbers

SLOT_BYTES = 4096


@pytest.mark.parametrize(
    ("kind", "layout", "together"),
    [
        ("mha", "layer_first", 1),
        ("mha", "page_first", 1),
        ("mha", "page_first_direct", 1),
        ("mha", "page_head", 1),
        ("mla", "layer_first", 1),
        ("mla", "page_first", 1),
        ("mla", "page_first_direct", 1),
        ("asymmetric", "page_first", 2),
        ("asymmetric", "page_first_direct", 2),
    ],
)
def test_pages_go_to_slots_and_back(kind: str, layout: str, together: int) -> None:
    """Shuffled, and to other pages than they came from; nothing beside them is touched; keys and values are copied as one."""
    pool = host_pool(layout, kind)
    buffers = pool.kv_buffer if isinstance(pool.kv_buffer, tuple) else (pool.kv_buffer,)
    random = torch.Generator().manual_seed(1)
    for buffer in buffers:
        buffer.view(torch.uint8).random_(0, 0x40, generator=random)
    pages = host_pages(pool)
    assert (len(pages), len(pages._parts)) == (pool.page_num, together)
    assert pages.block_bytes == pool.size_per_token * PAGE_TOKENS
    before = [content(pool, page) for page in range(POOL_PAGES)]
    rng = np.random.default_rng(1)
    sources, indexes, others = (rng.permutation(POOL_PAGES)[:37] for _ in range(3))
    slots = np.full((POOL_PAGES, SLOT_BYTES), 0xEE, np.uint8)
    pages.drain(sources, slots, indexes)
    assert (slots[:, pages.block_bytes :] == 0xEE).all() and (np.delete(slots, indexes, 0) == 0xEE).all()
    pages.fill(others, slots, indexes)
    came = dict(zip(others.tolist(), sources.tolist(), strict=True))
    for page in range(POOL_PAGES):
        assert content(pool, page) == before[came.get(page, page)]


def content(pool: Any, page: int) -> bytes:
    """A page as SGLang itself finds it."""
    addresses, sizes = pool.get_page_buffer_meta(torch.arange(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS))
    buffers = pool.kv_buffer if isinstance(pool.kv_buffer, tuple) else (pool.kv_buffer,)
    found = b""
    for address, size in zip(addresses, sizes, strict=True):
        [buffer] = [each for each in buffers if 0 <= address - each.data_ptr() < each.nbytes]
        first = address - buffer.data_ptr()
        found += buffer.flatten().view(torch.uint8)[first : first + size].numpy().tobytes()
    return found


def test_memory_that_cannot_be_copied_right_is_refused() -> None:
    """A pool without memory, one whose pages say that they are elsewhere, and one whose pages have no common distance."""
    with pytest.raises(ValueError, match=r"TierdHiCache: the host pool, LogicalHostPool .* has no memory of its own"):
        host_pages(LogicalHostPool(64, PAGE_TOKENS))
    pool = host_pool("page_first")
    elsewhere = SimpleNamespace(layout="page_first", page_num=POOL_PAGES, page_size=PAGE_TOKENS, kv_buffer=torch.zeros(4))
    elsewhere.get_page_buffer_meta = pool.get_page_buffer_meta
    with pytest.raises(ValueError, match="outside of its buffer"):
        host_pages(elsewhere)
    uneven = SimpleNamespace(layout="page_first", page_num=3, page_size=PAGE_TOKENS, kv_buffer=pool.kv_buffer)
    uneven.get_page_buffer_meta = lambda indices: ([pool.kv_buffer.data_ptr() + int(indices[0]) ** 2], [64])
    with pytest.raises(ValueError, match="at different distances"):
        host_pages(uneven)


def test_only_whole_pages_are_copied() -> None:
    """Indices that begin within a page, or do not follow each other, would be other tokens than their key says."""
    whole = torch.cat([torch.arange(8, 12), torch.arange(0, 4)])
    assert page_numbers(whole, PAGE_TOKENS, 2).tolist() == [2, 0]
    for wrong in (torch.arange(1, 9), torch.tensor([0, 1, 3, 2]), torch.arange(3)):
        with pytest.raises(ValueError, match=r"do not begin at pages|cannot reshape"):
            page_numbers(wrong, PAGE_TOKENS, max(1, len(wrong) // PAGE_TOKENS))

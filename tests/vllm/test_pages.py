"""vLLM's pages, in every order that it lays them out, and what is refused because it would be copied wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tierd_engine.connectors.vllm.pages import LayerPages

BLOCKS, LAYERS, HEADS, TOKENS, WIDTH = 192, 3, 2, 32, 6
PAGE_BYTES = HEADS * TOKENS * WIDTH * 4
SLOT_BYTES = LAYERS * PAGE_BYTES + 512
NAMES = [f"layer{number}" for number in range(LAYERS)]


def layer_by_layer() -> list[torch.Tensor]:
    """LBHNC: what the CPU has."""
    return list(torch.zeros(LAYERS, BLOCKS, HEADS, TOKENS, WIDTH))


def block_by_block() -> list[torch.Tensor]:
    """BLHNC: all layers of a block together."""
    return list(torch.zeros(BLOCKS, LAYERS, HEADS, TOKENS, WIDTH).unbind(1))


def tokens_before_heads() -> list[torch.Tensor]:
    """LBNHC: pages whose inner order is another one."""
    return [whole.transpose(1, 2) for whole in torch.zeros(LAYERS, BLOCKS, TOKENS, HEADS, WIDTH)]


def each_on_its_own() -> list[torch.Tensor]:
    """Layers that were not allocated together."""
    return [torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH) for _ in range(LAYERS)]


def in_no_order() -> list[torch.Tensor]:
    """Layers that are at no one distance from each other."""
    whole = torch.zeros(LAYERS + 2, BLOCKS, HEADS, TOKENS, WIDTH)
    return [whole[0], whole[4], whole[1]]


def in_small_blocks() -> list[torch.Tensor]:
    """A kernel that counts in blocks of half the size."""
    return list(torch.zeros(LAYERS, BLOCKS * 2, HEADS, TOKENS // 2, WIDTH))


Make = Callable[[], list[torch.Tensor]]


@pytest.mark.parametrize(
    "make", [layer_by_layer, block_by_block, tokens_before_heads, each_on_its_own, in_no_order, in_small_blocks]
)
def test_pages_go_to_slots_and_back(make: Make) -> None:
    """Shuffled, and in other pages than they came from; nothing beside them is touched."""
    rng = np.random.default_rng(1)
    tensors = make()
    for tensor in tensors:
        tensor.copy_(torch.from_numpy(rng.random(tuple(tensor.shape), np.float32)))
    before = [tensor.reshape(BLOCKS, -1).clone() for tensor in tensors]
    pool = LayerPages(dict(zip(NAMES, tensors, strict=True)), NAMES, BLOCKS, PAGE_BYTES)
    assert len(pool) == BLOCKS and pool.block_bytes == LAYERS * PAGE_BYTES
    slots = np.full((BLOCKS, SLOT_BYTES), 0xEE, np.uint8)
    count = 71
    pages, indexes, others = (rng.permutation(BLOCKS)[:count] for _ in range(3))
    pool.drain(pages, slots, indexes)
    assert (slots[:, pool.block_bytes :] == 0xEE).all()
    assert (np.delete(slots, indexes, 0) == 0xEE).all()
    pool.fill(others, slots, indexes)
    for tensor, old in zip(tensors, before, strict=True):
        now, kept = tensor.reshape(BLOCKS, -1), np.setdiff1d(np.arange(BLOCKS), others)
        assert torch.equal(now[others], old[pages])
        assert torch.equal(now[kept], old[kept])


def test_layouts_differ_in_a_slot_only_by_the_order_within_a_page() -> None:
    """Layer by layer and block by block, a block has the same bytes."""
    rng = np.random.default_rng(2)
    values = torch.from_numpy(rng.random((LAYERS, BLOCKS, HEADS, TOKENS, WIDTH), np.float32))
    found = []
    for make in (layer_by_layer, block_by_block):
        tensors = make()
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        slots = np.zeros((BLOCKS, SLOT_BYTES), np.uint8)
        pool = LayerPages(dict(zip(NAMES, tensors, strict=True)), NAMES, BLOCKS, PAGE_BYTES)
        pool.drain(np.arange(BLOCKS), slots, np.arange(BLOCKS))
        found.append(slots)
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH, device="meta"), "main memory only"),
        (torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH + 2)[..., :WIDTH], "not contiguous"),
        (torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH + 1), "not 192 x"),
        (torch.zeros(HEADS, BLOCKS, TOKENS, WIDTH).transpose(0, 1), "not contiguous"),
    ],
)
def test_pages_that_are_not_one_run_of_bytes_are_refused(tensor: torch.Tensor, why: str) -> None:
    """Also those on a device, of another size, and those in pieces."""
    with pytest.raises(ValueError, match=why):
        LayerPages({"layer": tensor}, ["layer"], BLOCKS, PAGE_BYTES)

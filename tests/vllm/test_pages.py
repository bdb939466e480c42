"""vLLM's pages, in every order that it lays them out, and what is refused because it would be copied wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor, compute_layout_strides
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from tierd_engine.connectors.vllm.pages import LayerPages, pages_of, runs_of, views_of

BLOCKS, LAYERS, HEADS, TOKENS, WIDTH = 192, 3, 2, 32, 6
PAGE_BYTES = HEADS * TOKENS * WIDTH * 4
SLOT_BYTES = LAYERS * PAGE_BYTES + 512
NAMES = [f"layer{number}" for number in range(LAYERS)]


def as_vllm(layout: KVCacheLayout, block_tokens: int = TOKENS) -> list[torch.Tensor]:
    """Layers as vLLM allocates them, in one of its layouts, with blocks of kernels that may be smaller than its own."""
    spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=HEADS, head_size=WIDTH // 2, dtype=torch.float32)
    assert spec.page_size_bytes == PAGE_BYTES
    whole_block = LAYERS * PAGE_BYTES if layout.is_block_outermost else None
    strides = compute_layout_strides(spec, BLOCKS, LAYERS, layout, fixed_strides=(None, whole_block, None, None, None))
    placed = KVCacheTensor(BLOCKS * LAYERS * PAGE_BYTES, NAMES, *strides[:2])
    group = KVCacheGroupSpec(NAMES, spec)
    views = allocate_kv_cache(KVCacheConfig(BLOCKS, [placed], [group]), torch.device("cpu"), layout, [block_tokens])
    return [views[name] for name in NAMES]


def each_on_its_own() -> list[torch.Tensor]:
    """Layers that were not allocated together."""
    return [torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH) for _ in range(LAYERS)]


def in_no_order() -> list[torch.Tensor]:
    """Layers that are at no one distance from each other."""
    whole = torch.zeros(LAYERS + 2, BLOCKS, HEADS, TOKENS, WIDTH)
    return [whole[0], whole[4], whole[1]]


def in_memory(tensors: list[torch.Tensor]) -> LayerPages:
    """The pages of layers on the CPU."""
    pool = pages_of(dict(zip(NAMES, tensors, strict=True)), NAMES, BLOCKS, PAGE_BYTES)
    assert isinstance(pool, LayerPages)
    return pool


def filled(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, NDArray[np.uint8]]:
    """Fill pages with numbers; these, `[layer, block, head, token, content]`, and the slots that they go to."""
    values = torch.from_numpy(np.random.default_rng(2).random((LAYERS, BLOCKS, HEADS, TOKENS, WIDTH), np.float32))
    for tensor, value in zip(tensors, values, strict=True):
        pieces = len(tensor) // BLOCKS
        tensor.copy_(value.unflatten(2, (pieces, -1)).movedim(2, 1).flatten(0, 1))
    slots = np.zeros((BLOCKS, SLOT_BYTES), np.uint8)
    in_memory(tensors).drain(np.arange(BLOCKS), slots, np.arange(BLOCKS))
    return values, slots


Make = Callable[[], list[torch.Tensor]]
AS_VLLM: list[Make] = [partial(as_vllm, layout) for layout in KVCacheLayout]
IN_SMALL_BLOCKS: list[Make] = [partial(as_vllm, layout, TOKENS // 2) for layout in (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC)]


@pytest.mark.parametrize("make", [*AS_VLLM, *IN_SMALL_BLOCKS, each_on_its_own, in_no_order])
def test_pages_go_to_slots_and_back(make: Make) -> None:
    """Shuffled, and in other pages than they came from; nothing beside them is touched."""
    rng = np.random.default_rng(1)
    tensors = make()
    for tensor in tensors:
        tensor.copy_(torch.from_numpy(rng.random(tuple(tensor.shape), np.float32)))
    before = [tensor.reshape(BLOCKS, -1).clone() for tensor in tensors]
    pool = in_memory(tensors)
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


@pytest.mark.parametrize("make", [*AS_VLLM, *IN_SMALL_BLOCKS])
def test_a_block_is_layers_of_heads_of_tokens_or_of_tokens_of_heads(make: Make) -> None:
    """As the layout's name says, and however blocks, layers and heads are mixed in memory, or split for kernels."""
    values, slots = filled(make())
    name = make.args[0].name  # type: ignore[attr-defined]
    ordered = values if name.index("H") < name.index("N") else values.transpose(2, 3)
    expected = ordered.movedim(1, 0).reshape(BLOCKS, -1).numpy().view(np.uint8)
    assert (slots[:, : LAYERS * PAGE_BYTES] == expected).all()


@pytest.mark.parametrize("make", [*AS_VLLM, *IN_SMALL_BLOCKS, each_on_its_own, in_no_order])
def test_kernels_copy_the_same_bytes(make: Make) -> None:
    """What a GPU's pages are given as: views that go together, of which the kernels' twins make the slots of main memory."""
    pytest.importorskip("triton")
    from tierd_kernels.pages import Pages, gather_twin, scatter_twin

    tensors = make()
    _, slots = filled(tensors)
    everything = torch.arange(BLOCKS)
    pages = Pages(views_of([run for tensor in tensors for run in runs_of("layer", tensor, BLOCKS, PAGE_BYTES)]), parts=1)
    gathered = torch.zeros(BLOCKS, SLOT_BYTES, dtype=torch.uint8)
    gather_twin(pages, everything, gathered, everything)
    assert (gathered.numpy() == slots).all()
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    scatter_twin(gathered, everything, pages, everything)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH, device="meta"), "are on meta: "),
        (torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH + 1), "not 192 x"),
        (torch.zeros(BLOCKS + 1, HEADS, TOKENS, WIDTH), "not 192 x"),
        (torch.zeros(BLOCKS, HEADS * TOKENS * WIDTH), "not 192 x"),
    ],
)
def test_pages_that_are_not_what_they_should_be_are_refused(tensor: torch.Tensor, why: str) -> None:
    """Those on another kind of device, and those of another size or shape."""
    with pytest.raises(ValueError, match=why):
        pages_of({"layer": tensor}, ["layer"], BLOCKS, PAGE_BYTES)

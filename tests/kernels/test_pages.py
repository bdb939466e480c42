"""Copies between pages and slots: kernels say what their twins say, for every layout, and touch nothing else."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import HAS_GPU
from tierd.memory import NORESERVE
from tierd_kernels.pages import (
    Pages,
    gather_kernel,
    gather_twin,
    scatter_kernel,
    scatter_twin,
    store_kernel,
    store_twin,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
LAYERS, HEADS, TOKENS = 2, 3, 4
COUNT = 5
MIB, GIB = 1 << 20, 1 << 30

# How engines lay out pages: a function from the numbers of pages and of a vector, and the dtype, to views.
LAYOUTS: dict[str, Callable[[int, int, torch.dtype], list[torch.Tensor]]] = {
    "one tensor, page first": lambda count, dim, dtype: [
        part for layer in filled((count, LAYERS, 2, HEADS, TOKENS, dim), dtype).unbind(1) for part in layer.unbind(1)
    ],
    "a tensor per layer, K/V split, token before head": lambda count, dim, dtype: [
        part.transpose(1, 2) for _ in range(LAYERS) for part in filled((2, count, TOKENS, HEADS, dim), dtype)
    ],
    "a tensor per layer, K/V fused in the vector": lambda count, dim, dtype: [
        part for _ in range(LAYERS) for part in filled((count, HEADS, TOKENS, 2 * dim), dtype).chunk(2, dim=-1)
    ],
    "two tensors, head before page": lambda count, dim, dtype: [
        part.transpose(0, 1)
        for layer in zip(*(filled((LAYERS, HEADS, count, TOKENS, dim), dtype) for _ in range(2)), strict=True)
        for part in layer
    ],
    "vectors at odd places": lambda count, dim, dtype: [
        filled((count, HEADS, TOKENS, dim + 3), dtype)[..., 1 : dim + 1] for _ in range(2 * LAYERS)
    ],
}


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bytes that read as numbers of a dtype."""
    generator = torch.Generator().manual_seed(len(shape))
    numbers = torch.randint(-100, 100, shape, generator=generator)
    return numbers.to(dtype)


def views_on(device: str, views: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies with the very strides of the originals."""
    copies = [torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=device) for view in views]
    for copy, view in zip(copies, views, strict=True):
        copy.copy_(view)
    return copies


def slots_of(pages: Pages, count: int, spare: int) -> torch.Tensor:
    """Slots of random bytes with room for `spare` numbers behind a block."""
    slot_bytes = pages.block_bytes + spare * pages.views[0].element_size()
    return torch.randint(0, 256, (count, slot_bytes), dtype=torch.uint8).to(pages.device)


layouts = st.sampled_from(sorted(LAYOUTS))
dims = st.sampled_from([1, 3, 8, 12, 16])
dtypes = st.sampled_from(DTYPES)
moves = st.integers(0, COUNT).flatmap(
    lambda count: st.tuples(*[st.permutations(range(COUNT)).map(lambda order: order[:count]) for _ in range(2)])
)
index_types = st.sampled_from([torch.int32, torch.int64])


@settings(max_examples=25)
@given(layouts, dims, dtypes, moves, index_types, st.sampled_from([0, 1, 8]))
def test_gather_equals_its_twin(
    device: str,
    layout: str,
    dim: int,
    dtype: torch.dtype,
    moves: tuple[list[int], list[int]],
    index_type: torch.dtype,
    spare: int,
) -> None:
    """Whatever the layout; and bytes behind a block stay as they are."""
    pages = Pages(views_on(device, LAYOUTS[layout](COUNT, dim, dtype)))
    indexes = [torch.tensor(order, dtype=index_type, device=device) for order in moves]
    slots = slots_of(pages, COUNT, spare)
    expected = slots.clone()
    gather_twin(pages, indexes[0], expected, indexes[1])
    gather_kernel(pages, indexes[0], slots, indexes[1])
    assert torch.equal(slots, expected)


@settings(max_examples=25)
@given(layouts, dims, dtypes, moves, index_types, st.sampled_from([0, 1, 8]))
def test_scatter_equals_its_twin(
    device: str,
    layout: str,
    dim: int,
    dtype: torch.dtype,
    moves: tuple[list[int], list[int]],
    index_type: torch.dtype,
    spare: int,
) -> None:
    """Whatever the layout; and pages that are not named stay as they are."""
    views = LAYOUTS[layout](COUNT, dim, dtype)
    ours, theirs = Pages(views_on(device, views)), Pages(views_on(device, views))
    indexes = [torch.tensor(order, dtype=index_type, device=device) for order in moves]
    slots = slots_of(ours, COUNT, spare)
    scatter_twin(slots, indexes[0], theirs, indexes[1])
    scatter_kernel(slots, indexes[0], ours, indexes[1])
    assert all(same_bytes(mine, other) for mine, other in zip(ours.views, theirs.views, strict=True))


@settings(max_examples=25)
@given(layouts, dims, dtypes, st.permutations(range(COUNT * TOKENS)), st.integers(1, 6), st.sampled_from([0, 1, 16]))
def test_store_equals_its_twin(
    device: str, layout: str, dim: int, dtype: torch.dtype, places: list[int], count: int, gap: int
) -> None:
    """New tokens go to their places in one layer, padding goes nowhere, whatever strides keys and values have."""
    views = LAYOUTS[layout](COUNT, dim, dtype)
    ours, theirs = Pages(views_on(device, views)), Pages(views_on(device, views))
    new = [filled((count, HEADS, dim + gap), dtype)[..., :dim].to(device) for _ in range(2)]
    mapping = torch.tensor([place if place % 5 else -1 for place in places[:count]], device=device)
    for layer in range(LAYERS):
        store_twin(theirs, layer, new, mapping)
        store_kernel(ours, layer, new, mapping)
    assert all(same_bytes(mine, other) for mine, other in zip(ours.views, theirs.views, strict=True))


@pytest.mark.skipif(HAS_GPU, reason="kernels are defined for the GPU here, not for the interpreter")
def test_pages_and_slots_may_be_farther_apart_than_32_bits_reach() -> None:
    """Three pages and three slots in 36 GiB of addresses each, counted in units of 16 bytes; nearly all is never touched."""
    views = [sparse(36 * GIB + MIB)[at * MIB // 2 :].view(torch.bfloat16) for at in (0, 1)]
    shape, strides = (3, HEADS, TOKENS, 16), (18 * GIB // 2, TOKENS * 16, 16, 1)
    pages = Pages([view.as_strided(shape, strides) for view in views])
    slots = sparse(36 * GIB + MIB).as_strided((3, pages.block_bytes), (18 * GIB, 1))
    blocks, order = filled((3, 2, HEADS, TOKENS, 16), torch.bfloat16), torch.tensor([2, 0, 1], dtype=torch.int32)
    for view, part in zip(pages.views, blocks.unbind(1), strict=True):
        view.copy_(part)
    gather_kernel(pages, order, slots, torch.arange(3, dtype=torch.int32))
    assert all(torch.equal(slots[at].view(torch.bfloat16), blocks[page].flatten()) for at, page in enumerate(order.tolist()))
    scatter_kernel(slots, torch.arange(3, dtype=torch.int32), pages, order.flip(0))
    assert torch.equal(torch.stack(pages.views, dim=1)[order.flip(0)], blocks[order])
    new = [filled((1, HEADS, 16), torch.bfloat16)] * 2
    store_kernel(pages, 0, new, torch.tensor([2 * TOKENS + 1]))
    assert all(torch.equal(view[2, :, 1], part[0]) for view, part in zip(pages.views, new, strict=True))


def sparse(size: int) -> torch.Tensor:
    """So many bytes of zeros, uint8, of which only what is written takes memory."""
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE), dtype=torch.uint8)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: random bytes may read as NaN."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_block_in_a_slot_is_layers_parts_heads_tokens_and_numbers(layout: str) -> None:
    """The order of tierd's blocks, whatever the engine's."""
    views = LAYOUTS[layout](COUNT, 8, torch.float32)
    pages = Pages(views)
    slots = slots_of(pages, 1, 0)
    gather_twin(pages, torch.tensor([3]), slots, torch.tensor([0]))
    block = slots[0].view(torch.float32).view(LAYERS, 2, HEADS, TOKENS, 8)
    assert torch.equal(block, torch.stack([view[3] for view in views]).view_as(block))


def test_a_latent_has_one_part(device: str) -> None:
    """MLA keeps one vector a token, not keys and values."""
    pages = Pages(views_on(device, [filled((COUNT, 1, TOKENS, 24), torch.bfloat16) for _ in range(LAYERS)]), parts=1)
    slots, back = slots_of(pages, COUNT, 0), torch.arange(COUNT, device=device).flip(0)
    gather_kernel(pages, back, slots, back)
    before = [view.clone() for view in pages.views]
    store_kernel(pages, 1, [pages.views[0][0, :, :2].transpose(0, 1)], torch.tensor([0, 1], device=device))
    assert torch.equal(pages.views[1][0, 0, :2], before[0][0, 0, :2])
    scatter_kernel(slots, back, pages, back)
    assert all(torch.equal(view, old) for view, old in zip(pages.views, before, strict=True))


def test_what_does_not_go_together_is_refused() -> None:
    """Slots that are too short or at odd places, views that differ, vectors with gaps, keys of another shape."""
    views = LAYOUTS["one tensor, page first"](COUNT, 8, torch.float32)
    pages, none = Pages(views), torch.tensor([], dtype=torch.int64)
    with pytest.raises(ValueError, match=f"16 bytes a slot, and a block of these pages has {pages.block_bytes}"):
        gather_twin(pages, none, torch.zeros(2, 16, dtype=torch.uint8), none)
    with pytest.raises(ValueError, match="multiples of 4 are needed"):
        gather_twin(pages, none, torch.zeros(2, pages.block_bytes + 5, dtype=torch.uint8), none)
    with pytest.raises(ValueError, match="view 1 has"):
        Pages([views[0], views[1].contiguous()])
    with pytest.raises(ValueError, match="last stride of 1"):
        Pages([view[..., ::2] for view in views])
    with pytest.raises(ValueError, match="does not go to <Pages"):
        store_twin(pages, 0, [torch.zeros(1, HEADS, 4)] * 2, none)

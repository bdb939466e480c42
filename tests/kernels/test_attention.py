"""Attention over pages: the kernel says what its twin says, and the twin what torch's own attention says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tests.conftest import HAS_GPU
from tierd_kernels.attention import attend_kernel, attend_twin
from tierd_kernels.pages import Pages

LAYERS, PAGES = 2, 40
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Weights are rounded to the dtype before they meet values; numbers are below 4."""

# The interpreter of Triton 3.6 multiplies matrices of bfloat16 as if they were integers.
DTYPES = list(TOLERANCE) if HAS_GPU else [torch.float32, torch.float16]


def case(
    device: str, lengths: list[tuple[int, int]], heads: tuple[int, int], tokens: int, dim: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments for `attend`: sequences of (tokens before, new tokens), in scattered pages."""
    generator = torch.Generator().manual_seed(dim)
    numbers = torch.randn(PAGES, LAYERS, 2, tokens, heads[0], dim, generator=generator).clamp(-4, 4).to(dtype).to(device)
    pages = Pages([numbers[:, layer, part].transpose(1, 2) for layer in range(LAYERS) for part in (0, 1)])
    totals = [before + new for before, new in lengths]
    width = max(-(-total // tokens) for total in totals)
    tables = torch.stack([torch.randperm(PAGES, generator=generator)[:width] for _ in totals]).to(torch.int32).to(device)
    starts = torch.tensor([0, *torch.tensor([new for _, new in lengths]).cumsum(0).tolist()], dtype=torch.int32).to(device)
    query = torch.randn(int(starts[-1]), heads[0] * heads[1], dim, generator=generator).to(dtype).to(device)
    new_max = max(new for _, new in lengths)
    return query, pages, 1, tables, starts, torch.tensor(totals, dtype=torch.int32).to(device), new_max


decodes = st.lists(st.tuples(st.integers(0, 90), st.just(1)), min_size=1, max_size=3)
chunks = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=2)
head_counts = st.sampled_from([(1, 1), (2, 3), (1, 4)])
geometry = (head_counts, st.sampled_from([4, 16]), st.sampled_from([8, 20]), st.sampled_from(DTYPES))


@settings(max_examples=30)
@given(decodes, *geometry, st.integers(1, 5))
def test_decode_equals_its_twin(
    device: str,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    splits: int,
) -> None:
    """Over any number of splits, more than there are keys included."""
    arguments = case(device, lengths, heads, tokens, dim, dtype)
    out = attend_kernel(*arguments, splits=splits)
    torch.testing.assert_close(out, attend_twin(*arguments), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=30)
@given(chunks, *geometry)
def test_prefill_equals_its_twin(
    device: str, lengths: list[tuple[int, int]], heads: tuple[int, int], tokens: int, dim: int, dtype: torch.dtype
) -> None:
    """Behind a prefix of any length, none included, and beside sequences with fewer new tokens."""
    arguments = case(device, lengths, heads, tokens, dim, dtype)
    out = attend_kernel(*arguments)
    torch.testing.assert_close(out, attend_twin(*arguments), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", [[(0, 7)], [(30, 1)], [(5, 9), (0, 3)]])
def test_the_twin_says_what_torch_says(lengths: list[tuple[int, int]]) -> None:
    """scaled_dot_product_attention over contiguous keys, one sequence at a time."""
    query, pages, layer, tables, starts, totals, new_max = case("cpu", lengths, (2, 3), 4, 16, torch.float32)
    out = attend_twin(query, pages, layer, tables, starts, totals, new_max, scale=0.3)
    for sequence, (before, new) in enumerate(lengths):
        rows = slice(int(starts[sequence]), int(starts[sequence + 1]))
        keys, values = (
            torch.cat([view[page] for page in tables[sequence]], dim=1)[:, : before + new]
            for view in pages.views[layer * 2 : layer * 2 + 2]
        )
        mask = torch.ones(new, before + new, dtype=torch.bool).tril(before)
        expected = scaled_dot_product_attention(
            query[rows].transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[rows], expected[0].transpose(0, 1), atol=1e-6, rtol=1e-6)


def test_a_query_that_does_not_fit_its_pages_is_refused() -> None:
    """Another dtype, or heads that are no multiple."""
    query, pages, *others = case("cpu", [(3, 1)], (2, 2), 4, 8, torch.float32)
    with pytest.raises(ValueError, match="both must be float KV"):
        attend_twin(query.half(), pages, *others)
    with pytest.raises(ValueError, match="a multiple of 2 heads"):
        attend_twin(query[:, :3], pages, *others)

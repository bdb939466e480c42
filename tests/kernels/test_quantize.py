"""Quantised blocks: kernels agree with their twins in every bit, twins keep what the formats promise, groups never straddle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import HAS_GPU
from tierd_kernels.quantize import (
    FORMATS,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
    dequantize_kernel,
    dequantize_twin,
    quantize,
    quantize_kernel,
    quantize_twin,
)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def random_blocks(seed: int, parts: int, heads: int, dim: int, spread: float, dtype: torch.dtype) -> torch.Tensor:
    """Three blocks of 32 tokens whose channels differ in size by up to 10 to the `spread`; the first part is zeros."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (spread * (torch.rand(dim, generator=generator) - 0.5))
    blocks = torch.randn(3, parts, heads, 32, dim, generator=generator) * sizes
    blocks[0, 0] = 0
    return blocks.to(dtype)


def packed_for(blocks: torch.Tensor, format: Format, spare: int = 0) -> torch.Tensor:
    """Rows of zeros for packed blocks, a few bytes longer than needed."""
    return torch.zeros(len(blocks), format.packed_bytes(blocks.shape[1:]) + spare, dtype=torch.uint8, device=blocks.device)


def restored(blocks: torch.Tensor, format: Format, axis: str = "dim") -> torch.Tensor:
    """What is left of blocks after packing and unpacking, by the twins."""
    packed, back = packed_for(blocks, format), torch.empty_like(blocks)
    quantize_twin(blocks, packed, format, axis)
    dequantize_twin(packed, back, format, axis)
    return back


formats, axes = st.sampled_from(FORMATS), st.sampled_from(["dim", "tokens"])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.sampled_from([32, 96]))


@settings(max_examples=30)
@given(st.integers(0, 999), shapes, st.floats(0, 5), dtypes, formats, axes, st.sampled_from([0, 4, 64]))
def test_quantize_equals_its_twin(
    device: str,
    seed: int,
    shape: tuple[int, int, int],
    spread: float,
    dtype: torch.dtype,
    format: Format,
    axis: str,
    spare: int,
) -> None:
    """In every bit of values, scales and part scales; bytes behind a packed block stay as they are."""
    blocks = random_blocks(seed, *shape, spread, dtype)
    expected, packed = packed_for(blocks, format, spare), packed_for(blocks, format, spare).to(device)
    quantize_twin(blocks, expected, format, axis)
    quantize_kernel(blocks.to(device), packed, format, axis)
    assert torch.equal(packed.cpu(), expected)


@settings(max_examples=30)
@given(st.integers(0, 999), shapes, st.floats(0, 5), dtypes, formats, axes)
def test_dequantize_equals_its_twin(
    device: str, seed: int, shape: tuple[int, int, int], spread: float, dtype: torch.dtype, format: Format, axis: str
) -> None:
    """In every bit, where the interpreter rounds as a GPU does."""
    blocks = random_blocks(seed, *shape, spread, dtype)
    packed, back = packed_for(blocks, format), torch.empty_like(blocks, device=device)
    quantize_twin(blocks, packed, format, axis)
    dequantize_kernel(packed.to(device), back, format, axis)
    expected = torch.empty_like(blocks)
    dequantize_twin(packed, expected, format, axis)
    # The interpreter of Triton 3.6 rounds to bfloat16 in its own way, which products with a float32 scale show.
    ulp = 0.0 if HAS_GPU or dtype != torch.bfloat16 else 2.0**-7
    torch.testing.assert_close(back.cpu(), expected, atol=0.0, rtol=ulp)


@settings(max_examples=30)
@given(st.integers(0, 999), st.floats(0, 5), axes)
def test_errors_are_bounded_by_half_the_distance_of_a_formats_numbers(seed: int, spread: float, axis: str) -> None:
    """Relative to the largest number of a group: 1/28 for e4m3 is 16 of 448; 1/6 for e2m1, as its largest gap is 4 to 6.

    A scale that is a power of two may be twice as large as needed; one of e4m3 is itself off by up to 1/16.
    """
    blocks = random_blocks(seed, 2, 2, 32, spread, torch.float32)
    for format, bound in ((MXFP8, 2 * 16 / 448), (MXFP4, 2 * 1 / 6), (NVFP4, 1 / 6 * 17 / 16)):
        groups = blocks.unflatten(4, (-1, format.group))
        errors = (restored(blocks, format, axis) - blocks).unflatten(4, (-1, format.group))
        if axis == "tokens":
            groups, errors = (each.flatten(4).unflatten(3, (-1, format.group)).transpose(4, 5) for each in (groups, errors))
        highest = groups.abs().amax(-1)
        # Below the smallest e4m3 scale a group of a part with much larger ones fades to zero: that is the format's range.
        floor = blocks.abs().amax((2, 3, 4))[..., None, None, None] / 448 * 2.0**-9 if format is NVFP4 else torch.tensor(0.0)
        allowed = highest * bound + floor.reshape(floor.shape + (1,) * (highest.dim() - floor.dim()))
        assert bool((errors.abs().amax(-1) <= allowed).all()), format.name


@given(st.integers(0, 999), st.floats(0, 5), st.sampled_from([MXFP8, MXFP4]), axes)
def test_what_was_packed_before_comes_back_unchanged(seed: int, spread: float, format: Format, axis: str) -> None:
    """Where scales are powers of two, demotion and promotion do not wear a block out."""
    once = restored(random_blocks(seed, 2, 2, 64, spread, torch.float32), format, axis)
    assert torch.equal(restored(once, format, axis), once)


@given(st.floats(-6, 6, width=32))
def test_four_bits_say_the_nearest_number(number: float) -> None:
    """Of the sixteen there are, found by looking at all of them."""
    blocks = torch.full((1, 1, 1, 1, 32), 6.0)
    blocks[..., 0] = number
    nearest = min(abs(abs(number) - size) for size in E2M1)
    assert abs(float(restored(blocks, MXFP4)[..., 0]) - number) == pytest.approx(nearest, abs=1e-6)


def test_packed_sizes_are_what_the_formats_promise() -> None:
    """8.25, 4.25 and 4.5 bits a number, and 4 bytes a part."""
    shape = (60, 3, 32, 64)
    numbers = 60 * 3 * 32 * 64
    sizes = [format.packed_bytes(shape) for format in FORMATS]
    assert sizes == [numbers * 33 // 32, numbers * 17 // 32, numbers * 9 // 16 + 240]


def test_groups_that_would_straddle_are_refused() -> None:
    """Along tokens, groups of 32 do not fit blocks of 16; along vectors, none fits 24 numbers; and it says what does."""
    packed = torch.zeros(1, 1 << 16, dtype=torch.uint8)
    blocks = torch.zeros(1, 2, 2, 16, 64)
    with pytest.raises(ValueError, match=r"mxfp4: groups of 32 tokens would straddle blocks of 16 tokens; nvfp4 would not"):
        quantize(blocks, packed, MXFP4, axis="tokens")
    quantize(blocks, packed, NVFP4, axis="tokens")
    with pytest.raises(ValueError, match=r"vectors of 80 numbers would straddle vectors; nvfp4 would not"):
        quantize(torch.zeros(1, 2, 2, 16, 80), packed, MXFP8)
    with pytest.raises(ValueError, match=r"vectors of 24 numbers would straddle vectors; no format fits"):
        quantize(torch.zeros(1, 2, 2, 16, 24), packed, NVFP4)


def test_rows_that_are_too_short_are_refused() -> None:
    """With the bytes that are needed."""
    with pytest.raises(ValueError, match=r"uint8\[blocks, 1088 or more\] is needed"):
        quantize(torch.zeros(1, 1, 2, 16, 64), torch.zeros(1, 1024, dtype=torch.uint8), MXFP4)

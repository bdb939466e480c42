"""Digests are xxh3-64, bit for bit, wherever they are computed."""

from __future__ import annotations

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd_kernels.checksum import digest_kernel, digest_twin

# Lengths around the borders of stripes (64 bytes) and chunks (1 KiB), and more chunks than a program sums at a time.
LENGTHS = (248, 256, 320, 1016, 1024, 1032, 1088, 2040, 2048, 2056, 3 * 1024 + 512, 70 * 1024 + 8)


def payloads(count: int, length: int, stride: int, device: str) -> torch.Tensor:
    """Rows of random bytes, `stride` bytes apart."""
    generator = torch.Generator().manual_seed(length)
    rows = torch.randint(0, 256, (count, stride), dtype=torch.uint8, generator=generator)
    return rows.to(device)[:, :length]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_gives_the_digest_of_the_reference_implementation(device: str, length: int) -> None:
    """The kernel against xxHash's own C code."""
    rows = payloads(3, length, length, device)
    expected = [xxhash.xxh3_64_intdigest(bytes(row.tolist())) for row in rows]
    assert [int(value) % (1 << 64) for value in digest_kernel(rows)] == expected


@settings(max_examples=15)
@given(st.integers(0, 6), st.integers(31, 300).map(lambda words: 8 * words), st.integers(0, 3).map(lambda words: 8 * words))
def test_the_kernel_equals_its_twin(device: str, count: int, length: int, gap: int) -> None:
    """Whatever the number of payloads, their length, and what lies between them."""
    rows = payloads(count, length, length + gap, device)
    assert torch.equal(digest_kernel(rows).cpu(), digest_twin(rows))


@settings(max_examples=15)
@given(st.integers(0, 2047), st.integers(0, 7))
def test_a_flipped_bit_changes_the_digest(device: str, byte: int, bit: int) -> None:
    """Of that payload, and of no other."""
    rows = payloads(2, 2048, 2048, device)
    before = digest_kernel(rows)
    rows[0, byte] ^= 1 << bit
    assert (digest_kernel(rows) == before).tolist() == [False, True]


def test_payloads_that_cannot_be_digested_are_refused() -> None:
    """Too short, of an odd length, or at an odd address."""
    rows = torch.zeros(2, 512, dtype=torch.uint8)
    for wrong in (rows[:, :240], rows[:, :250], rows[:, 4:500]):
        with pytest.raises(ValueError, match=r"is needed|are needed"):
            digest_twin(wrong)

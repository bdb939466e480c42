"""Checksums of blocks: xxh3-64, the same on a GPU and on a CPU, so that a block is verified wherever it is.

XXH3 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, "large inputs") looks sequential and is not: it takes
stripes of 64 bytes as eight lanes of 64 bits, and what a stripe adds to the eight accumulators depends on the stripe and
its place alone. Only after each *chunk* of 16 stripes (1 KiB) are the accumulators scrambled. So the first kernel reads all
payloads and writes each chunk's sum, 64 bytes, at the speed of memory; the second chains the sums of a payload, one chunk
after another, for all payloads side by side. With few payloads the chain's latency shows: about 20 ns a KiB.

The digest is not cryptographic: it finds damage, not forgery.
"""

from __future__ import annotations

from functools import cache
from struct import unpack_from

import numpy as np
import torch
import triton
import triton.language as tl
import xxhash

PAYLOAD_BYTES_MIN = 248
"""XXH3 treats up to 240 bytes in other ways, which no block needs."""
CHUNK_BYTES, STRIPE_BYTES, WORD_BYTES = 1024, 64, 8
LANES = 8
CHUNKS_AT_ONCE, PAYLOADS_AT_ONCE = 64, 4
"""What a program sums and chains: four words in each of 128 threads, one lane in each of 32."""
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
PRIME32_1, PRIME32_2, PRIME32_3 = tl.constexpr(0x9E3779B1), tl.constexpr(0x85EBCA77), tl.constexpr(0xC2B2AE3D)
PRIME64_1, PRIME64_2 = tl.constexpr(0x9E3779B185EBCA87), tl.constexpr(0xC2B2AE3D27D4EB4F)
PRIME64_3, PRIME64_4 = tl.constexpr(0x165667B19E3779F9), tl.constexpr(0x85EBCA77C2B2AE63)
PRIME64_5, PRIME_MX1 = tl.constexpr(0x27D4EB2F165667C5), tl.constexpr(0x165667919E3779F9)
START = (PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1)
SCRAMBLE, LAST, MERGE, BEGIN = (tl.constexpr(row) for row in (16, 17, 18, 19))
"""Rows of the table of constants, eight lanes each; rows 0 to 15 are the keys of a chunk's stripes."""


def digest(payloads: torch.Tensor) -> torch.Tensor:
    """xxh3-64 of each row of `payloads`, `uint8[payloads, bytes]`; returns the digests, `int64[payloads]` (the 64 bits).

    Rows are contiguous, start at multiples of 8 bytes and have a multiple of 8 bytes, at least 248: `slots[:, :block_bytes]`
    of slots is what is meant. Raises ValueError otherwise.
    """
    return (digest_kernel if payloads.is_cuda else digest_twin)(payloads)


def digest_kernel(payloads: torch.Tensor) -> torch.Tensor:
    """`digest` as two launches: the sums of chunks, then the chain over a payload's sums."""
    _check(payloads)
    count, length = payloads.shape
    digests = torch.empty(count, dtype=torch.int64, device=payloads.device)
    if not count:
        return digests
    unit_words = 2 if payloads.stride(0) % 16 == payloads.data_ptr() % 16 == 0 else 1
    addresses = payloads.data_ptr() + payloads.stride(0) * torch.arange(count, device=payloads.device)
    table = _table(payloads.device)
    chunks = (length - 1) // CHUNK_BYTES
    sums = torch.empty((count, chunks, LANES), dtype=torch.int64, device=payloads.device)
    if chunks:
        at_once = min(CHUNKS_AT_ONCE, triton.next_power_of_2(chunks))
        _sum_chunks[(count, triton.cdiv(chunks, at_once))](addresses, table, sums, chunks, UNIT=unit_words, CHUNKS=at_once)
    _chain_sums[(triton.cdiv(count, PAYLOADS_AT_ONCE),)](
        addresses, table, sums, digests, count, length, chunks, PAYLOADS=PAYLOADS_AT_ONCE, num_warps=1
    )
    return digests


def digest_twin(payloads: torch.Tensor) -> torch.Tensor:
    """`digest` by the reference implementation itself, for tensors in host memory; about 15 GB/s, the GIL released."""
    _check(payloads)
    rows = payloads.cpu().numpy()
    return torch.from_numpy(np.array([xxhash.xxh3_64_intdigest(row.data) for row in rows], np.uint64).view(np.int64))


@triton.jit
def _sum_chunks(addresses, table, sums, chunks, UNIT: tl.constexpr, CHUNKS: tl.constexpr):
    """Program (payload, n) sums chunks n * CHUNKS to (n + 1) * CHUNKS - 1. Payloads are aligned to UNIT words."""
    payload = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)[None, :, None]
    word = 2 * tl.arange(0, 4)[:, None, None] + tl.arange(0, 2)[None, None, :]  # first: neighbours in a warp read on
    data = _words(tl.load(addresses + payload), UNIT) + chunk * 128 + word
    keys = _words(table, 2) + word
    inside = chunk < chunks
    even = tl.full((4, CHUNKS), 0, tl.uint64)
    odd = tl.full((4, CHUNKS), 0, tl.uint64)
    for stripe in tl.static_range(16):
        plain = tl.load(data + stripe * 8, mask=inside, other=0)
        plain_even, plain_odd = tl.split(plain)
        product_even, product_odd = tl.split(_product(plain ^ tl.load(keys + stripe * 8)))
        even += product_even + plain_odd
        odd += product_odd + plain_even
    tl.store(_words(sums, 2) + (payload * chunks + chunk) * 8 + word, tl.join(even, odd), mask=inside)


@triton.jit
def _chain_sums(addresses, table, sums, digests, count, length, chunks, PAYLOADS: tl.constexpr):
    """Program n makes the digests of payloads n * PAYLOADS to (n + 1) * PAYLOADS - 1, `length` bytes each."""
    index = tl.program_id(0) * PAYLOADS + tl.arange(0, PAYLOADS)
    payload = index[:, None].to(tl.int64)
    lane = tl.arange(0, 8)[None, :]
    inside = payload < count
    keys = _words(table, 1) + lane
    sum_of = _words(sums, 1) + payload * chunks * 8 + lane
    scramble = tl.load(keys + SCRAMBLE * 8)
    lanes = tl.load(keys + BEGIN * 8 + tl.zeros_like(payload))
    for chunk in tl.range(0, chunks, loop_unroll_factor=16):
        lanes += tl.load(sum_of + chunk * 8, mask=inside, other=0)
        lanes = (lanes ^ (lanes >> 47) ^ scramble) * PRIME32_1

    # What is left is 1 to 16 stripes. The last of them ends where the payload does, and may overlap the one before.
    data = tl.load(addresses + payload, mask=inside, other=0).to(tl.pointer_type(tl.uint64))
    for stripe in range(0, (length - 1) % 1024 // 64):
        lanes += _stripe(data + chunks * 128 + stripe * 8, keys + stripe * 8, lane, inside)
    lanes += _stripe(data + (length - 64) // 8, keys + LAST * 8, lane, inside)

    even, odd = tl.split(tl.reshape(lanes ^ tl.load(keys + MERGE * 8), (PAYLOADS, 4, 2)))
    total = tl.sum((even * odd) ^ tl.umulhi(even, odd), axis=1) + tl.cast(length, tl.uint64) * PRIME64_1
    total = (total ^ (total >> 37)) * PRIME_MX1
    tl.store(_words(digests, 1) + index, total ^ (total >> 32), mask=index < count)


@triton.jit
def _stripe(data, keys, lane, inside):
    """What one stripe adds to the lanes."""
    plain = tl.load(data + lane, mask=inside, other=0)
    neighbour = tl.load(data + (lane ^ 1), mask=inside, other=0)
    return _product(plain ^ tl.load(keys)) + neighbour


@triton.jit
def _product(words):
    """The lower half of each word times its upper half."""
    return (words & 0xFFFFFFFF) * (words >> 32)


@triton.jit
def _words(address, UNIT: tl.constexpr):
    """A pointer to words that the compiler knows to be aligned to UNIT of them."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint64)), 8 * UNIT)


@cache
def _table(device: torch.device) -> torch.Tensor:
    """The constants of XXH3 as `int64[20, 8]`: keys, which are words at some place in the secret, and what lanes start with."""
    scramble, last, merge = len(SECRET) - STRIPE_BYTES, len(SECRET) - STRIPE_BYTES - 7, 11
    keys = [unpack_from("<8q", SECRET, place) for place in (*range(0, 16 * WORD_BYTES, WORD_BYTES), scramble, last, merge)]
    start = np.array([prime.value for prime in START], np.uint64).view(np.int64)
    return torch.tensor(np.array([*keys, start])).to(device)


def _check(payloads: torch.Tensor) -> None:
    length = payloads.shape[-1]
    if payloads.dtype != torch.uint8 or payloads.dim() != 2 or payloads.stride(1) != 1:
        raise ValueError(f"digest: uint8[payloads, bytes] is needed, contiguous by row, not {payloads.dtype} {payloads.shape}")
    if length < PAYLOAD_BYTES_MIN or length % WORD_BYTES:
        raise ValueError(f"digest: {length} bytes a payload; a multiple of {WORD_BYTES} from {PAYLOAD_BYTES_MIN} on is needed")
    if payloads.stride(0) % WORD_BYTES or payloads.data_ptr() % WORD_BYTES:
        raise ValueError(
            f"digest: payloads start at {payloads.data_ptr():#x} and every {payloads.stride(0)} bytes; "
            f"multiples of {WORD_BYTES} are needed"
        )

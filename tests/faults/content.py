"""What blocks hold in these tests: bytes that follow from the block's hash, so that every wrong byte is seen."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from tierd.block import HASH_BYTES, ROOT, split

ODD = np.uint64(0x9E3779B97F4A7C15)


def chain(name: str, blocks: int, parent: bytes = ROOT) -> bytes:
    """Packed hashes of a chain that no other name has."""
    hashes = []
    for at in range(blocks):
        parent = hashlib.sha256(parent + f"{name} {at}".encode()).digest()
        hashes.append(parent)
    return b"".join(hashes)


def payload(block_hash: bytes, block_bytes: int, flavour: int = 0) -> NDArray[np.uint8]:
    """The block of that hash (and flavour): every word differs by its place, so a shifted or foreign part is seen too."""
    seed = int.from_bytes(hashlib.blake2b(block_hash, digest_size=8, salt=flavour.to_bytes(8, "little")).digest(), "little")
    words = np.arange(-(-block_bytes // 8), dtype=np.uint64) * ODD ^ np.uint64(seed)
    return words.view(np.uint8)[:block_bytes]


def fill(pool: NDArray[np.uint8], hashes: bytes, flavour: int = 0) -> None:
    """Write the blocks of a run into the rows of a pool."""
    for row, block in enumerate(split(hashes)):
        pool[row] = payload(block, pool.shape[1], flavour)


def wrong(pool: NDArray[np.uint8], hashes: bytes, blocks: int, flavour: int = 0) -> list[int]:
    """Which of the first `blocks` rows do not hold their block."""
    run = list(split(hashes[: blocks * HASH_BYTES]))
    return [row for row, block in enumerate(run) if not np.array_equal(pool[row], payload(block, pool.shape[1], flavour))]

"""Block hashes: a block is named by a 32-byte digest chained over its parent, its tokens and extra keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from struct import pack

HASH_BYTES = 32
ROOT = bytes(HASH_BYTES)
"""The parent of a chain's first block."""


def block_hash(parent: bytes, tokens: Sequence[int], extra: bytes = b"") -> bytes:
    """Name one block: SHA-256 over its parent's hash, its token ids (as int64) and extra keys (LoRA, salt, images).

    Hashes are computed where the tokens are, on the engine's side; the daemon never sees tokens.
    """
    digest = hashlib.sha256(parent)
    digest.update(pack(f"<{len(tokens)}q", *tokens))
    digest.update(extra)
    return digest.digest()


def chain(tokens: Sequence[int], block_tokens: int, parent: bytes = ROOT, extra: bytes = b"") -> bytes:
    """Hash every *full* block of a token sequence; returns the packed hashes, head first (32 bytes each)."""
    hashes = bytearray()
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = block_hash(parent, tokens[start : start + block_tokens], extra)
        hashes += parent
    return bytes(hashes)


def split(hashes: bytes) -> Iterator[bytes]:
    """Iterate over the single hashes of a packed run."""
    return (hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))

"""One request's tokens, the block table that says in which pages their KV lies, and the names of its full blocks."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from tierd.block import HASH_BYTES, ROOT, chain
from tierd_engine.pages import PagePool


class Sequence:
    """Tokens of one request; `block_table[i]` is the page of tokens `16 i` to `16 i + 15`.

    `computed` counts the leading tokens whose KV is in the pages, whether the model computed it or a cache delivered
    it. The sequence owns its pages until `close`.
    """

    def __init__(self, tokens: Tokens[int], pool: PagePool) -> None:
        self.tokens = list(tokens)
        self.prompt_tokens = len(self.tokens)
        self.block_tokens = pool.layout.block_tokens
        self.block_table: list[int] = []
        self.computed = 0
        self._hashes = b""
        self._pool = pool

    def grow(self) -> None:
        """Take the pages that the tokens need and do not have yet; raises Busy when the pool is exhausted."""
        wanted = -(-len(self.tokens) // self.block_tokens)
        self.block_table += self._pool.allocate(wanted - len(self.block_table))

    def hashes(self) -> bytes:
        """Packed hashes of the full blocks among the tokens, head first; only new ones are computed."""
        done = len(self._hashes) // HASH_BYTES
        self._hashes += chain(self.tokens[done * self.block_tokens :], self.block_tokens, parent=self.parent(done))
        return self._hashes

    def parent(self, block: int) -> bytes:
        """Hash of the block before the given one (which must have been hashed); ROOT before the first."""
        return self._hashes[(block - 1) * HASH_BYTES : block * HASH_BYTES] if block else ROOT

    @property
    def blocks_computed(self) -> int:
        """Full blocks whose KV is in the pages: what may be stored."""
        return self.computed // self.block_tokens

    @property
    def blocks_loadable(self) -> int:
        """Leading full blocks that a cache may deliver: the last token is always computed, for its logits."""
        return (self.prompt_tokens - 1) // self.block_tokens

    def close(self) -> None:
        """Give all pages back to the pool."""
        self._pool.release(self.block_table)
        self.block_table = []

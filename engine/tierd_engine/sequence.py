"""One continuation of a prompt: its tokens, the names of its full blocks, and the block table that holds its KV."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

from tierd.block import HASH_BYTES, ROOT, chain
from tierd_engine.request import NO_HINTS, Hints, Sampling
from tierd_engine.sampler import Sampler

if TYPE_CHECKING:
    from tierd_engine.memory import Lookup
    from tierd_engine.text import Text


class BlockTable:
    """`pages[i]` holds block `i`: the first `leased` pages belong to a lookup's lease, the others to the sequence.

    Blocks before `named` are committed or on their way, `unanswered` commits are. `nameless`: the parent of its
    blocks is unknown to the memory, so they stay private.
    """

    def __init__(self, lookup: Lookup, pages: list[int]) -> None:
        self.lookup = lookup
        self.leased = self.named = lookup.blocks
        self.pages = [*lookup.pages[: lookup.blocks], *pages]
        self.unanswered = 0
        self.nameless = False


class Sequence:
    """Tokens of one sample of a request, and where its KV is.

    `computed` counts the leading tokens whose KV is in pages, whether the model computed it or memory delivered it.
    `number` orders sequences by arrival. The scheduler alone changes `table`, `lookup` and what follows them.
    """

    def __init__(
        self,
        tokens: Tokens[int],
        block_tokens: int,
        sampling: Sampling,
        *,
        number: int = 0,
        sample: int = 0,
        text: Text | None = None,
        hints: Hints = NO_HINTS,
    ) -> None:
        self.tokens = list(tokens)
        self.prompt_tokens = len(self.tokens)
        self.block_tokens = block_tokens
        self.sampling = sampling
        self.sampler = Sampler(sampling.temperature, sampling.top_p, sampling.seed + sample)
        self.number = number
        self.sample = sample
        self.text = text
        self.hints = hints
        self.reason = ""
        """Why it ended: stop, length or abort; empty until then."""
        self.computed = 0
        self.hit_tokens = 0
        self.table: BlockTable | None = None
        self.lookup: Lookup | None = None
        self.follows: bytes | None = None
        """The block that another sequence is computing and this one waits for."""
        self.stale = False
        """Blocks that its lookup could not find have been computed by somebody since."""
        self.flying: list[bytes] = []
        """The blocks that others may wait for."""
        self.stopped_since: float | None = None
        """Since when nothing but its load keeps it from running."""
        self.passed_over = 0
        """Plans that its load has kept it out of."""
        self.seconds: dict[str, float] = {}
        """When it arrived, had its blocks, had its first token, and ended."""
        self._hashes = b""

    def hashes(self) -> bytes:
        """Packed hashes of the full blocks among the tokens, head first; only new ones are computed."""
        done = len(self._hashes) // HASH_BYTES
        if (done + 1) * self.block_tokens <= len(self.tokens):
            self._hashes += chain(self.tokens[done * self.block_tokens :], self.block_tokens, parent=self.name(done - 1))
        return self._hashes

    def name(self, block: int) -> bytes:
        """Hash of a block that has been hashed; ROOT before the first."""
        return self._hashes[block * HASH_BYTES : (block + 1) * HASH_BYTES] if block >= 0 else ROOT

    def blocks(self, tokens: int) -> int:
        """How many pages hold that many tokens."""
        return -(-tokens // self.block_tokens)

    @property
    def key(self) -> tuple[int, int]:
        """Names it within its engine; smaller is older."""
        return self.number, self.sample

    @property
    def new_tokens(self) -> list[int]:
        """What was generated so far."""
        return self.tokens[self.prompt_tokens :]

    @property
    def uncomputed(self) -> int:
        """Tokens without KV: 1 while it decodes, more of a prompt."""
        return len(self.tokens) - self.computed

    @property
    def blocks_loadable(self) -> int:
        """Leading full blocks that memory may deliver: the last token is always computed, for its logits."""
        return (len(self.tokens) - 1) // self.block_tokens

    def __repr__(self) -> str:
        return f"<Sequence {self.number}: {self.computed} of {len(self.tokens)} tokens computed {self.reason}>"

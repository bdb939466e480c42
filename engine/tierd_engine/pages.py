"""A pool of KV pages in one tensor: one page is one tierd block, byte for byte, and may have several users."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import torch

from tierd.errors import Busy, Invalid
from tierd.layout import Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PagePool:
    """KV pages `[page, layer, K/V, head, token, dim]`, how many users each has, and the list of those that are free.

    `tensor` is what attention reads and writes, `bytes` the same memory as `uint8[pages, block_bytes]`: what a tierd
    client copies from and to. Raises Invalid when the layout's dtype cannot be computed with.
    """

    def __init__(self, layout: Layout, pages: int, device: str = "cpu") -> None:
        if layout.dtype not in DTYPES:
            raise Invalid(f"pages: dtype {layout.dtype!r} is not one of {', '.join(DTYPES)}; choose one of these")
        if pages < 1:
            raise Invalid(f"pages: a pool of {pages} pages holds nothing; give the engine at least 1")
        shape = (pages, layout.layers, 2, layout.kv_heads, layout.block_tokens, layout.head_dim)
        self.layout = layout
        self.count = pages
        self.tensor = torch.zeros(shape, dtype=DTYPES[layout.dtype], device=device)
        self._free = deque(range(pages))
        self._users: dict[int, int] = {}

    @property
    def free_count(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def bytes(self) -> np.ndarray:
        """The pool as `uint8[pages, block_bytes]`, sharing memory; host pools only."""
        rows: np.ndarray = self.tensor.view(torch.uint8).reshape(self.count, -1).numpy()
        return rows

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages for one user, all or none; raises Busy when fewer are free."""
        if count > len(self._free):
            raise Busy(
                f"pages: {count} wanted, {len(self._free)} of {self.count} free; "
                "wait until a sequence ends or give the engine more pages"
            )
        taken = [self._free.popleft() for _ in range(count)]
        self._users.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each of these used pages."""
        for page in pages:
            self._users[page] += 1

    def release(self, pages: Iterable[int]) -> list[int]:
        """One user less for each; returns the pages that nobody uses any more. Their content stays until they are taken."""
        freed = []
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                self._free.append(page)
                freed.append(page)
        return freed

    def check(self) -> None:
        """Raise AssertionError unless every page is either free or used, exactly once."""
        assert len(self._free) + len(self._users) == self.count, f"{self!r} has lost or doubled pages"
        assert self._users.keys().isdisjoint(self._free), f"{self!r} has pages that are both free and used"

    def __repr__(self) -> str:
        return f"<PagePool {len(self._free)} of {self.count} pages free, {self.layout.block_bytes} bytes each>"

"""KV pages: who uses which, which block is in which, and a pool of them in one tensor.

One page is one tierd block, byte for byte, and may have several users.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import torch

from tierd.block import split
from tierd.errors import Busy, Invalid
from tierd.layout import Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Accounts:
    """How many users each page has, and the list of those of our `own` that are free. Pages of others come by `adopt`."""

    def __init__(self, own: range) -> None:
        self.own = own
        self._free = deque(own)
        self._users: dict[int, int] = {}

    @property
    def free_count(self) -> int:
        """Own pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages for one user, all or none; raises Busy when fewer are free."""
        if count > len(self._free):
            raise Busy(
                f"pages: {count} wanted, {len(self._free)} of {len(self.own)} free; "
                "wait until a sequence ends or give the engine more pages"
            )
        taken = [self._free.popleft() for _ in range(count)]
        self._users.update(dict.fromkeys(taken, 1))
        return taken

    def adopt(self, pages: Iterable[int]) -> None:
        """Count one user for each of these pages, which are not ours and were not in use."""
        for page in pages:
            assert page not in self.own and page not in self._users, f"{self!r}: page {page} is in use already"
            self._users[page] = 1

    def used(self, page: int) -> bool:
        """Whether anybody uses the page."""
        return page in self._users

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
                if page in self.own:
                    self._free.append(page)
                freed.append(page)
        return freed

    def check(self) -> None:
        """Raise AssertionError unless every own page is either free or used, exactly once."""
        used = sum(page in self.own for page in self._users)
        assert len(self._free) + used == len(self.own), f"{self!r} has lost or doubled pages"
        assert self._users.keys().isdisjoint(self._free), f"{self!r} has pages that are both free and used"

    def check_idle(self) -> None:
        """As `check`, and nobody uses any page."""
        self.check()
        assert not self._users, f"{self!r}: somebody still holds pages"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._free)} of {len(self.own)} pages free, {len(self._users)} in use>"


class Blocks:
    """The block that is in a page in use, by name: shared for as long as somebody holds it, and not kept after that."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    def get(self, name: bytes) -> int | None:
        """The page that has a block, if any."""
        return self._pages.get(name)

    def share_prefix(self, hashes: bytes) -> list[int]:
        """The pages of the leading blocks, shared with the caller."""
        pages = []
        for name in split(hashes):
            if (page := self._pages.get(name)) is None:
                break
            pages.append(page)
        self._accounts.share(pages)
        return pages

    def put(self, page: int, name: bytes) -> int | None:
        """A used page holds that block now; if another page does already it is returned, shared with the caller."""
        twin = self._pages.setdefault(name, page)
        if twin == page:
            self._names[page] = name
            return None
        self._accounts.share([twin])
        return twin

    def release(self, pages: Iterable[int]) -> list[int]:
        """As `Accounts.release`; what nobody uses has no name."""
        freed = self._accounts.release(pages)
        for page in freed:
            if (name := self._names.pop(page, None)) is not None:
                del self._pages[name]
        return freed

    def check_empty(self) -> None:
        """Raise AssertionError if a page has a name."""
        assert not self._pages and not self._names, "a page that nobody holds has a name"


class PagePool(Accounts):
    """KV pages of our own, `[page, layer, K/V, head, token, dim]`.

    `tensor` is what attention reads and writes, `bytes` the same memory as `uint8[pages, block_bytes]`: what a tierd
    client copies from and to. Raises Invalid when the layout's dtype cannot be computed with.
    """

    def __init__(self, layout: Layout, pages: int, device: str = "cpu") -> None:
        dtype = dtype_of(layout)
        if pages < 1:
            raise Invalid(f"pages: a pool of {pages} pages holds nothing; give the engine at least 1")
        super().__init__(range(pages))
        self.layout = layout
        self.count = pages
        self.tensor = torch.zeros((pages, *page_shape(layout)), dtype=dtype, device=device)

    @property
    def bytes(self) -> np.ndarray:
        """The pool as `uint8[pages, block_bytes]`, sharing memory; host pools only."""
        rows: np.ndarray = self.tensor.view(torch.uint8).reshape(self.count, -1).numpy()
        return rows


def page_shape(layout: Layout) -> tuple[int, ...]:
    """`[layer, K/V, head, token, dim]`."""
    return layout.layers, 2, layout.kv_heads, layout.block_tokens, layout.head_dim


def dtype_of(layout: Layout) -> torch.dtype:
    """torch's name for a layout's numbers; raises Invalid when they cannot be computed with."""
    if layout.dtype not in DTYPES:
        raise Invalid(f"pages: dtype {layout.dtype!r} is not one of {', '.join(DTYPES)}; choose one of these")
    return DTYPES[layout.dtype]

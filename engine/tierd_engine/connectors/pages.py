"""An engine's pages as a pool of tierd's client, where the bytes of a page lie in several places in main memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


class StridedPages:
    """Pages in parts: the block of a page is the page's row in the first part, then in the second, and so on.

    parts: uint8 `[pages, bytes]` on the CPU, over the engine's memory; the bytes of a row are contiguous, rows may be at any
    distance. A slot has the same bytes in the same order, so the order within a row belongs to the namespace. However many
    blocks a copy has, it is one call of torch, made by the thread that calls, with the GIL released once: a thread that asks
    for the GIL again and again waits each time, up to 5 ms, for an engine that computes.
    """

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self.block_bytes = sum(part.shape[1] for part in parts)
        places = [number for part in parts for number in (part.shape[1], part.stride(0), part.storage_offset())]
        self._word = next(word for size, word in WORDS if not any(number % size for number in places))
        self._parts = together([part.view(self._word) for part in parts])

    def __len__(self) -> int:
        return len(self._parts[0])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)} pages of {self.block_bytes} bytes>"

    def fill(self, pages: NDArray[np.int64], slots: NDArray[np.uint8], indexes: NDArray[np.int64]) -> None:
        """Copy slot `indexes[i]` to page `pages[i]`, for every i."""
        torch._foreach_copy_(self._of_pages(pages), self._of_slots(slots, indexes))

    def drain(self, pages: NDArray[np.int64], slots: NDArray[np.uint8], indexes: NDArray[np.int64]) -> None:
        """Copy page `pages[i]` to slot `indexes[i]`, for every i."""
        torch._foreach_copy_(self._of_slots(slots, indexes), self._of_pages(pages))

    def _of_pages(self, pages: NDArray[np.int64]) -> list[torch.Tensor]:
        """Words `[parts, row]` of each page, for all parts that lie together."""
        numbers = pages.tolist()
        return [parts[page] for parts in self._parts for page in numbers]

    def _of_slots(self, slots: NDArray[np.uint8], indexes: NDArray[np.int64]) -> list[torch.Tensor]:
        """The same words where they are in slots, in the same order."""
        words = torch.from_numpy(slots)[:, : self.block_bytes].view(self._word)
        numbers = indexes.tolist()
        pieces = words.split([parts[0].numel() for parts in self._parts], 1)
        shaped = [piece.unflatten(1, parts.shape[1:]) for piece, parts in zip(pieces, self._parts, strict=True)]
        return [piece[slot] for piece in shaped for slot in numbers]


def together(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Parts `[pages, row]` as `[pages, parts, row]`: one tensor where they lie at one distance in one allocation.

    Engines allocate their layers so, whatever their order in memory. Others stay alone, `[pages, 1, row]`.
    """
    first = parts[0]
    places = {(part.untyped_storage().data_ptr(), part.shape, part.stride()) for part in parts}
    distances = {after.storage_offset() - before.storage_offset() for before, after in pairwise(parts)} or {0}
    if len(places) > 1 or len(distances) > 1 or min(distances) < 0:
        return [part[:, None] for part in parts]
    size, strides = (len(first), len(parts), first.shape[1]), (first.stride(0), distances.pop(), 1)
    return [first.as_strided(size, strides)]


def rows(memory: torch.Tensor, first_byte: int, count: int, size: int, distance: int) -> torch.Tensor:
    """uint8 `[count, size]` over the allocation of a tensor: rows `distance` bytes apart, the first at `first_byte` of it.

    Raises ValueError when they are not in the allocation.
    """
    storage = memory.untyped_storage()
    if first_byte < 0 or size < 1 or distance < 0 or first_byte + (count - 1) * distance + size > storage.nbytes():
        raise ValueError(
            f"{count} rows of {size} bytes, {distance} apart from byte {first_byte}: not in an allocation of {storage.nbytes()}"
        )
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(storage, first_byte, (count, size), (distance, 1))

"""vLLM's KV pages as a pool of tierd's client: one tensor a layer, in which the bytes of a page are contiguous."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


class LayerPages:
    """Pages of `blocks` blocks: the block of a page is the page's bytes in the first layer, then in the second, and so on.

    kv_caches: the tensors that vLLM registers, of any shape and strides within a page. A slot has the same bytes in the same
    order, so the order within a page belongs to the namespace. However many blocks a copy has, it is one call of torch, made
    by the thread that calls, with the GIL released once: a thread that asks for the GIL again and again waits each time, up
    to 5 ms, for an engine that computes. Raises ValueError when a layer is not what it should be.
    """

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], layers: Sequence[str], blocks: int, page_bytes: int) -> None:
        self.page_bytes, self.block_bytes = page_bytes, page_bytes * len(layers)
        self._word_bytes, self._word = next(word for word in WORDS if page_bytes % word[0] == 0)
        self._layers = together([self._pages(name, kv_caches[name], blocks) for name in layers])
        self._blocks = blocks

    def __len__(self) -> int:
        return self._blocks

    def __repr__(self) -> str:
        return f"<LayerPages {self._blocks} pages of {self.block_bytes // self.page_bytes} x {self.page_bytes} bytes>"

    def fill(self, pages: NDArray[np.int64], slots: NDArray[np.uint8], indexes: NDArray[np.int64]) -> None:
        """Copy slot `indexes[i]` to page `pages[i]`, for every i."""
        torch._foreach_copy_(self._of_pages(pages), self._of_slots(slots, indexes))

    def drain(self, pages: NDArray[np.int64], slots: NDArray[np.uint8], indexes: NDArray[np.int64]) -> None:
        """Copy page `pages[i]` to slot `indexes[i]`, for every i."""
        torch._foreach_copy_(self._of_slots(slots, indexes), self._of_pages(pages))

    def _of_pages(self, pages: NDArray[np.int64]) -> list[torch.Tensor]:
        """Words `[layers, page]` of each page."""
        numbers = pages.tolist()
        return [layers[page] for layers in self._layers for page in numbers]

    def _of_slots(self, slots: NDArray[np.uint8], indexes: NDArray[np.int64]) -> list[torch.Tensor]:
        """The same words where they are in slots, in the same order."""
        words = torch.from_numpy(slots)[:, : self.block_bytes].view(self._word)
        whole = words.unflatten(1, (-1, self.page_bytes // self._word_bytes))
        numbers = indexes.tolist()
        parts = whole.split([layers.shape[1] for layers in self._layers], 1)
        return [part[slot] for part in parts for slot in numbers]

    def _pages(self, name: str, tensor: torch.Tensor, blocks: int) -> torch.Tensor:
        """One layer as words `[blocks, page]`, over the same memory."""
        if tensor.device.type != "cpu":
            raise ValueError(f"layer {name} is on {tensor.device}: this release copies pages in main memory only")
        parts = tensor.shape[0] // blocks  # vLLM may hand kernels smaller blocks than those it counts in
        size = tensor.element_size()
        inner = sorted((stride, length) for stride, length in zip(tensor.stride()[1:], tensor.shape[1:], strict=True))
        dense = 1
        for stride, length in inner:
            if stride != dense and length > 1:
                raise ValueError(f"layer {name} has pages that are not contiguous: {tuple(tensor.shape)}, {tensor.stride()}")
            dense *= length
        if tensor.shape[0] != parts * blocks or dense * parts * size != self.page_bytes:
            raise ValueError(
                f"layer {name} has {tuple(tensor.shape)} numbers of {size} bytes, not {blocks} x {self.page_bytes}"
            )
        if parts > 1 and tensor.stride(0) != dense:
            raise ValueError(f"layer {name} has pages in {parts} pieces that do not follow each other")
        whole = torch.empty(0, dtype=torch.uint8).set_(
            tensor.untyped_storage(),
            tensor.storage_offset() * size,
            (blocks, self.page_bytes),
            (tensor.stride(0) * parts * size, 1),
        )
        return whole.view(self._word)


def together(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    """Layers `[blocks, page]` as `[blocks, layers, page]`: one tensor where they lie at one distance in one allocation.

    vLLM allocates its layers so, whatever their order in memory. Others stay alone, `[blocks, 1, page]`.
    """
    first = layers[0]
    places = {(layer.untyped_storage().data_ptr(), layer.stride()) for layer in layers}
    distances = {after.storage_offset() - before.storage_offset() for before, after in pairwise(layers)} or {0}
    if len(places) > 1 or len(distances) > 1 or min(distances) < 0:
        return [layer[:, None] for layer in layers]
    size, strides = (len(first), len(layers), first.shape[1]), (first.stride(0), distances.pop(), 1)
    return [first.as_strided(size, strides)]

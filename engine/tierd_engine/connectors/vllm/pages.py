"""vLLM's KV pages as a pool of tierd's client: one tensor a layer, in which the bytes of a page are contiguous."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

BATCH_BLOCKS = 64
"""Copied from or to one layer with two calls; what lies between them stays in the processor's cache."""

WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


class LayerPages:
    """Pages of `blocks` blocks: the block of a page is the page's bytes in the first layer, then in the second, and so on.

    kv_caches: the tensors that vLLM registers, of any shape and strides within a page. A slot has the same bytes in the same
    order, so the order within a page belongs to the namespace. Copies are made by torch, with the GIL released, by the thread
    that calls. Raises ValueError when a layer is not what it should be.
    """

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], layers: Sequence[str], blocks: int, page_bytes: int) -> None:
        self.page_bytes, self.block_bytes = page_bytes, page_bytes * len(layers)
        self._word_bytes, self._word = next(word for word in WORDS if page_bytes % word[0] == 0)
        self._layers = [self._pages(name, kv_caches[name], blocks) for name in layers]
        self._blocks = blocks

    def __len__(self) -> int:
        return self._blocks

    def __repr__(self) -> str:
        return f"<LayerPages {self._blocks} pages of {len(self._layers)} x {self.page_bytes} bytes>"

    def fill(self, pages: NDArray[np.int64], slots: NDArray[np.uint8], indexes: NDArray[np.int64]) -> None:
        """Copy slot `indexes[i]` to page `pages[i]`, for every i."""
        for some_pages, some_slots, layer, part in self._pieces(pages, slots, indexes):
            layer.index_copy_(0, some_pages, part.index_select(0, some_slots))

    def drain(self, pages: NDArray[np.int64], slots: NDArray[np.uint8], indexes: NDArray[np.int64]) -> None:
        """Copy page `pages[i]` to slot `indexes[i]`, for every i."""
        for some_pages, some_slots, layer, part in self._pieces(pages, slots, indexes):
            part.index_copy_(0, some_slots, layer.index_select(0, some_pages))

    def _pieces(
        self, pages: NDArray[np.int64], slots: NDArray[np.uint8], indexes: NDArray[np.int64]
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Indexes of pages and of slots for a batch, a layer, and that layer's part of the slots."""
        words = torch.from_numpy(slots).view(self._word)
        width = self.page_bytes // self._word_bytes
        parts = [words[:, at * width : (at + 1) * width] for at in range(len(self._layers))]
        batches = zip(
            torch.from_numpy(pages).split(BATCH_BLOCKS),
            torch.from_numpy(np.ascontiguousarray(indexes)).split(BATCH_BLOCKS),
            strict=True,
        )
        return [(*batch, layer, part) for batch in batches for layer, part in zip(self._layers, parts, strict=True)]

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

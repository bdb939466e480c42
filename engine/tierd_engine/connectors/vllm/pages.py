"""vLLM's KV pages as a pool of tierd's client: one tensor a layer, in which the bytes of a page are contiguous."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tierd_engine.connectors.pages import StridedPages, rows


class LayerPages(StridedPages):
    """Pages of `blocks` blocks: the block of a page is the page's bytes in the first layer, then in the second, and so on.

    kv_caches: the tensors that vLLM registers, of any shape and strides within a page. Raises ValueError when a layer is not
    what it should be.
    """

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], layers: Sequence[str], blocks: int, page_bytes: int) -> None:
        super().__init__([pages_of(name, kv_caches[name], blocks, page_bytes) for name in layers])


def pages_of(name: str, tensor: torch.Tensor, blocks: int, page_bytes: int) -> torch.Tensor:
    """One layer as bytes `[blocks, page_bytes]`, over the same memory."""
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
    if tensor.shape[0] != parts * blocks or dense * parts * size != page_bytes:
        raise ValueError(f"layer {name} has {tuple(tensor.shape)} numbers of {size} bytes, not {blocks} x {page_bytes}")
    if parts > 1 and tensor.stride(0) != dense:
        raise ValueError(f"layer {name} has pages in {parts} pieces that do not follow each other")
    return rows(tensor, tensor.storage_offset() * size, blocks, page_bytes, tensor.stride(0) * parts * size)

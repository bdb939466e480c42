"""vLLM's KV pages as a pool of tierd's client, in main memory or on a GPU, in every order in which vLLM lays them out.

vLLM registers one tensor a layer, logically `[block, head, token, content]`; its layout decides the strides. In a block of
tierd's one layer comes after the other, and in each of them heads come before tokens, or tokens before heads, as they do in
the layout: whatever else is between them in memory, and however small the blocks of kernels are. So blocks of different order
have layouts of different names, and these are in the namespace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch

from tierd.errors import Invalid
from tierd_engine.connectors.pages import StridedPages, rows

if TYPE_CHECKING:
    from tierd_engine.device import DevicePages

ROW_BYTES_MAX = 4096
"""Kernels copy a run in rows of at most so many bytes."""


class LayerPages(StridedPages):
    """Pages in main memory: their parts are the runs of bytes of all layers."""

    pins = None

    def now(self) -> LayerPages:
        """The same pages: what the engine computed there is there when its call has returned."""
        return self


def pages_of(
    kv_caches: Mapping[str, torch.Tensor], layers: Sequence[str], blocks: int, page_bytes: int
) -> LayerPages | DevicePages:
    """The pages of `blocks` blocks in the tensors that vLLM registers, each of `page_bytes` in every layer.

    Raises ValueError when a layer is not what it should be, or where nobody copies from.
    """
    runs = [run for name in layers for run in runs_of(name, kv_caches[name], blocks, page_bytes)]
    kinds = {run.device.type for run in runs}
    if kinds == {"cpu"}:
        return LayerPages(runs)
    if kinds != {"cuda"}:
        raise ValueError(f"layers are on {', '.join(sorted(kinds))}: pages are copied in main memory and on NVIDIA GPUs only")
    from tierd_engine.device import device_pages  # needs triton

    try:
        return device_pages(views_of(runs), parts=1)
    except Invalid as error:
        raise ValueError(str(error)) from error


def views_of(runs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Runs `[page, bytes]` as kernels take them: `[page, 1, row, bytes]`, in rows of a power of two."""
    return [run.unflatten(1, (1, -1, math.gcd(run.shape[1], ROW_BYTES_MAX))) for run in runs]


def runs_of(name: str, tensor: torch.Tensor, blocks: int, page_bytes: int) -> list[torch.Tensor]:
    """The runs of one layer's pages, in the order of a block: uint8 `[blocks, bytes]` each, over the same memory."""
    pieces, left = divmod(tensor.shape[0], blocks)  # vLLM may hand kernels smaller blocks than those it counts in
    size = tensor.element_size()
    if left or tensor.dim() != 4 or tensor[0].numel() * pieces * size != page_bytes:
        raise ValueError(f"layer {name} has {tuple(tensor.shape)} numbers of {size} bytes, not {blocks} x {page_bytes}")
    page = tensor.unflatten(0, (blocks, pieces)).movedim(1, 2)  # block, head, piece, token, content
    if page.stride(1) < page.stride(3):
        page = page.movedim(1, 3)  # block, piece, token, head, content
    axes, dense = list(zip(page.stride()[1:], page.shape[1:], strict=True)), 1
    while axes and (axes[-1][0] == dense or axes[-1][1] == 1):
        dense *= axes.pop()[1]
    places = product(*(range(0, stride * length, stride) for stride, length in axes))
    firsts = [tensor.storage_offset() + sum(place) for place in places]
    return [rows(tensor, first * size, blocks, dense * size, page.stride(0) * size) for first in firsts]

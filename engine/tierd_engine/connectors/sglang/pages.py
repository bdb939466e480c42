"""SGLang's host memory as a pool of tierd's client, in every layout in which a page is made of rows of bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tierd_engine.connectors.pages import StridedPages, rows
from tierd_engine.connectors.sglang.api import page_addresses


def host_pages(pool: Any) -> StridedPages:
    """All pages of a host pool. Raises ValueError where they are not in its `kv_buffer`, or not at one distance.

    A block has the pieces of a page in the order in which they are in memory: with `layer_first` each layer's keys, then each
    layer's values; with `page_first` and `page_first_direct` all keys, then all values.
    """
    buffers = pool.kv_buffer if isinstance(pool.kv_buffer, tuple | list) else [pool.kv_buffer]
    if not all(isinstance(buffer, torch.Tensor) and buffer.device.type == "cpu" for buffer in buffers):
        raise ValueError(f"{describe(pool)} has no memory of its own on the host")
    count = int(pool.page_num)
    some = {page: page_addresses(pool, page) for page in {0, min(1, count - 1), count - 1}}
    pieces = []
    for number, (address, size) in enumerate(some[0]):
        distance = some[min(1, count - 1)][number][0] - address
        if any(addresses[number] != (address + page * distance, size) for page, addresses in some.items()):
            raise ValueError(f"{describe(pool)} has pages at different distances")
        buffer = next((at for at, buffer in enumerate(buffers) if holds(buffer, address)), None)
        if buffer is None:
            raise ValueError(f"{describe(pool)} has parts of a page outside of its buffer")
        pieces.append((buffer, address - buffers[buffer].untyped_storage().data_ptr(), size, distance))
    if not pieces:
        raise ValueError(f"{describe(pool)} does not say where its pages are")
    return StridedPages([rows(buffers[at], first, count, size, distance) for at, first, size, distance in sorted(pieces)])


def page_numbers(indices: torch.Tensor, page_tokens: int, pages: int) -> NDArray[np.int64]:
    """Pages that SGLang names by an index for each token, int64 `[pages]`. Raises ValueError where they are no whole pages."""
    by_page: NDArray[np.int64] = indices.cpu().numpy().reshape(pages, page_tokens)
    numbers, left = np.divmod(by_page[:, 0], page_tokens)
    if left.any() or (by_page != by_page[:, :1] + np.arange(page_tokens)).any():
        raise ValueError(f"indices of {pages} pages of {page_tokens} tokens do not begin at pages or do not follow each other")
    return numbers


def describe(pool: Any) -> str:
    """How an error message about a pool begins."""
    return f"TierdHiCache: the host pool, {type(pool).__name__} in layout {pool.layout},"


def holds(buffer: torch.Tensor, address: int) -> bool:
    """Whether an address is in a tensor's memory."""
    return address in range(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes)

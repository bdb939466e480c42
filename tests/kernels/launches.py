"""Launches every kernel as an engine would, compiles it for GPUs that are not there, and prints what came out as JSON.

`python -m tests.kernels.launches`: a process of its own, because a process either interprets kernels or compiles them.
"""

from __future__ import annotations

import json

import torch

from tests.kernels.compile_ahead import compiling
from tierd_kernels.attention import attend_kernel
from tierd_kernels.checksum import digest_kernel
from tierd_kernels.pages import Pages, gather_kernel, scatter_kernel, store_kernel
from tierd_kernels.quantize import FORMATS, dequantize_kernel, quantize_kernel

CAPABILITIES = (80, 90, 100)
LAYERS, HEADS, TOKENS, DIM = 2, 8, 16, 128


def main() -> None:
    """One line: what each launch became, by compute capability."""
    found = {}
    for capability in CAPABILITIES:
        with compiling(capability) as launches:
            copies()
            checksums()
            quantisation()
            attention()
        found[capability] = [launch.summary() for launch in launches]
    print(json.dumps(found))


def copies() -> None:
    """Pages of bf16, token before head, as most engines have them."""
    layers = [torch.empty(2, 3, TOKENS, HEADS, DIM, dtype=torch.bfloat16) for _ in range(LAYERS)]
    pages = Pages([part.transpose(1, 2) for layer in layers for part in layer])
    slots = torch.empty(2, pages.block_bytes, dtype=torch.uint8)
    indexes = torch.arange(2)
    gather_kernel(pages, indexes, slots, indexes)
    scatter_kernel(slots, indexes, pages, indexes)
    new = torch.empty(2, HEADS, DIM, dtype=torch.bfloat16)
    store_kernel(pages, 0, [new, new], indexes)


def checksums() -> None:
    """Of blocks of 64 KiB."""
    digest_kernel(torch.empty(3, 65536, dtype=torch.uint8))


def quantisation() -> None:
    """Every format along vectors, one along tokens."""
    blocks = torch.empty(2, 2 * LAYERS, HEADS, TOKENS, DIM, dtype=torch.bfloat16)
    packed = torch.empty(2, 131072, dtype=torch.uint8)
    for format in FORMATS:
        for axis in ("dim", "tokens") if TOKENS % format.group == 0 else ("dim",):
            quantize_kernel(blocks, packed, format, axis)
            dequantize_kernel(packed, blocks, format, axis)


def attention() -> None:
    """Decode over split keys and a chunk of a prompt, 32 query heads over 8, in bf16; a decode in fp32."""
    for dtype, new, splits in ((torch.bfloat16, 1, 8), (torch.bfloat16, 64, 1), (torch.float32, 1, 1)):
        layer = torch.empty(4, 2, TOKENS, HEADS, DIM, dtype=dtype)
        pages = Pages([layer[:, part].transpose(1, 2) for part in (0, 1)])
        starts, lengths = torch.tensor([0, new], dtype=torch.int32), torch.tensor([new], dtype=torch.int32)
        tables = torch.zeros(1, 4, dtype=torch.int32)
        attend_kernel(torch.empty(new, 4 * HEADS, DIM, dtype=dtype), pages, 0, tables, starts, lengths, new, splits=splits)


if __name__ == "__main__":
    main()

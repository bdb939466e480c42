"""Launches every kernel as an engine would, compiles it for GPUs that are not there, and prints what came out as JSON.

`python -m tests.kernels.launches`: a process of its own, because a process either interprets kernels or compiles them.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from tests.kernels.compile_ahead import compiling
from tierd_kernels.checksum import digest_kernel
from tierd_kernels.pages import Pages, gather_kernel, scatter_kernel, store_kernel

CAPABILITIES = (80, 90, 100)
LAYERS, HEADS, TOKENS, DIM = 2, 8, 16, 128


def main() -> None:
    """One line: what each launch became, by compute capability."""
    found = {}
    for capability in CAPABILITIES:
        with compiling(capability) as launches:
            copies()
            checksums()
        found[capability] = [asdict(launch) | {"ld": launch.widths("ld"), "st": launch.widths("st")} for launch in launches]
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


if __name__ == "__main__":
    main()

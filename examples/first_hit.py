"""A first hit: one client stores the KV of a prompt, another one finds it again.

    python examples/first_hit.py

What an engine would have computed is random bytes here; everything else is what an engine does.
"""

from __future__ import annotations

import numpy as np

from tierd.block import chain
from tierd.client import Client
from tierd.layout import Layout

LAYOUT = Layout(layers=8, kv_heads=4, head_dim=64, dtype="bfloat16")
PROMPT = range(1024)
"""Token ids."""


def main() -> None:
    """Store, find again, compare."""
    hashes = chain(PROMPT, LAYOUT.block_tokens)
    blocks = len(PROMPT) // LAYOUT.block_tokens
    computed = np.random.default_rng(1).integers(0, 256, (blocks, LAYOUT.block_bytes), np.uint8)
    pages = np.arange(blocks)
    with Client(model="first hit", layout=LAYOUT, deadline_seconds=10.0) as engine:
        there = engine.store(hashes, computed, pages)
        print(f"stored {there.stored + there.present} blocks, {computed.nbytes >> 20} MiB")
    loaded = np.zeros_like(computed)
    with Client(model="first hit", layout=LAYOUT, deadline_seconds=10.0) as engine:
        found = engine.load(hashes, loaded, pages)
    right = "every byte right" if (loaded[:found] == computed[:found]).all() else "WRONG BYTES"
    print(f"found {found} of {blocks} blocks again, {right}")
    if found < blocks:
        raise SystemExit("not all of it was found: is the service running (tierd status), and are you in its group?")


if __name__ == "__main__":
    main()

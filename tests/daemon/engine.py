"""An engine in a process of its own: `python -m tests.daemon.engine SOCKET load|store`, with the client library."""

from __future__ import annotations

import sys

import numpy as np

from tests.daemon.harness import LAYOUT, hashes_of, payload_of
from tierd.block import split
from tierd.client import Client

BLOCKS = 40
HASHES = hashes_of(7, BLOCKS)
EXPECTED = np.stack([payload_of(block) for block in split(HASHES)])


def main(socket: str, action: str) -> None:
    """Load or store the blocks, in a shuffled order of pages, and print what came of it."""
    pages = np.random.default_rng(1).permutation(BLOCKS)
    with Client(socket, model="engine", layout=LAYOUT, name=action, deadline_seconds=10) as client:
        pool = np.zeros_like(EXPECTED)
        if action == "load":
            blocks = client.load(HASHES, pool, pages)
            assert (pool[pages[:blocks]] == EXPECTED[:blocks]).all()
            print(f"{blocks} of {BLOCKS}")
        else:
            pool[pages] = EXPECTED
            stored = client.store(HASHES, pool, pages)
            print(f"stored {stored.stored}, present {stored.present}, refused {stored.refused}")


if __name__ == "__main__":
    main(*sys.argv[1:])

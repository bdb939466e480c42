"""A client process under torture: loads and stores chains all the time, and checks every byte that it gets.

`python -m tests.faults.worker SOCKET SEED NAMESPACE` obeys words on standard input: "pause" (answered with its counts
as JSON), "go", and the end of the input. All workers share one universe of chains, several times the memory tier.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import TypeVar

import numpy as np

from tests.faults.content import chain, fill, wrong
from tests.faults.house import LAYOUT
from tierd.block import HASH_BYTES
from tierd.client import Client

T = TypeVar("T")
CHAINS, CHAIN_BLOCKS, SHARED_BLOCKS, SHARED_BY = 96, 64, 16, 4
DEADLINE_SECONDS = 1.0
PREFETCH_SHARE, NEW_SHARE = 0.6, 0.5
"""Of the turns that ask for another chain ahead, and of those whose chain nobody has seen before: much is on its way."""
COMPUTE_SECONDS = 0.01
"""What an engine does while there is no daemon."""


def universe() -> list[bytes]:
    """The chains: four at a time share their first blocks, as prompts share a system prompt."""
    chains = []
    for number in range(CHAINS):
        head = chain(f"torture head {number // SHARED_BY}", SHARED_BLOCKS)
        chains.append(head + chain(f"torture {number}", CHAIN_BLOCKS - SHARED_BLOCKS, head[-HASH_BYTES:]))
    return chains


def model_of(namespace: int) -> str:
    """Namespaces have the same hashes and other bytes, so that one of the other's is a wrong one."""
    return f"faults {namespace}"


class Worker:
    """One client and what it has seen."""

    def __init__(self, path: str, seed: int, namespace: int) -> None:
        self.random = Random(seed)
        self.flavour = namespace
        model, name = model_of(namespace), f"worker {seed}"
        self.client = Client(path, model=model, layout=LAYOUT, deadline_seconds=DEADLINE_SECONDS, name=name)
        self.chains = universe()
        self.pool = np.zeros((CHAIN_BLOCKS, LAYOUT.block_bytes), np.uint8)
        self.counts: Counter[str] = Counter()
        self.call_seconds_max = 0.0

    def turn(self) -> None:
        """Ask for a prefix as an engine does; check what came, store the rest."""
        pick = min(self.random.randrange(CHAINS), self.random.randrange(CHAINS))
        blocks = self.random.randint(1, CHAIN_BLOCKS)
        hashes = self.chains[pick][: blocks * HASH_BYTES]
        if self.random.random() < NEW_SHARE:
            hashes = chain(f"torture {self.client.session.path} {self.random.random()}", blocks)
        pages = self.random.sample(range(CHAIN_BLOCKS), blocks) if self.random.random() < 0.3 else list(range(blocks))
        had = self.timed(lambda: self.client.load(hashes, self.pool, pages))
        self.counts["asked"] += blocks
        self.counts["hits"] += had
        self.counts["wrong"] += len(wrong(self.pool[pages], hashes, had, self.flavour))
        rows = np.empty((blocks, LAYOUT.block_bytes), np.uint8)
        fill(rows, hashes, self.flavour)
        self.pool[pages] = rows
        stored = self.timed(lambda: self.client.store(hashes, self.pool, pages))
        self.counts["stored"] += stored.stored
        self.counts["refused"] += stored.refused
        if stored.refused == blocks:
            time.sleep(COMPUTE_SECONDS)
        if self.random.random() < PREFETCH_SHARE:
            self.client.prefetch(self.random.choice(self.chains))

    def timed(self, call: Callable[[], T]) -> T:
        """The call's result; remembers the longest."""
        started = time.monotonic()
        result = call()
        self.call_seconds_max = max(self.call_seconds_max, time.monotonic() - started)
        return result

    def report(self) -> str:
        """Everything that was counted, as JSON."""
        return json.dumps({**self.counts, "call_seconds_max": self.call_seconds_max, **self.client.statistics})


def main() -> None:
    """Work until standard input ends."""
    worker = Worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    working = True
    words = os.fdopen(0, "rb", buffering=0, closefd=False)  # what a buffer holds select does not see
    while True:
        if not working or select.select([words], [], [], 0)[0]:
            match words.readline():
                case b"pause\n":
                    working = False
                    print(worker.report(), flush=True)
                case b"go\n":
                    working = True
                case _:
                    break
        if working:
            worker.turn()
    worker.client.close()


if __name__ == "__main__":
    main()

"""A live engine: stores and loads chains of blocks without end, checks every byte, and can be asked what it has.

It reads commands from standard input and answers each with one line of JSON: `run` (go on in the background), `pause` (stop,
and say what happened since the start), `fill` (store every chain once), `check` (load every block that was committed).
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from hashlib import sha256
from threading import Event, Thread
from typing import Any

import numpy as np

from tierd.block import HASH_BYTES, chain
from tierd.client import Client
from tierd.layout import Layout

LAYOUT = Layout(layers=8, kv_heads=4, head_dim=64, dtype="bfloat16")
"""Blocks of 128 KiB."""
CHAIN_BLOCKS = 64
CHAIN_BYTES = CHAIN_BLOCKS * LAYOUT.block_bytes
ATTEMPTS_MAX = 500


class Engine:
    """Committed chains, and what went wrong; `chains_max` of them are made, then they are stored and loaded again."""

    def __init__(self, client: Client, chains_max: int) -> None:
        self.client, self.chains_max = client, chains_max
        self.committed: dict[int, int] = {}
        """Chain -> how many leading blocks the daemon has said that it has."""
        self.failures: list[str] = []
        self.wrong = self.loads = self.missed = 0
        self._pages = np.arange(CHAIN_BLOCKS)
        self._pool = np.zeros((CHAIN_BLOCKS, LAYOUT.block_bytes), np.uint8)
        self._stop = Event()
        self._thread: Thread | None = None

    def run(self) -> None:
        """Go on in the background, unless it does."""
        if self._thread:
            return
        self._stop.clear()
        self._thread = Thread(target=self._live, daemon=True)
        self._thread.start()

    def pause(self) -> dict[str, Any]:
        """Stop; the sums since the start."""
        if self._thread:
            self._stop.set()
            self._thread.join(60)
            assert not self._thread.is_alive(), "a call of the client does not return"
            self._thread = None
        sums = {name: getattr(self, name) for name in ("failures", "wrong", "loads", "missed")}
        return sums | {"blocks": sum(self.committed.values()), "connects": self.client.session.connects}

    def fill(self) -> int:
        """Store every chain, again where there is no room yet (the tier grows ahead); how many blocks are committed."""
        for number in range(self.chains_max):
            attempts = 0
            while number not in self.committed and attempts < ATTEMPTS_MAX:
                self._store(number)
                attempts += 1
        return sum(self.committed.values())

    def check(self) -> dict[str, Any]:
        """Load everything that was committed; how many blocks were asked for, and how many are lost."""
        asked = lost = 0
        for number, blocks in self.committed.items():
            asked += blocks
            lost += blocks - min(blocks, self._load(number, blocks))
        return {"asked": asked, "lost": lost, "wrong": self.wrong}

    def _live(self) -> None:
        turn = 0
        while not self._stop.is_set():
            try:
                if turn % 2 == 0:
                    self._store(turn // 2 % self.chains_max)
                elif self.committed:
                    known = list(self.committed)
                    number = known[turn * 7919 % len(known)]
                    found = self._load(number, self.committed[number])
                    self.loads, self.missed = self.loads + 1, self.missed + (found < self.committed[number])
            except Exception as error:  # what must never reach an engine
                self.failures.append(repr(error))
                return
            turn += 1

    def _store(self, number: int) -> None:
        hashes = hashes_of(number)
        self._pool[:] = payloads_of(number)
        stored = self.client.store(hashes, self._pool, self._pages)
        if stored.stored + stored.present == CHAIN_BLOCKS:
            self.committed[number] = CHAIN_BLOCKS

    def _load(self, number: int, blocks: int) -> int:
        self._pool[:blocks] = 0
        found = self.client.load(hashes_of(number)[: blocks * HASH_BYTES], self._pool, self._pages[:blocks])
        self.wrong += int((self._pool[:found] != payloads_of(number)[:found]).any(axis=1).sum())
        return found


def hashes_of(number: int) -> bytes:
    """Packed hashes of one chain."""
    tokens = LAYOUT.block_tokens
    return chain(range(number * CHAIN_BLOCKS * tokens, (number + 1) * CHAIN_BLOCKS * tokens), tokens)


def payloads_of(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of its blocks: they follow from its number, and each block's are its own."""
    word = np.frombuffer(sha256(number.to_bytes(8, "big")).digest(), np.uint8)
    row = np.tile(word, LAYOUT.block_bytes // len(word))
    return row[None, :] ^ np.arange(CHAIN_BLOCKS, dtype=np.uint8)[:, None]


def main() -> None:
    """Obey until the end of standard input."""
    parser = ArgumentParser()
    parser.add_argument("--chains", type=int, required=True)
    parser.add_argument("--deadline", type=float, default=1.0)
    options = parser.parse_args()
    with Client("/run/tierd/tierd.sock", model="ops", layout=LAYOUT, deadline_seconds=options.deadline, name="load") as client:
        engine = Engine(client, options.chains)
        for line in sys.stdin:
            answer = {"run": engine.run, "pause": engine.pause, "fill": engine.fill, "check": engine.check}[line.strip()]()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

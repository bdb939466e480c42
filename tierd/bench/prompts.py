"""Prompts as chains of block hashes, for the index: endless, seeded, and of two kinds.

Lengths are 64 to 2,048 blocks of 16 tokens, short ones more often than long ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from tierd.block import HASH_BYTES

BLOCKS_MIN, BLOCKS_MAX = 64, 2048
SYSTEM_PROMPTS, SYSTEM_BLOCKS = 32, (4, 64)
DOCUMENTS, DOCUMENT_BLOCKS = 256, (32, 1024)
DOCUMENT_SHARE = 0.3
TURN_SHARE, TURNS_OPEN = 0.4, 256
EARLIER = 1024
"""How many earlier prompts an adversarial one may share a beginning with."""


def realistic(seed: int) -> Iterator[bytes]:
    """Requests of a service: a few system prompts, some with a document that many ask about, some the next turn of a
    conversation, each with something new at its end."""
    random = np.random.default_rng(seed)
    systems = [random.bytes(_between(random, *SYSTEM_BLOCKS) * HASH_BYTES) for _ in range(SYSTEM_PROMPTS)]
    documents = [
        systems[at % SYSTEM_PROMPTS] + random.bytes(_between(random, *DOCUMENT_BLOCKS) * HASH_BYTES) for at in range(DOCUMENTS)
    ]
    turns: deque[bytes] = deque(maxlen=TURNS_OPEN)
    while True:
        kind = random.random()
        if kind < TURN_SHARE and len(turns) == TURNS_OPEN:
            beginning = turns[int(random.integers(TURNS_OPEN))]
        elif kind < TURN_SHARE + DOCUMENT_SHARE:
            beginning = documents[int(DOCUMENTS * random.random() ** 2)]  # some documents are asked about more often
        else:
            beginning = systems[int(SYSTEM_PROMPTS * random.random() ** 2)]
        prompt = _lengthened(random, beginning)
        turns.append(prompt)
        yield prompt


def adversarial(seed: int) -> Iterator[bytes]:
    """Every prompt shares a beginning of any length with an earlier one, then goes its own way: splits everywhere."""
    random = np.random.default_rng(seed)
    earlier: deque[bytes] = deque(maxlen=EARLIER)
    while True:
        beginning = earlier[int(random.integers(len(earlier)))] if earlier else b""
        blocks = len(beginning) // HASH_BYTES
        prompt = _lengthened(random, beginning[: int(random.integers(blocks + 1)) * HASH_BYTES])
        earlier.append(prompt)
        yield prompt


KINDS = {"realistic": realistic, "adversarial": adversarial}


def _lengthened(random: np.random.Generator, beginning: bytes) -> bytes:
    """The beginning and at least one new block, BLOCKS_MAX in all at the most."""
    have = len(beginning) // HASH_BYTES
    wanted = max(_between(random, BLOCKS_MIN, BLOCKS_MAX), min(have + 1, BLOCKS_MAX))
    kept = beginning[: (wanted - 1) * HASH_BYTES]
    return kept + random.bytes((wanted - len(kept) // HASH_BYTES) * HASH_BYTES)


def _between(random: np.random.Generator, least: int, most: int) -> int:
    """A whole number, evenly spread on a logarithmic scale."""
    return int(least * (most / least) ** random.random())

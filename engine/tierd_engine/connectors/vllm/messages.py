"""What the scheduler's side tells the workers' side with a step, and what it hears back. Both are pickled by vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tierd_engine.connectors.vllm.api import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass
class Run:
    """Consecutive blocks of one request, and the pages they are in or shall come to.

    hashes: 32 bytes a block, behind `parent`. pages: int64 `[blocks]`. `number` is one for each run of a scheduler.
    """

    number: int
    request_id: str
    parent: bytes
    hashes: bytes
    pages: NDArray[np.int64]


@dataclass
class Work(KVConnectorMetadata):
    """What a step shall load and save.

    `failures` is how many failed loads the scheduler knows of: what it planned before it heard of one may rest on pages that
    were never filled.
    """

    failures: int = 0
    loads: list[Run] = field(default_factory=list)
    saves: list[Run] = field(default_factory=list)


@dataclass
class Done(KVConnectorWorkerMetadata):
    """Runs that have ended, by their numbers: how many of their leading blocks arrived (loads), or are in tierd (saves).

    Each worker says so of its own part of every block, and beside it how many workers have: one.
    """

    loads: dict[int, tuple[int, int]] = field(default_factory=dict)
    saves: dict[int, tuple[int, int]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Done:
        """What several workers say: a block is there if all its parts are, so the least counts."""
        assert isinstance(other, Done)
        return Done(least(self.loads, other.loads), least(self.saves, other.saves))


def least(mine: dict[int, tuple[int, int]], theirs: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Every run of either, with the smaller count of blocks, and the workers of both."""
    both = {
        number: (min(mine[number][0], theirs[number][0]), mine[number][1] + theirs[number][1])
        for number in mine.keys() & theirs.keys()
    }
    return {**theirs, **mine, **both}

"""An io engine that breaks on purpose, wrapped around a real one: for tests, torture and simulation."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from tierd.layout import PAGE_BYTES
from tierd.tiers.io import Block, IoEngine, IoFile, Outcomes


@dataclass(frozen=True)
class Faults:
    """What goes wrong: the chance per block, from 0 to 1, of each kind of fault.

    errors: the block fails with EIO, nothing moved. torn: only its first half is written, and the medium says that
    all is well. flips: one bit of what is read or written is another, unnoticed.
    """

    read_errors: float = 0.0
    write_errors: float = 0.0
    torn: float = 0.0
    read_flips: float = 0.0
    write_flips: float = 0.0


class FaultyEngine:
    """Another engine's files with faults, in an order that depends on the seed only (with one thread)."""

    name = "faulty"

    def __init__(self, inner: IoEngine, faults: Faults, seed: int) -> None:
        self.faults, self.random = faults, Random(seed)
        self.injected = 0
        """How many faults happened so far."""
        self._inner = inner

    def open(self, path: Path) -> FaultyFile:
        """Open by the inner engine."""
        return FaultyFile(self, self._inner.open(path))

    def strikes(self, chance: float) -> bool:
        """Whether a fault of that chance happens now."""
        struck = self.random.random() < chance
        self.injected += struck
        return struck


class FaultyFile:
    """A file of the inner engine, block by block."""

    def __init__(self, engine: FaultyEngine, inner: IoFile) -> None:
        self.direct = inner.direct
        self._engine, self._inner = engine, inner

    def read(self, blocks: Sequence[Block]) -> Outcomes:
        """Fill the buffers, or fail, or fill them wrongly."""
        return [self._read(block) for block in blocks]

    def write(self, blocks: Sequence[Block]) -> Outcomes:
        """Write the buffers, or fail, or write something else."""
        return [self._write(block) for block in blocks]

    def close(self) -> None:
        """Close the inner file."""
        self._inner.close()

    def _read(self, block: Block) -> Exception | None:
        engine = self._engine
        if engine.strikes(engine.faults.read_errors):
            return OSError(errno.EIO, "injected: the block cannot be read")
        outcome = _single(self._inner.read, block)
        if engine.strikes(engine.faults.read_flips):
            _flip(np.frombuffer(block[1], np.uint8), engine.random)
        return outcome

    def _write(self, block: Block) -> Exception | None:
        engine, (offset, buffer) = self._engine, block
        if engine.strikes(engine.faults.write_errors):
            return OSError(errno.EIO, "injected: the block cannot be written")
        if engine.strikes(engine.faults.torn):
            half = len(buffer) // 2 // PAGE_BYTES * PAGE_BYTES
            return _single(self._inner.write, (offset, memoryview(buffer)[:half]))
        if engine.strikes(engine.faults.write_flips):
            spoiled = np.frombuffer(mmap.mmap(-1, len(buffer)), np.uint8)  # page aligned, as O_DIRECT wants it
            spoiled[:] = np.frombuffer(buffer, np.uint8)
            _flip(spoiled, engine.random)
            return _single(self._inner.write, (offset, spoiled))
        return _single(self._inner.write, block)


def _single(call: Callable[[Sequence[Block]], Outcomes], block: Block) -> Exception | None:
    return call([block])[0]


def _flip(data: NDArray[np.uint8], random: Random) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)

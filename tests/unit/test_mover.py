"""In which order io threads take what they are given: what somebody waits for comes first."""

from __future__ import annotations

import asyncio
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.core.plan import DEMAND, IO_ERROR, PREFETCH, WRITE_BACK, Transfer
from tierd.layout import Layout
from tierd.mover import Mover
from tierd.tiers.segment import Medium

PATIENCE_SECONDS = 20


class Memory:
    """A space with two tiers in memory, whose io begins when the test says so."""

    namespace = SimpleNamespace(layout=Layout(layers=1, kv_heads=1, head_dim=8, dtype="float16"))
    tier = SimpleNamespace(medium=Medium.MEMORY)

    def __init__(self) -> None:
        self.begun, self.may_begin = Event(), Event()
        self.finished: list[int] = []

    def arena(self, name: str) -> Any:
        return self

    def payloads(self, slots: NDArray[np.int32]) -> list[NDArray[np.uint8]]:
        self.begun.set()
        assert self.may_begin.wait(PATIENCE_SECONDS)
        return [np.zeros(16, np.uint8) for _ in slots]

    def finish(self, transfer: Transfer, outcome: NDArray[np.uint8], now: int) -> None:
        assert not outcome.any()
        self.finished.append(transfer.id)


def order_of(transfers: list[tuple[int, str]], hastened: tuple[int, ...] = ()) -> list[int]:
    """In which order transfers of one block (number, reason) end on one thread, which has begun with the first of them."""

    async def story() -> list[int]:
        memory, ended = Memory(), asyncio.Event()
        mover = Mover(1, lambda space, transfer: len(memory.finished) == len(transfers) and ended.set())
        slots = np.zeros(1, np.int32)
        made = {
            number: Transfer(number, reason, "gpu", "cpu", slots, slots, bytes(32), bytes(32)) for number, reason in transfers
        }
        for at, transfer in enumerate(made.values()):
            mover.submit(memory, transfer)  # type: ignore[arg-type]
            if at == 0:
                assert await asyncio.to_thread(memory.begun.wait, PATIENCE_SECONDS)
        for number in hastened:
            mover.hasten(made[number])
        memory.may_begin.set()
        await asyncio.wait_for(ended.wait(), PATIENCE_SECONDS)
        await mover.close()
        return memory.finished

    return asyncio.run(story())


def test_demand_comes_before_prefetch_before_write_back() -> None:
    """Of those with one reason the first comes first."""
    transfers = [(1, WRITE_BACK), (2, WRITE_BACK), (3, PREFETCH), (4, DEMAND), (5, PREFETCH), (6, DEMAND)]
    assert order_of(transfers) == [1, 4, 6, 3, 5, 2]


def test_a_prefetch_that_somebody_waits_for_comes_when_a_demand_would() -> None:
    """It goes before what was asked for after it, and before other prefetches."""
    transfers = [(1, WRITE_BACK), (2, PREFETCH), (3, PREFETCH), (4, DEMAND)]
    assert order_of(transfers, hastened=(3,)) == [1, 3, 4, 2]


def test_memory_that_cannot_be_copied_is_a_failed_transfer() -> None:
    """What a GPU refuses fails with its blocks, and the thread goes on with what comes next."""

    class Broken(Memory):
        """Memory of a GPU that has been lost."""

        def payloads(self, slots: NDArray[np.int32]) -> list[NDArray[np.uint8]]:
            raise OSError("the GPU is lost")

        def finish(self, transfer: Transfer, outcome: NDArray[np.uint8], now: int) -> None:
            assert (outcome == IO_ERROR).all()
            self.finished.append(transfer.id)

    async def story() -> list[int]:
        memory, ended = Broken(), asyncio.Event()
        mover = Mover(1, lambda space, transfer: len(memory.finished) == 2 and ended.set())
        for number in (1, 2):
            slots = np.zeros(3, np.int32)
            transfer = Transfer(number, DEMAND, "cpu", "gpu", slots, slots, bytes(96), bytes(96))
            mover.submit(memory, transfer)  # type: ignore[arg-type]
        await asyncio.wait_for(ended.wait(), PATIENCE_SECONDS)
        await mover.close()
        return memory.finished

    assert asyncio.run(story()) == [1, 2]

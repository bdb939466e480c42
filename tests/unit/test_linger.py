"""The loop that looks for a moment before it sleeps, on a real loop whose selector notes how long it was told to wait."""

from __future__ import annotations

import asyncio
import selectors

from tierd import clock
from tierd.linger import BATCH_SECONDS, SECONDS, Linger

AFTER_SECONDS = 0.1


class Noting(selectors.DefaultSelector):
    """A selector that remembers when it was asked, and how long it might have slept (None: without an end)."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[float, float | None]] = []

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.waits.append((clock.monotonic_seconds(), timeout))
        return super().select(timeout)


def waits_after(answers: int) -> tuple[float, list[tuple[float, float | None]]]:
    """When the last of some answers was about to be given, and what the selector was asked from then on."""
    selector = Noting()

    async def serve() -> tuple[float, list[tuple[float, float | None]]]:
        linger = Linger(asyncio.get_running_loop())
        for _ in range(answers):
            del selector.waits[:]
            answering = clock.monotonic_seconds()
            linger.longer()
        await asyncio.sleep(AFTER_SECONDS)
        return answering, list(selector.waits)

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        return runner.run(serve())


def test_after_an_answer_the_loop_looks_before_it_sleeps() -> None:
    """The first wait only looks, and no sleep begins within the moment."""
    answering, waits = waits_after(1)
    assert waits[0][1] == 0
    assert all(at >= answering + SECONDS for at, timeout in waits if timeout != 0)


def test_after_that_moment_the_loop_sleeps() -> None:
    """An idle daemon takes no CPU time."""
    for answers in (1, 3):
        _, waits = waits_after(answers)
        assert any(timeout is None or timeout > AFTER_SECONDS / 2 for _, timeout in waits)


def test_between_answers_that_are_close_the_loop_looks_for_as_long_as_a_batch_takes() -> None:
    """No sleep begins before."""
    answering, waits = waits_after(2)
    assert waits[0][1] == 0
    assert all(at >= answering + BATCH_SECONDS for at, timeout in waits if timeout != 0)


def test_many_answers_ask_for_one_callback() -> None:
    """Each turn of the loop looks at the clock once, however much was answered."""
    loop = asyncio.new_event_loop()
    linger = Linger(loop)
    for _ in range(100):
        linger.longer()
    assert len(loop._ready) == 1  # type: ignore[attr-defined]
    loop.close()

"""The asynchronous front door: streams side by side, streams that are closed early, and an engine that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.engine.greedy import Greedy
from tests.engine.test_engine_tokens import prompt
from tierd.errors import Closed, Invalid
from tierd_engine.async_llm import AsyncLLM
from tierd_engine.llm import LLM
from tierd_engine.request import Sampling


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[AsyncLLM]:
    """An engine that has lost no page when it ends."""
    engine = AsyncLLM(LLM(path, pages=64, chunk_tokens=32))
    try:
        yield engine
    finally:
        await engine.close()
        if not isinstance(engine.failure, ZeroDivisionError):
            engine.llm.check()


def told(path: Path) -> Callable[[list[int], int], str]:
    """The oracle's text for a prompt of token ids."""
    greedy = Greedy(AutoModelForCausalLM.from_pretrained(path))
    return lambda tokens, new: bytes(greedy(tokens, new)).decode()


async def text_of(engine: AsyncLLM, tokens: list[int], new: int) -> str:
    """A whole answer."""
    return "".join([piece.text async for piece in engine.stream([tokens], Sampling(max_tokens=new))])


def test_streams_side_by_side_are_what_each_would_be_alone(spoken: Path) -> None:
    """Twelve at once, some the same, each piece by piece."""
    prompts = [prompt(20 + 9 * (number % 6), seed=number % 4) for number in range(12)]

    async def main() -> list[str]:
        async with opened(spoken) as engine:
            return await asyncio.gather(*(text_of(engine, tokens, 20) for tokens in prompts))

    expected = told(spoken)
    assert asyncio.run(main()) == [expected(tokens, 20) for tokens in prompts]


def test_a_stream_that_is_closed_early_is_aborted(spoken: Path) -> None:
    """Its neighbour does not notice."""

    async def main() -> tuple[str, dict[str, int]]:
        async with opened(spoken) as engine:
            other = asyncio.ensure_future(text_of(engine, prompt(30), 40))
            async with aclosing(engine.stream([prompt(40, seed=2)], Sampling(max_tokens=900))) as pieces:
                async for _ in pieces:
                    break
            return await other, engine.llm.engine.scheduler.counts.sequences

    text, ended = asyncio.run(main())
    assert text == told(spoken)(prompt(30), 40)
    assert ended["length"] == 1


def test_a_refused_request_raises_and_nothing_else_happens(spoken: Path) -> None:
    """Of two prompts the second is too long: the first is aborted too."""

    async def main() -> None:
        async with opened(spoken) as engine:
            with pytest.raises(Invalid, match="do not fit 64 pages"):
                async for _ in engine.stream([prompt(10), prompt(1024)], Sampling(max_tokens=9)):
                    pass
            assert await text_of(engine, prompt(10), 3)

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_engine_ends_all_streams_with_an_error(spoken: Path) -> None:
    """Those under way and those that come later; nobody waits for ever."""

    async def main() -> None:
        async with opened(spoken) as engine:
            streams = [asyncio.ensure_future(text_of(engine, prompt(30, seed=seed), 900)) for seed in range(3)]
            await asyncio.sleep(0.2)
            engine.llm.engine.runner.run = lambda _: 1 / 0
            for ended in await asyncio.gather(*streams, return_exceptions=True):
                assert isinstance(ended, Closed) and "ZeroDivisionError" in str(ended)
            with pytest.raises(Closed, match="restart it"):
                await text_of(engine, prompt(5), 5)

    asyncio.run(main())

"""The engine's front door for servers: one thread steps the engine, any number of coroutines wait for tokens.

Coroutines put calls into a queue; between two steps the thread makes them, so that the engine itself needs no lock. After
a step it hands all new text of all requests to the event loop in one call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Thread

from tierd.errors import Closed
from tierd_engine.engine import Engine
from tierd_engine.llm import LLM
from tierd_engine.request import NO_HINTS, Hints, Sampling
from tierd_engine.sequence import Sequence

IDLE_SECONDS = 0.5


@dataclass(frozen=True)
class Piece:
    """What a step added to answer `index`: text that can be shown, and the reason when it was the last.

    `tokens` and `hit_tokens` are of the whole answer and its prompt, so far.
    """

    index: int
    text: str
    tokens: int
    reason: str
    hit_tokens: int
    first_token_seconds: float


Pieces = asyncio.Queue[Piece | BaseException]


class AsyncLLM:
    """Streams from an LLM, which it owns until `close`; for one event loop.

    `failure` is the error that ended the engine's thread, if one did: a bug, and every request says so.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.failure: BaseException | None = None
        self._engine: Engine = llm.engine
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._queues: set[Pieces] = set()
        """Whoever waits; only the event loop's thread looks at it."""
        self._streams: dict[tuple[int, int], tuple[Pieces, int]] = {}
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="tierd-engine", daemon=True)
        self._thread.start()

    async def stream(
        self, prompts: list[list[int]], sampling: Sampling, hints: Hints = NO_HINTS
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of all answers as they come, sample `s` of prompt `p` as number `p * n + s`; closing it early aborts them.

        Raises Invalid for what can never be served, Busy when too many wait, Closed when the engine has failed.
        """
        queue: Pieces = asyncio.Queue()
        added: list[Sequence] = []

        def add() -> None:
            try:
                for tokens in prompts:
                    added.extend(self._engine.add(tokens, sampling, self.llm.tokenizer, hints))
                self._streams.update((sequence.key, (queue, index)) for index, sequence in enumerate(added))
            except Exception as error:
                self._loop.call_soon_threadsafe(queue.put_nowait, error)

        def abort() -> None:
            self._engine.abort(added)
            for sequence in added:
                self._streams.pop(sequence.key, None)

        self._check_alive()
        self._queues.add(queue)
        self._calls.put(add)
        try:
            left = sampling.n * len(prompts)
            while left:
                piece = await queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                left -= bool(piece.reason)
                yield piece
        finally:
            self._queues.discard(queue)
            self._calls.put(abort)

    async def close(self) -> None:
        """Abort everything, end the thread, close the LLM."""
        self._stopping.set()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.llm.close)

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise Closed(f"the engine has ended ({self.failure!r}): restart it") from self.failure

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._make_calls()
                if self._engine.idle:
                    self._engine.memory.poll()  # copies that ended give their pages back
                else:
                    self._hand_over(self._engine.step())
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._loop.call_soon_threadsafe(self._end_streams)

    def _end_streams(self) -> None:
        """The thread has ended: nobody will hear from it."""
        self.failure = self.failure or Closed("the engine has stopped")
        for queue in self._queues:
            queue.put_nowait(Closed(f"the engine has ended ({self.failure!r}): restart it"))

    def _make_calls(self) -> None:
        """What coroutines want; waits for it when there is nothing else to do."""
        try:
            call = self._calls.get(timeout=IDLE_SECONDS) if self._engine.idle else self._calls.get_nowait()
            while True:
                call()
                call = self._calls.get_nowait()
        except Empty:
            return

    def _hand_over(self, sequences: list[Sequence]) -> None:
        streams = [(self._streams.get(sequence.key), sequence) for sequence in sequences]
        pieces = [(stream[0], piece_of(sequence, stream[1])) for stream, sequence in streams if stream]
        if pieces:
            self._loop.call_soon_threadsafe(_deliver, pieces)


def piece_of(sequence: Sequence, index: int) -> Piece:
    """What is new of a sequence since this was asked last."""
    assert sequence.text is not None
    seconds = sequence.seconds["first"] - sequence.seconds["arrived"]
    text = sequence.text.take(finished=bool(sequence.reason))
    return Piece(index, text, len(sequence.new_tokens), sequence.reason, sequence.hit_tokens, seconds)


def _deliver(pieces: list[tuple[Pieces, Piece]]) -> None:
    for queue, piece in pieces:
        queue.put_nowait(piece)

"""The engine: sequences in, one token each out with every step. Everything in one thread, which nothing here blocks."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import Any

from transformers import PreTrainedModel

from tierd.clock import monotonic_seconds
from tierd.errors import Invalid
from tierd_engine.memory import Memory
from tierd_engine.request import NO_HINTS, Hints, Limits, Sampling
from tierd_engine.runner import Runner
from tierd_engine.scheduler import Scheduler
from tierd_engine.sequence import Sequence
from tierd_engine.text import Text

NEWEST = 0.2
IDLE_SECONDS = 0.002
"""How long to sleep when all sequences wait for memory: its answers end the sleep, new requests do not."""
PAUSE_SHARE, PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.25, 0.001, 0.05
"""A step that meets a new request waits for its blocks, once, and at most for this share of what the last step took: whoever
arrives a moment too late waits for a whole step."""
TOOL_CALL_ENDS = ("</tool_call>", "[/TOOL_CALLS]")


class Engine:
    """A model, its memory, and the sequences that are in work. `check` when idle proves that no page was lost."""

    def __init__(self, model: PreTrainedModel, memory: Memory, limits: Limits, stop_tokens: frozenset[int]) -> None:
        self.memory = memory
        self.scheduler = Scheduler(memory, limits)
        self.runner = Runner(model, memory.tensor, memory.layout)
        self.stop_tokens = stop_tokens
        self._positions = getattr(model.config, "max_position_embeddings", None)
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._added = 0
        self.pause_seconds = PAUSE_SECONDS_MIN
        """How long the next step may wait for the blocks of new requests."""

    @property
    def idle(self) -> bool:
        """Whether no sequence is left and nothing is on its way; until then, keep calling `step`."""
        return self.scheduler.idle

    def room(self) -> int:
        """The most tokens that a sequence can have, prompt and answer together."""
        pool = self.memory.count * self.memory.layout.block_tokens
        return min(pool, self._positions or pool)

    def check_request(self, tokens: Tokens[int], sampling: Sampling) -> None:
        """Raise Invalid when this can never be served."""
        if len(tokens) < 1 or sampling.max_tokens < 1:
            raise Invalid(f"request: {len(tokens)} prompt and {sampling.max_tokens} new tokens; both must be at least 1")
        if not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            raise Invalid(
                f"request: token ids from {min(tokens)} to {max(tokens)}; the model knows 0 to {self._vocabulary - 1}"
            )
        total = len(tokens) + sampling.max_tokens
        pages, block = self.memory.count, self.memory.layout.block_tokens
        if total > pages * block:
            raise Invalid(f"request: {total} tokens do not fit {pages} pages ({pages * block} tokens); raise `pages`")
        if self._positions and total > self._positions:
            raise Invalid(f"request: {total} tokens, but the model knows {self._positions} positions; shorten the prompt")

    def add(self, tokens: Tokens[int], sampling: Sampling, tokenizer: Any = None, hints: Hints = NO_HINTS) -> list[Sequence]:
        """Queue a request: one sequence a sample, which share their prompt. With a tokenizer they have `text`.

        Raises Invalid for what can never be served, Busy when the queue is full.
        """
        self.check_request(tokens, sampling)
        sequences = []
        try:
            for sample in range(sampling.n):
                sequence = Sequence(
                    tokens,
                    self.memory.layout.block_tokens,
                    sampling,
                    number=self._added,
                    sample=sample,
                    text=Text(tokenizer, sampling.stop) if tokenizer else None,
                    hints=hints,
                )
                sequence.seconds["arrived"] = monotonic_seconds()
                self.scheduler.add(sequence)
                sequences.append(sequence)
        except Exception:
            self.abort(sequences)
            raise
        self._added += 1
        return sequences

    def abort(self, sequences: list[Sequence]) -> None:
        """End those that have not ended."""
        for sequence in sequences:
            if not sequence.reason:
                self.scheduler.end(sequence, "abort")

    def step(self) -> list[Sequence]:
        """Compute what the scheduler plans; returns the sequences that have a new token. Sleeps a little if it plans none."""
        began = monotonic_seconds()
        self.scheduler.admit(began)
        while (left := began + self.pause_seconds - monotonic_seconds()) > 0 and self.scheduler.expecting(left):
            self.memory.wait(left)
            self.scheduler.admit(monotonic_seconds())
        chunks = self.scheduler.plan()
        if not chunks:
            self.memory.wait(IDLE_SECONDS)
            return []
        began = monotonic_seconds()
        prompt_tokens = sum(chunk.count for chunk in chunks if chunk.count > 1)
        complete = self.runner.run(chunks)
        self.scheduler.computed(chunks)
        for chunk, logits in complete:
            self._append(chunk.sequence, chunk.sequence.sampler.pick(logits))
        took = monotonic_seconds() - began
        self.pause_seconds = min(max(PAUSE_SHARE * took, PAUSE_SECONDS_MIN), PAUSE_SECONDS_MAX)
        if prompt_tokens > len(chunks):
            self._measured(prompt_tokens / took)
        return [chunk.sequence for chunk, _ in complete]

    def settle(self) -> None:
        """Wait until what ended sequences held is given back; no sequence may be left."""
        while not self.idle:
            assert not self.step()

    def check(self) -> None:
        """Raise AssertionError when an idle engine holds anything."""
        self.scheduler.check()

    def close(self) -> None:
        """End all sequences, and close the memory."""
        self.abort([*self.scheduler.waiting, *self.scheduler.running])
        self.settle()
        self.memory.close()

    def _append(self, sequence: Sequence, token: int) -> None:
        """One more token; the sequence ends with it or goes on."""
        sequence.tokens.append(token)
        now = monotonic_seconds()
        sequence.seconds.setdefault("first", now)
        text, sampling = sequence.text, sequence.sampling
        if text:
            text.add(token)
        reason = turn = None
        if not sampling.ignore_eos and token in self.stop_tokens:
            reason, turn = "stop", "end_turn"
            if text and text.whole.rstrip().endswith(TOOL_CALL_ENDS):
                turn = "tool_use"
        elif token in sampling.stop_tokens or (text and text.stopped):
            reason = turn = "stop"
        elif len(sequence.tokens) - sequence.prompt_tokens >= sampling.max_tokens:
            reason = turn = "length"
        if reason:
            if text:
                text.finish()
            sequence.seconds["ended"] = now
            self.scheduler.end(sequence, reason, turn)

    def _measured(self, tokens_per_second: float) -> None:
        before = self.scheduler.prefill_tokens_per_second or tokens_per_second
        self.scheduler.prefill_tokens_per_second = before + NEWEST * (tokens_per_second - before)

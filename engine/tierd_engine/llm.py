"""The engine's front door: load a model, generate, and let tierd deliver prefixes that were computed before."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from tierd.block import HASH_BYTES
from tierd.clock import monotonic_seconds
from tierd.errors import Invalid
from tierd.layout import Layout
from tierd_engine.model import fingerprint, layout_of, load_model, load_tokenizer
from tierd_engine.pages import PagePool
from tierd_engine.runner import Runner
from tierd_engine.sampler import Sampler
from tierd_engine.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd.client import Client


PHASES = ("hash", "load", "prefill", "decode", "store")


class Connect(Protocol):
    """Makes the client for a model, once the engine knows its name and layout: `functools.partial(Client, socket)`."""

    def __call__(self, *, model: str, layout: Layout) -> Client: ...


class LLM:
    """A loaded model that generates from text or token ids, one request at a time.

    `connect` gives it a tierd client, which it then owns; without one everything is computed, and the tokens are the
    same. `pages` KV pages of 16 tokens bound the length of a request. Raises Invalid for what the engine cannot run.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        connect: Connect | None = None,
        pages: int = 512,
        dtype: str = "float32",
        device: str = "cpu",
        chunk_tokens: int = 512,
    ) -> None:
        if connect and device != "cpu":
            raise Invalid(f"engine: KV pages on {device!r} cannot be shared with tierd; use device='cpu' or no client")
        self.model_path = Path(model_path)
        model = load_model(model_path, dtype, device)
        self.layout = layout_of(model, dtype)
        self.pool = PagePool(self.layout, pages, device)
        self.runner = Runner(model, self.pool, chunk_tokens)
        self.stop_tokens = _stop_tokens(model.generation_config.eos_token_id)
        self.client = connect(model=fingerprint(model), layout=self.layout) if connect else None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer; raises Invalid when it has none."""
        return load_tokenizer(self.model_path)

    def generate(
        self,
        prompt: str | Tokens[int],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generation:
        """Continue `prompt` by up to `max_new_tokens` tokens or to the model's stop token; greedy at temperature 0.

        Raises Invalid when the request is empty or does not fit the pages or the model.
        """
        watch = Stopwatch()
        sampler = Sampler(temperature, top_p, seed)
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        self._check(len(tokens), max_new_tokens)
        sequence = Sequence(tokens, self.pool)
        try:
            hit_tokens = self._load(sequence, watch)
            with watch("prefill"):
                sequence.tokens.append(sampler.pick(self.runner.run(sequence)))
            first_token_seconds = watch.elapsed
            stored = self._store(sequence, hit_tokens // self.layout.block_tokens, watch)
            with watch("decode"):
                while not self._finished(sequence, max_new_tokens):
                    sequence.tokens.append(sampler.pick(self.runner.run(sequence)))
            self._store(sequence, stored, watch)
        finally:
            sequence.close()
        new = sequence.tokens[sequence.prompt_tokens :]
        return Generation(
            tokens=new,
            text=self.tokenizer.decode(new, skip_special_tokens=True) if isinstance(prompt, str) else None,
            prompt_tokens=sequence.prompt_tokens,
            hit_tokens=hit_tokens,
            time_to_first_token_seconds=first_token_seconds,
            timings=watch.seconds,
        )

    def close(self) -> None:
        """Close the client."""
        if self.client:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check(self, prompt_tokens: int, max_new_tokens: int) -> None:
        if prompt_tokens < 1 or max_new_tokens < 1:
            raise Invalid(f"request: {prompt_tokens} prompt and {max_new_tokens} new tokens; both must be at least 1")
        total = prompt_tokens + max_new_tokens
        room = self.pool.count * self.layout.block_tokens
        if total > room:
            raise Invalid(f"request: {total} tokens do not fit {self.pool.count} pages ({room} tokens); raise `pages`")
        longest = getattr(self.runner.model.config, "max_position_embeddings", None) or total
        if total > longest:
            raise Invalid(f"request: {total} tokens, but the model knows {longest} positions; shorten the prompt")

    def _load(self, sequence: Sequence, watch: Stopwatch) -> int:
        """Fill leading pages from tierd; returns how many tokens that saved."""
        sequence.grow()
        if not self.client or not sequence.blocks_loadable:
            return 0
        with watch("hash"):
            hashes = sequence.hashes()[: sequence.blocks_loadable * HASH_BYTES]
        with watch("load"):
            blocks = self.client.load(hashes, self.pool.bytes, sequence.block_table[: sequence.blocks_loadable])
        sequence.computed = blocks * self.layout.block_tokens
        return sequence.computed

    def _store(self, sequence: Sequence, first: int, watch: Stopwatch) -> int:
        """Offer the computed blocks from `first` on to tierd; returns the first that was not offered."""
        last = sequence.blocks_computed
        if not self.client or first >= last:
            return first
        with watch("store"):
            hashes = sequence.hashes()[first * HASH_BYTES : last * HASH_BYTES]
            pages = sequence.block_table[first:last]
            self.client.store(hashes, self.pool.bytes, pages, parent=sequence.parent(first))
        return last

    def _finished(self, sequence: Sequence, max_new_tokens: int) -> bool:
        enough = len(sequence.tokens) - sequence.prompt_tokens >= max_new_tokens
        return enough or sequence.tokens[-1] in self.stop_tokens


@dataclass(frozen=True)
class Generation:
    """What a request gave: the new tokens, their text (for a text prompt), how much was a hit, and where the time went.

    `timings` are seconds spent on hash, load, prefill, decode and store. The time to first token counts from the call
    of `generate` and includes tokenising; storing comes after it.
    """

    tokens: list[int]
    text: str | None
    prompt_tokens: int
    hit_tokens: int
    time_to_first_token_seconds: float
    timings: dict[str, float]


@dataclass
class Stopwatch:
    """Adds up seconds under names: `with watch("prefill"): ...`."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _started: float = field(default_factory=monotonic_seconds)

    @property
    def elapsed(self) -> float:
        """Seconds since the watch was made."""
        return monotonic_seconds() - self._started

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the body's seconds under `name`."""
        start = self.elapsed
        yield
        self.seconds[name] += self.elapsed - start


def _stop_tokens(eos: int | list[int] | None) -> frozenset[int]:
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])

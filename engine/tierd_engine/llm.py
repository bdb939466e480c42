"""The engine's front door for programs: load a model, generate, and let tierd deliver prefixes that were computed before."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast, overload

import torch

from tierd.clock import monotonic_seconds
from tierd.errors import Invalid
from tierd.layout import Layout
from tierd_engine.copying import CopyingMemory
from tierd_engine.engine import Engine
from tierd_engine.memory import Memory, PrivateMemory
from tierd_engine.model import BLOCK_TOKENS, fingerprint, layout_of, load_model, load_tokenizer
from tierd_engine.request import Limits, Sampling
from tierd_engine.sequence import Sequence
from tierd_engine.tier import SLOTS_MAX, TierMemory

if TYPE_CHECKING:
    from tierd.client import Client

Prompt = str | Tokens[int]
MEMORIES = ("copy", "tier")


class Connect(Protocol):
    """Makes the client for a model, once the engine knows its name and layout.

    `functools.partial(Client, socket)`; for memory="tier" `functools.partial(PageClient, socket)`, which is also told
    `pages_max`, `private_pages` and `device`.
    """

    def __call__(self, *, model: str, layout: Layout, **pages: Any) -> Any: ...


class LLM:
    """A loaded model that generates from text or token ids, many requests at a time.

    `connect` gives it a tierd client, which it then owns; without one everything is computed, and the tokens are the
    same. With `memory` "copy" blocks are copied to and from tierd's cpu tier, with "tier" the slots of its gpu tier are
    the pages. `pages` KV pages of `block_tokens` tokens are the engine's own: they bound what is in work ("tier": the
    longest request, and what is in work while tierd is away). On a `device` "cuda" tierd's kernels attend, and copy engines
    move blocks between its pages and tierd's memory; with triton installed. Raises Invalid for what the engine cannot run.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        connect: Connect | None = None,
        memory: str = "copy",
        pages: int = 512,
        dtype: str = "float32",
        device: str = "cpu",
        block_tokens: int = BLOCK_TOKENS,
        chunk_tokens: int = 512,
        running_max: int = 64,
    ) -> None:
        check_device(device)
        if memory not in MEMORIES:
            raise Invalid(f"engine: memory {memory!r} is not one of {', '.join(MEMORIES)}")
        self.model_path = Path(model_path)
        model = load_model(model_path, dtype, device)
        self.layout = layout_of(model, dtype, block_tokens)
        self.client: Client | None = None
        self.memory: Memory
        if connect and memory == "tier":
            sizes = {"pages_max": SLOTS_MAX, "private_pages": pages}
            slots = connect(model=fingerprint(model), layout=self.layout, device=device, **sizes)
            self.memory = TierMemory(self.layout, slots)
        elif connect:
            self.client = connect(model=fingerprint(model), layout=self.layout)
            self.memory = CopyingMemory(self.layout, pages, self.client, device)
        else:
            self.memory = PrivateMemory(self.layout, pages, device)
        limits = Limits(chunk_tokens=chunk_tokens, running_max=running_max)
        self.engine = Engine(model, self.memory, limits, _stop_tokens(model.generation_config.eos_token_id))

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer; raises Invalid when it has none."""
        return load_tokenizer(self.model_path)

    @overload
    def generate(self, prompt: Prompt, max_new_tokens: int = 64, **sampling: Any) -> Generation: ...

    @overload
    def generate(self, prompt: list[str] | list[list[int]], max_new_tokens: int = 64, **sampling: Any) -> list[Generation]: ...

    def generate(self, prompt: Any, max_new_tokens: int = 64, **sampling: Any) -> Any:
        """Continue a prompt, or a list of them together, by up to `max_new_tokens` tokens or to the model's stop token.

        Other arguments are `Sampling`'s: temperature (0: greedy), top_p, seed, stop, ... With n > 1 the answers to a prompt
        follow each other, and come as a list in any case. Raises Invalid for a request that is empty or does not fit.
        """
        asked = Sampling(max_tokens=max_new_tokens, **sampling)
        many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        prompts: list[Prompt] = cast("list[Prompt]", prompt) if many else [prompt]
        sequences: list[Sequence] = []
        arrived = monotonic_seconds()
        try:
            for one in prompts:
                tokens = self.tokenizer(one)["input_ids"] if isinstance(one, str) else one
                with_text = isinstance(one, str) or asked.stop
                sequences += self.engine.add(tokens, asked, self.tokenizer if with_text else None)
            for sequence in sequences:
                sequence.seconds["arrived"] = arrived
            while not self.engine.idle:
                self.engine.step()
        except BaseException:
            self.engine.abort(sequences)
            self.engine.settle()
            raise
        done = [Generation.of(sequence) for sequence in sequences]
        return done if many or asked.n > 1 else done[0]

    def check(self) -> None:
        """Raise AssertionError when pages are lost."""
        self.engine.check()

    def close(self) -> None:
        """Finish what is being stored, and close the client."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Generation:
    """What a request gave: the new tokens, their text (for a text prompt), why it ended, how much was a hit, and the time.

    `timings` are seconds spent waiting for blocks and pages (load), and on prefill and decode; the first two make the
    time to first token, which counts from the call of `generate` and includes tokenising.
    """

    tokens: list[int]
    text: str | None
    reason: str
    prompt_tokens: int
    hit_tokens: int
    time_to_first_token_seconds: float
    timings: dict[str, float]

    @classmethod
    def of(cls, sequence: Sequence) -> Generation:
        """The answer of a sequence that has ended."""
        at = sequence.seconds
        return cls(
            tokens=sequence.new_tokens,
            text=sequence.text.whole if sequence.text else None,
            reason=sequence.reason,
            prompt_tokens=sequence.prompt_tokens,
            hit_tokens=sequence.hit_tokens,
            time_to_first_token_seconds=at["first"] - at["arrived"],
            timings={
                "load": at["loaded"] - at["arrived"],
                "prefill": at["first"] - at["loaded"],
                "decode": at["ended"] - at["first"],
            },
        )


def check_device(device: str) -> None:
    """Raise Invalid unless the engine can compute there: on the CPU, or on a GPU that torch finds, with triton installed."""
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise Invalid(f"engine: device {device!r} is not one of 'cpu', 'cuda' and 'cuda:N'")
    if not torch.cuda.is_available() or (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise Invalid(f"engine: torch {torch.__version__} finds no GPU that is {device!r}; use device='cpu'")
    if importlib.util.find_spec("triton") is None:
        raise Invalid(f"engine: attention on {device!r} needs triton: pip install triton")


def _stop_tokens(eos: int | list[int] | None) -> frozenset[int]:
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])

"""What is asked of the engine, and the limits within which it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tierd.block import ROOT
from tierd.client import KEEP_PRIORITY_MAX, KEEP_SECONDS_MAX, KEEP_SECONDS_MIN
from tierd.errors import Invalid

SAMPLES_MAX = 128
STOP_STRINGS_MAX = 16
CONVERSATION_MAX = 128


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued: greedy at temperature 0, else nucleus sampling; `n` samples with seeds `seed + i`.

    A sample ends after `max_tokens`, with one of the `stop_tokens` (the model's own are added unless `ignore_eos`), or
    before the first of the `stop` strings in its text. Raises Invalid with the name of what cannot be.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise Invalid(f"sampling: temperature {self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise Invalid(f"sampling: top_p {self.top_p} must be above 0 and at most 1")
        if not 1 <= self.n <= SAMPLES_MAX:
            raise Invalid(f"sampling: n {self.n} must be from 1 to {SAMPLES_MAX}")
        if not 0 <= self.seed < 1 << 62:
            raise Invalid(f"sampling: seed {self.seed} must be from 0 to 2^62 - 1")
        if len(self.stop) > STOP_STRINGS_MAX or not all(self.stop):
            raise Invalid(f"sampling: stop must be at most {STOP_STRINGS_MAX} strings, none of them empty")


@dataclass(frozen=True)
class Hints:
    """What tierd is told of a request when it ends: which `conversation` it was a turn of, and that its chain is to be kept for
    `ttl_seconds` (0: no longer than others), of what is kept at which `priority`. Raises Invalid for what cannot be told.
    """

    conversation: str | None = None
    ttl_seconds: float = 0.0
    priority: int = 0

    def __post_init__(self) -> None:
        if self.conversation is not None and not 1 <= len(self.conversation) <= CONVERSATION_MAX:
            raise Invalid(f"conversation: {len(self.conversation)} characters; 1 to {CONVERSATION_MAX} are possible")
        if self.ttl_seconds and not KEEP_SECONDS_MIN <= self.ttl_seconds <= KEEP_SECONDS_MAX:
            raise Invalid(f"keep: ttl_seconds {self.ttl_seconds} must be from {KEEP_SECONDS_MIN} to {KEEP_SECONDS_MAX:.0f}")
        if not 0 <= self.priority <= KEEP_PRIORITY_MAX:
            raise Invalid(f"keep: priority {self.priority} must be from 0 to {KEEP_PRIORITY_MAX}")

    def tell(self, client: Any, block: bytes, turn: str) -> None:
        """Tell a `Client` or `PageClient` of the end of the turn whose last full block this is (ROOT: it has none)."""
        client.ended(block, turn, self.conversation)
        if self.ttl_seconds and block != ROOT:
            client.keep(block, self.ttl_seconds, self.priority)


NO_HINTS = Hints()


@dataclass(frozen=True)
class Limits:
    """`chunk_tokens` bound the prompt tokens of one step, `running_max` its sequences, `waiting_max` those in the queue."""

    chunk_tokens: int = 512
    running_max: int = 64
    waiting_max: int = 4096

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "running_max", "waiting_max"):
            if getattr(self, name) < 1:
                raise Invalid(f"engine: {name} is {getattr(self, name)}; it must be at least 1")

"""Three shapes of load and their control. Clients talk in turns; a turn's prompt is all that was said before, and more."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

CONTROL = "one-shot"


@dataclass(frozen=True)
class Turn:
    """Tokens that are added to the conversation, and the length of the answer."""

    tokens: list[int]
    answer_tokens: int


@dataclass(frozen=True)
class Workload:
    """Talks, of which `concurrency` are held at a time; the next begins when one ends."""

    name: str
    talks: list[list[Turn]]
    concurrency: int

    @property
    def longest(self) -> int:
        """Tokens of the longest talk."""
        return max(sum(len(turn.tokens) + turn.answer_tokens for turn in talk) for talk in self.talks)


class Writer:
    """Makes up text: random token ids, the same for the same seed."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._random = Random(seed)
        self._vocabulary = vocabulary

    def text(self, tokens: int) -> list[int]:
        """So many new tokens."""
        return [self._random.randrange(self._vocabulary) for _ in range(tokens)]

    def length(self, middle: int, spread: float, longest: int) -> int:
        """A log-normal length: most are short, a few very long."""
        return max(8, min(longest, int(self._random.lognormvariate(0, spread) * middle)))


def workloads(vocabulary: int, scale: float, seed: int) -> list[Workload]:
    """All of them; `scale` 1 is some hundred requests of up to 2,000 tokens, less has fewer talks."""
    write = Writer(vocabulary, seed)

    def count(talks: int) -> int:
        return max(2, round(talks * scale))

    system, documents = write.text(256), [write.text(640) for _ in range(4)]
    agents = []
    for number in range(count(16)):
        first = Turn(system + documents[number % len(documents)] + write.text(32), 16)
        agents.append([first, *(Turn(write.text(48), 16) for _ in range(3))])
    lengths = [write.length(128, 1.0, 1600) for _ in range(count(24))]
    tools = write.text(192)
    return [
        Workload("prefix-reuse", agents, 4),
        Workload("long-tail", [[Turn(write.text(length), 16)] * 1 + [Turn(write.text(24), 16)] for length in lengths], 6),
        Workload("many", [[Turn(tools + write.text(64), 16)] for _ in range(count(64))], 32),
        Workload(CONTROL, [[Turn(write.text(384), 16)] for _ in range(count(16))], 2),
    ]

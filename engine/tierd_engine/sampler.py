"""Chooses the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tierd.errors import Invalid


@dataclass
class Sampler:
    """Greedy at temperature 0, else nucleus sampling (Holtzman et al. 2019); the same seed gives the same tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    _random: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise Invalid(f"sampling: temperature {self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise Invalid(f"sampling: top_p {self.top_p} must be above 0 and at most 1")
        self._random = torch.Generator().manual_seed(self.seed)

    def pick(self, logits: torch.Tensor) -> int:
        """The next token id, from logits `float32[vocabulary]`."""
        if self.temperature == 0:
            return int(logits.argmax())
        chances, tokens = torch.softmax(logits.cpu() / self.temperature, dim=0).sort(descending=True)
        # A token stays while those before it have not reached top_p: the first always stays.
        chances[chances.cumsum(0) - chances >= self.top_p] = 0
        return int(tokens[torch.multinomial(chances, 1, generator=self._random)])

"""Chooses the next token from logits."""

from __future__ import annotations

import torch


class Sampler:
    """Greedy at temperature 0, else nucleus sampling (Holtzman et al. 2019); the same seed gives the same tokens."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self._random = torch.Generator().manual_seed(seed) if temperature else None

    def pick(self, logits: torch.Tensor) -> int:
        """The next token id, from logits `float32[vocabulary]`."""
        if self.temperature == 0:
            return int(logits.argmax())
        chances, tokens = torch.softmax(logits.cpu() / self.temperature, dim=0).sort(descending=True)
        # A token stays while those before it have not reached top_p: the first always stays.
        chances[chances.cumsum(0) - chances >= self.top_p] = 0
        return int(tokens[torch.multinomial(chances, 1, generator=self._random)])

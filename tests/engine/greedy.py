"""What transformers alone says, and how near two tokens were where an engine says something else."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from transformers import PreTrainedModel

GAP_MAX = 1e-4


class Greedy:
    """The oracle: single-request greedy `generate` of transformers; `ties` counts the answers that were off by a tie."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.ties = 0
        self._answer = cache(self._generate)

    def __call__(self, tokens: Sequence[int], new: int) -> list[int]:
        return list(self._answer(tuple(tokens), new))

    def check(self, prompt: Sequence[int], answer: list[int], new: int) -> None:
        """The answer (perhaps cut short) is the oracle's; where it is not, two logits are within 1e-4, and that is shown."""
        expected = self(prompt, new)[: len(answer)]
        if answer == expected:
            return
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
        gaps = logits.max(-1).values - logits[torch.arange(len(answer)), torch.tensor(answer)]
        assert float(gaps.max()) <= GAP_MAX, f"{answer} instead of {expected}: a logit is {float(gaps.max())} below the best"
        self.ties += 1
        warnings.warn(f"{self.ties} answers differ by a tie: logits within {float(gaps.max()):.1e}", stacklevel=2)

    def _generate(self, tokens: tuple[int, ...], new: int) -> list[int]:
        with torch.inference_mode():
            output = self.model.generate(torch.tensor([tokens]), max_new_tokens=new, do_sample=False)
        answer: list[int] = output[0, len(tokens) :].tolist()
        return answer

"""Runs the model over a sequence: whatever of its tokens has no KV yet, in chunks, and answers with logits."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tierd.errors import Invalid
from tierd_engine import attention
from tierd_engine.attention import Step
from tierd_engine.pages import PagePool
from tierd_engine.sequence import Sequence


class Runner:
    """A transformers model that computes with its KV in a `PagePool`.

    A forward pass over one token at construction proves that every layer goes through the pages; raises Invalid if not.
    """

    def __init__(self, model: PreTrainedModel, pool: PagePool, chunk_tokens: int = 512) -> None:
        model.set_attn_implementation(attention.NAME)
        if model.config._attn_implementation != attention.NAME:
            raise Invalid(f"{type(model).__name__} has attention code of its own that cannot be paged; use another model")
        self.model = model.eval()
        self.pool = pool
        self.chunk_tokens = chunk_tokens
        self._prove_every_layer_pages()

    @torch.inference_mode()
    def run(self, sequence: Sequence) -> torch.Tensor:
        """Compute all tokens that have no KV yet; returns the last one's logits, `float32[vocabulary]`.

        A prompt is a long run (prefill), a generated token a run of one (decode). Raises Busy when pages run out.
        """
        sequence.grow()
        assert sequence.computed < len(sequence.tokens), "nothing to compute: the last token is never a hit"
        while sequence.computed < len(sequence.tokens):
            start = sequence.computed
            end = min(start + self.chunk_tokens, len(sequence.tokens))
            step = Step(self.pool, sequence.block_table, start, end)
            logits = self._forward(sequence.tokens[start:end], step)
            sequence.computed = end
        return logits

    def _forward(self, tokens: list[int], step: Step) -> torch.Tensor:
        device = self.pool.tensor.device
        output = self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.arange(step.start, step.end, device=device)[None],
            use_cache=False,
            logits_to_keep=1,
            step=step,
        )
        return output.logits[0, -1].float()

    def _prove_every_layer_pages(self) -> None:
        probe = Sequence([0], self.pool)
        probe.grow()
        step = Step(self.pool, probe.block_table, 0, 1)
        try:
            with torch.inference_mode():
                self._forward(probe.tokens, step)
        except TypeError as error:
            raise Invalid(f"{type(self.model).__name__} does not take paged attention: {error}") from error
        finally:
            probe.close()
        layers = self.pool.layout.layers
        if sorted(step.layers_seen) != list(range(layers)):
            raise Invalid(
                f"{type(self.model).__name__}: of {layers} layers only {sorted(step.layers_seen)} use paged attention; "
                "use a model with full attention in every layer"
            )

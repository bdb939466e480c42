"""Runs the model over a step's chunks, and answers with logits for those sequences whose tokens all have KV then."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from functools import partial

import torch
from transformers import PreTrainedModel

from tierd.errors import Invalid
from tierd.layout import Layout
from tierd_engine import attention
from tierd_engine.attention import Paged, Span, Step
from tierd_engine.scheduler import Chunk


class Runner:
    """A transformers model that computes with its KV in pages, `tensor [page, layer, K/V, head, token, dim]`.

    A forward pass over one token at construction (in the last page, which nobody uses yet) proves that every layer goes
    through the pages; raises Invalid if not.
    """

    def __init__(self, model: PreTrainedModel, tensor: torch.Tensor, layout: Layout) -> None:
        model.set_attn_implementation(attention.NAME)
        if model.config._attn_implementation != attention.NAME:
            raise Invalid(f"{type(model).__name__} has attention code of its own that cannot be paged; use another model")
        self.model = model.eval()
        self.tensor = tensor
        self.layout = layout
        self.begin: Callable[[List[Span]], Paged] = partial(Step, tensor, layout)
        """Makes a forward pass over spans: in plain torch, or with tierd's kernels where the pages are on a GPU."""
        if tensor.is_cuda:
            from tierd_engine.kernels import KernelSteps  # needs triton

            self.begin = KernelSteps(tensor, layout)
        self._prove_every_layer_pages()

    def run(self, chunks: list[Chunk]) -> list[tuple[Chunk, torch.Tensor]]:
        """Compute the KV of all chunks; returns those that complete their sequences, with logits `float32[vocabulary]`."""
        chunks = sorted(chunks, key=lambda chunk: (chunk.count > 1, -chunk.sequence.computed))
        tokens: list[int] = []
        spans, complete, last = [], [], []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.computed
            assert sequence.table is not None and chunk.count <= sequence.uncomputed
            spans.append(Span(sequence.table.pages, start, start + chunk.count))
            tokens += sequence.tokens[start : start + chunk.count]
            if chunk.count == sequence.uncomputed:
                complete.append(chunk)
                last.append(len(tokens) - 1)
        logits = self._forward(tokens, self.begin(spans), last or [0])
        return list(zip(complete, logits[: len(complete)], strict=True))

    @torch.inference_mode()
    def _forward(self, tokens: list[int], step: Paged, last: list[int]) -> torch.Tensor:
        device = self.tensor.device
        output = self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(last, device=device),
            step=step,
        )
        return output.logits[0].float()

    def _prove_every_layer_pages(self) -> None:
        step = self.begin([Span([len(self.tensor) - 1], 0, 1)])
        try:
            self._forward([0], step, [0])
        except TypeError as error:
            raise Invalid(f"{type(self.model).__name__} does not take paged attention: {error}") from error
        layers = self.layout.layers
        if sorted(step.layers_seen) != list(range(layers)):
            raise Invalid(
                f"{type(self.model).__name__}: of {layers} layers only {sorted(step.layers_seen)} use paged attention; "
                "use a model with full attention in every layer"
            )

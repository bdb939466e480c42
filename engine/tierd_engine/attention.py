"""Attention over pages, registered with transformers under the name `tierd_paged`.

A transformers model calls the registered function once per layer with the new tokens' queries, keys and values. The
function writes keys and values to their pages, gathers everything the sequence has so far and attends to it. A `Step`
carries where that is; it is the same for all layers but for an offset, so its indexes are made once per forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tierd.errors import Invalid
from tierd_engine.pages import PagePool

NAME = "tierd_paged"
HARMLESS = {"position_ids", "use_cache", "past_key_values", "cache_position", "layer_idx"}
"""Keyword arguments of model code that change nothing here; any other that is set asks for what we do not compute."""


class Step:
    """One forward pass of one sequence: tokens `start` to `end - 1` are new, all before `end` are attended to.

    `layers_seen` lists the layers that came by, so that the runner can prove that no layer went another way.
    """

    def __init__(self, pool: PagePool, block_table: list[int], start: int, end: int) -> None:
        layout = pool.layout
        heads, block_tokens = layout.kv_heads, layout.block_tokens
        tensor, device = pool.tensor, pool.tensor.device
        pages = torch.tensor(block_table[: -(-end // block_tokens)], device=device)
        positions = torch.arange(start, end, device=device)
        parts = torch.arange(2 * heads, device=device).view(2, heads, 1)

        self.start, self.end = start, end
        self.heads, self.head_dim = heads, layout.head_dim
        self.layers_seen: list[int] = []
        # A run holds one head's 16 tokens of one layer of one page; a vector is one token of a run.
        self._runs = tensor.view(-1, block_tokens * layout.head_dim)
        self._vectors = tensor.view(-1, layout.head_dim)
        self._runs_per_layer = 2 * heads
        self._vectors_per_layer = 2 * heads * block_tokens
        self._read = (pages * layout.layers * self._runs_per_layer + parts).flatten()
        page_of_token = pages[positions // block_tokens] * layout.layers
        self._write = ((page_of_token * self._runs_per_layer + parts) * block_tokens + positions % block_tokens).flatten()
        self.mask = self._causal_mask(positions, tensor.dtype) if start and end - start > 1 else None

    def _causal_mask(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask `[new, end]` for new tokens behind a prefix (SDPA's own `is_causal` assumes there is none)."""
        allowed = torch.arange(self.end, device=positions.device) <= positions[:, None]
        return torch.zeros(allowed.shape, dtype=dtype, device=positions.device).masked_fill_(~allowed, -torch.inf)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the new tokens' keys and values, each `[1, heads, new, dim]`, into their pages."""
        vectors = torch.cat((key, value)).reshape(-1, self.head_dim)
        self._vectors.index_copy_(0, self._write + layer * self._vectors_per_layer, vectors)

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather all keys and values so far, each `[1, heads, end, dim]`; one copy."""
        runs = self._runs.index_select(0, self._read + layer * self._runs_per_layer)
        both = runs.view(2, 1, self.heads, -1, self.head_dim)[:, :, :, : self.end]
        return both[0], both[1]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: Step,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from `query [1, heads, new, dim]` to all tokens so far; returns `[1, new, heads, dim]`.

    Raises Invalid when the layer asks for something beyond plain causal attention (a window, sinks, soft-capping, ...).
    """
    layer = _plain_layer(module, step, key, value, attention_mask, is_causal, others)
    step.write(layer, key, value)
    keys, values = step.read(layer)
    out = scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=step.mask,
        is_causal=step.start == 0 and step.end > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out.transpose(1, 2), None


def _plain_layer(
    module: torch.nn.Module,
    step: Step,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    others: dict[str, Any],
) -> int:
    """The layer's index, if it wants plain causal attention over K/V of the pool's geometry; else raises Invalid."""
    name = type(module).__name__
    wanted = (1, step.heads, step.end - step.start, step.head_dim)
    if tuple(key.shape) != wanted or tuple(value.shape) != wanted:
        raise Invalid(f"{name}: K {tuple(key.shape)} and V {tuple(value.shape)} do not fit pages made for {wanted}")
    if attention_mask is not None or is_causal is False or not getattr(module, "is_causal", True):
        raise Invalid(f"{name}: attention with a mask of its own is not supported; use a causal decoder model")
    for argument, given in others.items():
        if given is not None and given is not False and argument not in HARMLESS:
            raise Invalid(f"{name}: attention with {argument}={given!r} is not supported; use a full-attention model")
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise Invalid(f"{name}: layer_idx is {layer!r}, not an index; the engine cannot tell its layers apart")
    step.layers_seen.append(layer)
    return layer


AttentionInterface.register(NAME, paged_attention)

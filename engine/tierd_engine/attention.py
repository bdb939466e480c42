"""Attention over pages, registered with transformers under the name `tierd_paged`.

A step runs many sequences at once: their new tokens follow each other in one row, and transformers calls the registered
function once per layer with all their queries, keys and values. The function writes keys and values to their pages,
gathers what each sequence has so far and attends to it. Where that is does not depend on the layer but for an offset, so a
`Step` makes its indexes once per forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tierd.errors import Invalid
from tierd.layout import Layout

NAME = "tierd_paged"
HARMLESS = {"position_ids", "use_cache", "past_key_values", "cache_position", "layer_idx"}
"""Keyword arguments of model code that change nothing here; any other that is set asks for what we do not compute."""
PADDING_MAX = 1.5
"""A group of decoding sequences is padded to its longest: together to at most so many times what they have."""
GROUP_TOKENS_MAX = 8192
"""More than this at a time leaves the processor's caches between gathering and attending."""


@dataclass(frozen=True)
class Span:
    """New tokens `start` to `end - 1` of a sequence whose KV is in `pages`; all before `end` are attended to."""

    pages: List[int]
    start: int
    end: int


class Paged(Protocol):
    """One forward pass: where its tokens are, and how a layer attends. `layers_seen` lists the layers that came by."""

    layout: Layout
    positions: torch.Tensor
    layers_seen: list[int]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Group:
    """Sequences that are attended to together: their rows in the step, and where their KV is.

    `runs` are run numbers of layer 0 in the order `[K/V, sequence, head, page]`, `shape` is what they gather. `length` cuts
    what the last page holds beyond the longest sequence, `mask` is added to the scores.
    """

    rows: slice
    runs: torch.Tensor
    shape: tuple[int, ...]
    length: int
    mask: torch.Tensor | None
    is_prompt: bool


class Step:
    """A pass in plain torch over `spans`, whose rows follow each other: first those of one token, longest sequence first.

    `layers_seen` lists the layers that came by, so that the runner can prove that no layer went another way.
    """

    def __init__(self, tensor: torch.Tensor, layout: Layout, spans: List[Span]) -> None:
        heads, block = layout.kv_heads, layout.block_tokens
        self.layout = layout
        self.layers_seen: list[int] = []
        self._device, self._dtype = tensor.device, tensor.dtype
        # A run holds one head's tokens of one layer of one page; a vector is one token of a run.
        run = block * layout.head_dim
        self._runs_per_layer = 2 * heads
        self._runs_per_page, rest = divmod(tensor.stride(0), run)
        if rest:
            raise Invalid(f"pages: {tensor.stride(0)} numbers from page to page are no multiple of a head's {run} in a block")
        self._runs = tensor.as_strided((len(tensor) * self._runs_per_page, run), (run, 1))
        self._vectors = self._runs.view(-1, layout.head_dim)
        self._parts = torch.arange(2 * heads, device=self._device).view(2, heads)
        self.positions = torch.cat([torch.arange(span.start, span.end) for span in spans]).to(self._device)
        pages = [span.pages[position // block] for span in spans for position in range(span.start, span.end)]
        runs = torch.tensor(pages, device=self._device) * self._runs_per_page + self._parts[..., None]
        self._write = (runs * block + self.positions % block).flatten()
        self.groups = list(self._groups(spans))
        # One buffer for all layers and groups: fresh memory would cost a page fault every 4 KiB, each time.
        self._gathered = self._runs.new_empty((max(len(group.runs) for group in self.groups), self._runs.shape[1]))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Write the new tokens' keys and values, and attend; returns `[new, heads, dim]`. Arguments as `paged_attention`'s."""
        self.write(layer, key, value)
        rows = query[0].transpose(0, 1)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for group in self.groups:
            keys, values = self.read(layer, group)
            attend = _attend_prompt if group.is_prompt else _attend_decodes
            out[group.rows] = attend(rows[group.rows], keys, values, group.mask, scaling)
        return out

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the new tokens' keys and values, each `[1, heads, new, dim]`, into their pages."""
        vectors = torch.cat((key, value)).reshape(-1, self.layout.head_dim)
        self._vectors.index_copy_(0, self._write + layer * self._runs_per_layer * self.layout.block_tokens, vectors)

    def read(self, layer: int, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather keys and values so far, each `[sequences, heads, length, dim]`: a copy, valid until the next."""
        gathered = self._gathered[: len(group.runs)]
        torch.index_select(self._runs, 0, group.runs + layer * self._runs_per_layer, out=gathered)
        runs = gathered.view(group.shape)
        return runs[0, :, :, : group.length], runs[1, :, :, : group.length]

    def _groups(self, spans: List[Span]) -> Iterator[Group]:
        """Sequences that decode go together, padded to the longest; a chunk of a prompt goes alone."""
        row = at = 0
        while at < len(spans):
            first, filled = at, 0
            while at < len(spans) and spans[at].end - spans[at].start == 1:
                filled += spans[at].end
                padded = (at + 1 - first) * spans[first].end
                if padded > PADDING_MAX * filled or padded > GROUP_TOKENS_MAX:
                    break
                at += 1
            at = max(at, first + 1)
            rows = slice(row, row + sum(span.end - span.start for span in spans[first:at]))
            yield self._group(spans[first:at], rows)
            row = rows.stop

    def _group(self, spans: List[Span], rows: slice) -> Group:
        is_prompt = spans[0].end - spans[0].start > 1
        length, mask = max(span.end for span in spans), None
        ends = self.positions[rows, None] + 1
        if (is_prompt and spans[0].start) or any(span.end < length for span in spans):
            allowed = torch.arange(length, device=self._device) < ends
            mask = torch.zeros(allowed.shape, dtype=self._dtype, device=self._device).masked_fill_(~allowed, -torch.inf)
            mask = mask if is_prompt else mask[:, None, None]
        block = self.layout.block_tokens
        count = -(-length // block)
        # Beyond a sequence's end its last page stands in: what is masked must be finite numbers all the same.
        pages = [[span.pages[min(at, (span.end - 1) // block)] for at in range(count)] for span in spans]
        numbers = torch.tensor(pages, device=self._device)[None, :, None] * self._runs_per_page
        runs = (numbers + self._parts[:, None, :, None]).flatten()
        shape = (2, len(spans), self.layout.kv_heads, count * block, self.layout.head_dim)
        return Group(rows, runs, shape, length, mask, is_prompt)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: Paged,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from `query [1, heads, new, dim]` to all that each row's sequence has; returns `[1, new, heads, dim]`.

    Raises Invalid when the layer asks for something beyond plain causal attention (a window, sinks, soft-capping, ...).
    """
    layer = _plain_layer(module, step, key, value, attention_mask, is_causal, others)
    return step.attend(layer, query, key, value, scaling)[None], None


def _attend_prompt(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """`rows [new, heads, dim]` of one sequence; without a mask nothing stands before them."""
    grouped = rows.shape[1] != keys.shape[1]
    query = rows.transpose(0, 1)[None]
    out = scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return out[0].transpose(0, 1)


def _attend_decodes(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """`rows [sequences, heads, dim]`, one a sequence. The heads that share keys are to SDPA as many queries of one head."""
    sequences, heads, dim = rows.shape
    query = rows.reshape(sequences, keys.shape[1], heads // keys.shape[1], dim)
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling).reshape(rows.shape)


def _plain_layer(
    module: torch.nn.Module,
    step: Paged,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    others: dict[str, Any],
) -> int:
    """The layer's index, if it wants plain causal attention over K/V of the pool's geometry; else raises Invalid."""
    name = type(module).__name__
    wanted = (1, step.layout.kv_heads, len(step.positions), step.layout.head_dim)
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

"""Attention over pages on a GPU: tierd's kernels store the new keys and values, and attend to pages where they are.

The same passes as `attention.Step`, which is their oracle; see there for what a span is.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch

from tierd.layout import Layout
from tierd_engine.attention import Span
from tierd_kernels.attention import attend_kernel
from tierd_kernels.pages import Pages, store_kernel


@dataclass(frozen=True)
class Launch:
    """Sequences of one launch, as `tierd_kernels.attention.attend` takes them: decodes, or chunks of prompts."""

    rows: slice
    tables: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    new_max: int


class KernelStep:
    """One forward pass over `spans`, whose rows follow each other: first those of one token. A `attention.Paged`."""

    def __init__(self, pages: Pages, layout: Layout, spans: List[Span]) -> None:
        block, device = layout.block_tokens, pages.device
        self.layout = layout
        self.layers_seen: list[int] = []
        self._pages = pages
        positions = [position for span in spans for position in range(span.start, span.end)]
        places = [span.pages[at // block] * block + at % block for span in spans for at in range(span.start, span.end)]
        self.positions, self._places = torch.tensor([positions, places], device=device)
        decodes = sum(span.end - span.start == 1 for span in spans)
        assert all(span.end - span.start == 1 for span in spans[:decodes]), "sequences of one token come first"
        parts = (spans[:decodes], 0), (spans[decodes:], decodes)
        self._launches = [self._launch(some, row) for some, row in parts if some]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Store the new tokens' keys and values, and attend; returns `[new, heads, dim]`. Arguments as `paged_attention`'s."""
        new = torch.cat((key, value)).transpose(1, 2)  # one layout for both, whatever the model made of them
        store_kernel(self._pages, layer, (new[0], new[1]), self._places)
        rows = query[0].transpose(0, 1)
        done = [
            attend_kernel(
                rows[launch.rows],
                self._pages,
                layer,
                launch.tables,
                launch.starts,
                launch.lengths,
                launch.new_max,
                scaling,
            )
            for launch in self._launches
        ]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _launch(self, spans: List[Span], row: int) -> Launch:
        block, device = self.layout.block_tokens, self._pages.device
        width = max(-(-span.end // block) for span in spans)
        tables = [[*span.pages[:width], *[0] * (width - len(span.pages))] for span in spans]
        counts = [span.end - span.start for span in spans]
        starts = [sum(counts[:at]) for at in range(len(counts) + 1)]
        return Launch(
            slice(row, row + sum(counts)),
            torch.tensor(tables, dtype=torch.int32, device=device),
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.tensor([span.end for span in spans], dtype=torch.int32, device=device),
            max(counts),
        )


class KernelSteps:
    """Makes passes over the engine's own pages, `[page, layer, K/V, head, token, dim]`."""

    def __init__(self, tensor: torch.Tensor, layout: Layout) -> None:
        self._pages = Pages([tensor[:, layer, part] for layer in range(layout.layers) for part in (0, 1)])
        self._layout = layout

    def __call__(self, spans: List[Span]) -> KernelStep:
        return KernelStep(self._pages, self._layout, spans)

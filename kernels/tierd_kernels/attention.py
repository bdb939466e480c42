"""Attention over pages: one kernel for decode and for prefill behind a cached prefix.

New tokens of many sequences follow each other in one row; their keys and values are in the pages already (`pages.store`).
Query heads that share a KV head (GQA) are rows of one tile, as are a sequence's new tokens: with one new token a tile is a
decode, with many it is a chunk of a prompt, and a row sees all keys up to its own position. Softmax is computed online
(FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691), keys are found by page (PagedAttention, Kwon et al. 2023,
https://arxiv.org/abs/2309.06180). Where sequences are too few to occupy a GPU their keys are split, and a second kernel
puts the parts together (Flash-Decoding, Dao et al. 2023, https://pytorch.org/blog/flash-decoding/).

Plain causal attention only: no window, no sinks, no soft-capping, no latent (MLA). An engine that has FlashAttention or
FlashInfer at hand should use them for long prompts; this is for where they cannot be had.
"""

from __future__ import annotations

from math import log2

import torch
import triton
import triton.language as tl

from tierd_kernels.pages import Pages

LOG2_E = tl.constexpr(1.4426950408889634)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROWS_MIN = 16
"""What a tensor core takes at least: a decode with fewer query heads per KV head leaves rows empty."""
SPLITS_MAX = 64
WAVES = 2
"""Programs per multiprocessor that splitting aims at."""


def attend(
    query: torch.Tensor,
    pages: Pages,
    layer: int,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    new_max: int,
    scale: float | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Attend from new tokens to all that their sequences have in one layer; returns `[new, heads, dim]` as the query.

    `query` is `[new, heads, dim]` with a last stride of 1, in the pages' dtype; heads are a multiple of the pages'. Sequence
    s has the rows `starts[s]` to `starts[s + 1] - 1` of it, which are the last of its `lengths[s]` tokens, and its token t
    is in page `tables[s, t // tokens]`. Tables, starts and lengths are integers on the query's device, which nobody reads
    on the host: `new_max` says how many new tokens a sequence has at most (1: decode). `scale` is 1 / sqrt(dim) unless
    given; `splits` are chosen unless given. Sums are float32. Raises ValueError when shapes or dtypes do not go together.
    """
    implementation = attend_kernel if query.is_cuda else attend_twin
    return implementation(query, pages, layer, tables, starts, lengths, new_max, scale, splits)


def attend_kernel(
    query: torch.Tensor,
    pages: Pages,
    layer: int,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    new_max: int,
    scale: float | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """`attend` as one launch, or two where keys are split."""
    _check(query, pages)
    new, heads, dim = query.shape
    group, sequences = heads // pages.heads, len(lengths)
    out = torch.empty((new, heads, dim), dtype=query.dtype, device=query.device)
    if not new:
        return out
    rows, keys = _tile(new_max * group, query.dtype)
    row_tiles = triton.cdiv(new_max * group, rows)
    if splits is None:
        splits = _splits(query.device, row_tiles * pages.heads * sequences, tables.shape[1] * pages.tokens // keys)
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty((splits, new, heads, dim), dtype=torch.float32, device=query.device)
        sums = torch.empty((splits, new, heads), dtype=torch.float32, device=query.device)
    _attend[(row_tiles, pages.heads * splits, sequences)](
        query,
        pages.table[layer * 2 :],
        tables,
        starts,
        lengths,
        parts,
        sums,
        new,
        (dim**-0.5 if scale is None else scale) * log2(2.718281828459045),
        *query.stride()[:2],
        tables.stride(0),
        *pages.strides_in(pages.views[0].element_size()),
        SPLITS=splits,
        GROUP=group,
        HEADS=heads,
        DIM=dim,
        DIMS=triton.next_power_of_2(dim),
        TOKENS=pages.tokens,
        DTYPE=DTYPES[query.dtype],
        ALIGNMENT=pages.alignment,
        ROWS=rows,
        KEYS=keys,
        num_warps=4,
        num_stages=2,
    )
    if splits > 1:
        _combine[(new, heads)](
            parts,
            sums,
            out,
            new,
            SPLITS=splits,
            SPLITS_ROUND=triton.next_power_of_2(splits),
            HEADS=heads,
            DIM=dim,
            DIMS=triton.next_power_of_2(dim),
            num_warps=1,
        )
    return out


def attend_twin(
    query: torch.Tensor,
    pages: Pages,
    layer: int,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    new_max: int,
    scale: float | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """`attend` in plain torch, one sequence after another."""
    _check(query, pages)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    group = query.shape[1] // pages.heads
    for sequence, length in enumerate(lengths.tolist()):
        rows = slice(int(starts[sequence]), int(starts[sequence + 1]))
        used = tables[sequence, : -(-length // pages.tokens)]
        keys, values = (
            view[used].transpose(0, 1).flatten(1, 2)[:, :length].float().repeat_interleave(group, 0)
            for view in pages.views[layer * 2 : layer * 2 + 2]
        )
        scores = query[rows].float().transpose(0, 1) @ keys.transpose(1, 2) * scale
        position = torch.arange(length - scores.shape[1], length, device=query.device)
        scores.masked_fill_(torch.arange(length, device=query.device) > position[:, None], -torch.inf)
        out[rows] = (scores.softmax(-1) @ values).transpose(0, 1).to(out.dtype)
    return out


@triton.jit
def _attend(
    query,
    table,
    tables,
    starts,
    lengths,
    parts,
    sums,
    new_count,
    scale,
    query_stride,
    query_head_stride,
    tables_stride,
    page_stride,
    head_stride,
    token_stride,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TOKENS: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (n, KV head and split, sequence): rows n * ROWS on, over the split's share of the keys that they see."""
    kv_head = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    sequence = tl.program_id(2)
    start = tl.load(starts + sequence)
    new = tl.load(starts + sequence + 1) - start
    first_row = tl.program_id(0) * ROWS
    if first_row < new * GROUP:
        length = tl.load(lengths + sequence)
        row = first_row + tl.arange(0, ROWS)
        position = length - new + row // GROUP
        token = (start + row // GROUP).to(tl.int64)
        head = kv_head * GROUP + row % GROUP
        is_row = row < new * GROUP
        number = tl.arange(0, DIMS)
        is_number = number < DIM
        rows = tl.load(
            query + token[:, None] * query_stride + head[:, None] * query_head_stride + number[None, :],
            mask=is_row[:, None] & is_number[None, :],
            other=0.0,
        )
        keys_at = tl.multiple_of(tl.load(table).to(tl.pointer_type(DTYPE)), ALIGNMENT) + kv_head.to(tl.int64) * head_stride
        values_at = (
            tl.multiple_of(tl.load(table + 1).to(tl.pointer_type(DTYPE)), ALIGNMENT) + kv_head.to(tl.int64) * head_stride
        )

        # Keys that the last row sees, in whole tiles, shared out to splits.
        seen = tl.minimum(length, length - new + (first_row + ROWS - 1) // GROUP + 1)
        share = ((seen + KEYS - 1) // KEYS + SPLITS - 1) // SPLITS * KEYS
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.full((ROWS,), 0.0, tl.float32)
        sums_of = tl.full((ROWS, DIMS), 0.0, tl.float32)
        for key_start in tl.range(split * share, tl.minimum(seen, split * share + share), KEYS):
            key = key_start + tl.arange(0, KEYS)
            is_key = key < seen
            page = tl.load(tables + sequence.to(tl.int64) * tables_stride + key // TOKENS, mask=is_key, other=0)
            place = page.to(tl.int64) * page_stride + (key % TOKENS).to(tl.int64) * token_stride
            keys = tl.load(keys_at + place[None, :] + number[:, None], mask=is_key[None, :] & is_number[:, None], other=0.0)
            scores = tl.dot(rows, keys, input_precision="ieee") * scale
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            # A row that has seen no key yet would subtract infinity from infinity.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(highest - base)
            values = tl.load(values_at + place[:, None] + number[None, :], mask=is_key[:, None] & is_number[None, :], other=0.0)
            total = total * shrink + tl.sum(weights, 1)
            sums_of = tl.dot(weights.to(DTYPE), values, sums_of * shrink[:, None], input_precision="ieee")
            highest = higher

        result = sums_of / tl.where(total == 0.0, 1.0, total)[:, None]
        vector = (split.to(tl.int64) * new_count + token) * HEADS + head
        tl.store(parts + vector[:, None] * DIM + number[None, :], result, mask=is_row[:, None] & is_number[None, :])
        if SPLITS > 1:
            # The highest key alone weighs 1, so a total below is that of no keys, which have no highest.
            tl.store(sums + vector, highest + tl.log2(tl.maximum(total, 1.0)), mask=is_row)


@triton.jit
def _combine(
    parts,
    sums,
    out,
    new_count,
    SPLITS: tl.constexpr,
    SPLITS_ROUND: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Program (token, head) weighs the splits' results by their sums, which are logarithms."""
    vector = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split = tl.arange(0, SPLITS_ROUND)
    number = tl.arange(0, DIMS)
    part = split.to(tl.int64) * new_count * HEADS + vector
    logs = tl.load(sums + part, mask=split < SPLITS, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    inside = (split < SPLITS)[:, None] & (number < DIM)[None, :]
    results = tl.load(parts + part[:, None] * DIM + number[None, :], mask=inside, other=0.0)
    mean = tl.sum(results * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + vector * DIM + number, mean, mask=number < DIM)


def _tile(rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and keys of a tile, as large as registers allow; float32 is not for tensor cores, which would round it."""
    if dtype == torch.float32:
        return ROWS_MIN, 16
    return min(64, max(ROWS_MIN, triton.next_power_of_2(rows))), 64


def _splits(device: torch.device, programs: int, key_tiles: int) -> int:
    """Enough to occupy the GPU, and no more than there are tiles of keys."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(WAVES * processors // programs, key_tiles, SPLITS_MAX))


def _check(query: torch.Tensor, pages: Pages) -> None:
    if pages.parts != 2 or query.dtype != pages.dtype or query.dtype not in DTYPES:
        raise ValueError(f"attend: a query of {query.dtype} over {pages!r} of {pages.parts} parts; both must be float KV")
    if query.dim() != 3 or query.shape[2] != pages.dim or query.shape[1] % pages.heads or query.stride(2) != 1:
        raise ValueError(
            f"attend: a query {tuple(query.shape)} with strides {query.stride()} over {pages!r}; "
            f"[new, a multiple of {pages.heads} heads, {pages.dim}] with a last stride of 1 is needed"
        )

"""Pages: where an engine keeps KV, whatever its layout. Copies between pages and slots, and of new tokens into pages.

A slot holds a block as tierd stores it: `[layers, parts, heads, tokens, dim]`, contiguous. A page is the same block
somewhere in an engine's tensors. Every engine's layout is some tensors (one, or one a layer, or two) and an order of axes
within them, so here it is a *table* of base addresses, one per layer and part, and three strides that all of them share.
One launch copies all layers.

    unit    what is counted in: 16 bytes where all addresses and strides allow (one 128-bit load), else one number or less
    row     one head of one token: `dim` numbers, contiguous on both sides
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.uint8}
UNIT_BYTES_MAX = 16
TILE_BYTES = 16384
"""What a program copies at a time: eight 128-bit loads in flight in each of 128 threads."""


class Pages:
    """An engine's KV pages: views `[pages, heads, tokens, dim]`, one per layer and part, in the order of a block.

    All views share shape, strides, dtype and device, and their last stride is 1. `parts` is 2 (keys, then values, for each
    layer) or 1 (MLA latent). The views are kept, so addresses stay valid. Raises ValueError when they do not go together.

        [page, layer, K/V, head, token, dim]     Pages([t[:, layer, part] for layer in ... for part in (0, 1)])
        per layer [K/V, page, token, head, dim]  Pages([t[part].transpose(1, 2) for t in layers for part in (0, 1)])
        per layer [page, head, token, K|V dim]   Pages([half for t in layers for half in t.chunk(2, dim=-1)])
    """

    def __init__(self, views: Sequence[torch.Tensor], parts: int = 2) -> None:
        first = views[0]
        for number, view in enumerate(views):
            mine = view.shape, view.stride(), view.dtype, view.device
            if mine != (first.shape, first.stride(), first.dtype, first.device):
                raise ValueError(f"pages: view {number} has {mine}, view 0 has shape {first.shape} and stride {first.stride()}")
        if first.dim() != 4 or first.stride(3) != 1:
            raise ValueError(
                f"pages: views are [pages, heads, tokens, dim] with a last stride of 1, not {tuple(first.shape)} with strides "
                f"{first.stride()}; permute and slice the engine's tensors"
            )
        if len(views) % parts:
            raise ValueError(f"pages: {len(views)} views are no multiple of {parts} parts per layer")
        self.views = list(views)
        self.parts = parts
        self.count, self.heads, self.tokens, self.dim = first.shape
        self.dtype, self.device, self.is_cuda = first.dtype, first.device, first.is_cuda
        self.strides = first.stride()[:3]
        self.table = torch.tensor([view.data_ptr() for view in views], dtype=torch.int64).to(self.device)
        self.row_bytes = self.dim * first.element_size()
        self.alignment = _alignment(
            self.row_bytes,
            *(view.data_ptr() for view in views),
            *(stride * first.element_size() for stride in self.strides),
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: all layers and parts."""
        whole: int = len(self.views) * self.heads * self.tokens * self.row_bytes
        return whole

    def strides_in(self, unit_bytes: int) -> tuple[int, ...]:
        """Strides from page to page, head to head and token to token, in units."""
        return tuple(stride * self.views[0].element_size() // unit_bytes for stride in self.strides)

    def __repr__(self) -> str:
        shape = f"{self.heads} heads, {self.tokens} tokens, {self.dim} numbers"
        return f"<Pages {self.count} of {len(self.views)} x [{shape}] {self.dtype} on {self.device}>"


def gather(pages: Pages, page_indexes: torch.Tensor, slots: torch.Tensor, slot_indexes: torch.Tensor) -> None:
    """Copy page `page_indexes[i]` to slot `slot_indexes[i]`, for every i.

    `slots` is `uint8[slots, slot_bytes]`, contiguous within a slot; bytes behind the block stay as they are. Indexes are
    integers `[moves]` on the pages' device; those of the destination must differ, and all must exist: the kernel does not
    check them. Raises ValueError when a slot is too short.
    """
    (gather_kernel if pages.is_cuda else gather_twin)(pages, page_indexes, slots, slot_indexes)


def scatter(slots: torch.Tensor, slot_indexes: torch.Tensor, pages: Pages, page_indexes: torch.Tensor) -> None:
    """Copy slot `slot_indexes[i]` to page `page_indexes[i]`, for every i; otherwise as `gather`."""
    (scatter_kernel if pages.is_cuda else scatter_twin)(slots, slot_indexes, pages, page_indexes)


def store(pages: Pages, layer: int, new: Sequence[torch.Tensor], mapping: torch.Tensor) -> None:
    """Write new tokens' keys and values to their places in one layer.

    `new` has one tensor `[tokens, heads, dim]` per part (keys and values), whose last stride is 1 and which share strides.
    `mapping` is `int64[tokens]`: page * (tokens in a page) + token in the page, or negative for padding, which is skipped.
    """
    (store_kernel if pages.is_cuda else store_twin)(pages, layer, new, mapping)


def gather_kernel(pages: Pages, page_indexes: torch.Tensor, slots: torch.Tensor, slot_indexes: torch.Tensor) -> None:
    """`gather` as one launch for all layers."""
    _launch_copy(pages, page_indexes, slots, slot_indexes, to_slots=True)


def scatter_kernel(slots: torch.Tensor, slot_indexes: torch.Tensor, pages: Pages, page_indexes: torch.Tensor) -> None:
    """`scatter` as one launch for all layers."""
    _launch_copy(pages, page_indexes, slots, slot_indexes, to_slots=False)


def store_kernel(pages: Pages, layer: int, new: Sequence[torch.Tensor], mapping: torch.Tensor) -> None:
    """`store` as one launch."""
    _check_new(pages, new)
    count = len(mapping)
    if not count:
        return
    size = new[0].element_size()
    new_strides = [stride * size for stride in new[0].stride()[:2]]
    unit = _alignment(pages.alignment, *new_strides, *(part.data_ptr() for part in new))
    columns, rows = _tile(pages, unit)
    _store[(triton.cdiv(count * pages.heads, rows),)](
        pages.table[layer * pages.parts :],
        new[0],
        new[-1],
        mapping,
        count * pages.heads,
        *(stride // unit for stride in new_strides),
        *pages.strides_in(unit),
        PARTS=pages.parts,
        HEADS=pages.heads,
        TOKENS=pages.tokens,
        **_constants(pages, unit, columns, rows),
    )


def gather_twin(pages: Pages, page_indexes: torch.Tensor, slots: torch.Tensor, slot_indexes: torch.Tensor) -> None:
    """`gather` in plain torch."""
    blocks = _blocks(pages, slots)
    for part, view in enumerate(pages.views):
        blocks[slot_indexes, part] = view[page_indexes]


def scatter_twin(slots: torch.Tensor, slot_indexes: torch.Tensor, pages: Pages, page_indexes: torch.Tensor) -> None:
    """`scatter` in plain torch."""
    blocks = _blocks(pages, slots)
    for part, view in enumerate(pages.views):
        view[page_indexes] = blocks[slot_indexes, part]


def store_twin(pages: Pages, layer: int, new: Sequence[torch.Tensor], mapping: torch.Tensor) -> None:
    """`store` in plain torch."""
    _check_new(pages, new)
    kept = mapping >= 0
    page, token = mapping[kept] // pages.tokens, mapping[kept] % pages.tokens
    for view, part in zip(pages.views[layer * pages.parts :], new, strict=False):
        view[page, :, token] = part[kept]


@triton.jit
def _copy(
    table,
    slots,
    page_indexes,
    slot_indexes,
    slot_stride,
    page_stride,
    head_stride,
    token_stride,
    TO_SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    WORD: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (move, part, n) copies rows n * ROWS to (n + 1) * ROWS - 1 of one part of one block. UNIT words make a unit."""
    move = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)[:, None]
    word = tl.arange(0, COLUMNS)[None, :]
    head = (row // TOKENS).to(tl.int64)
    token = (row % TOKENS).to(tl.int64)
    page = tl.load(page_indexes + move).to(tl.int64)
    slot = tl.load(slot_indexes + move).to(tl.int64)

    in_page = (
        _at(tl.load(table + part), WORD, ALIGNMENT)
        + (page * page_stride + head * head_stride + token * token_stride) * UNIT
        + word
    )
    in_slot = _at(slots, WORD, ALIGNMENT) + slot * slot_stride * UNIT + (part * (HEADS * TOKENS) + row) * WIDTH + word
    inside = (row < HEADS * TOKENS) & (word < WIDTH)
    if TO_SLOTS:
        tl.store(in_slot, tl.load(in_page, mask=inside), mask=inside)
    else:
        tl.store(in_page, tl.load(in_slot, mask=inside), mask=inside)


@triton.jit
def _store(
    table,
    keys,
    values,
    mapping,
    row_count,
    new_token_stride,
    new_head_stride,
    page_stride,
    head_stride,
    token_stride,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    WORD: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program n copies rows n * ROWS to (n + 1) * ROWS - 1 of the new tokens, keys and values. A row is (token, head)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    word = tl.arange(0, COLUMNS)[None, :]
    new = (row // HEADS).to(tl.int64)
    head = (row % HEADS).to(tl.int64)
    place = tl.load(mapping + new, mask=row < row_count, other=-1)
    page = place // TOKENS
    token = place % TOKENS
    in_new = (new * new_token_stride + head * new_head_stride) * UNIT + word
    in_page = (page * page_stride + head * head_stride + token * token_stride) * UNIT + word
    inside = (place >= 0) & (word < WIDTH)
    for part in tl.static_range(PARTS):
        target = _at(tl.load(table + part), WORD, ALIGNMENT) + in_page
        source = _at(keys if part == 0 else values, WORD, ALIGNMENT) + in_new
        tl.store(target, tl.load(source, mask=inside), mask=inside)


@triton.jit
def _at(address, WORD: tl.constexpr, ALIGNMENT: tl.constexpr):
    """A pointer to words that the compiler knows to be aligned. 16 bytes are two words: Triton has none of 128 bits."""
    return tl.multiple_of(address.to(tl.pointer_type(WORD)), ALIGNMENT)


def _launch_copy(
    pages: Pages, page_indexes: torch.Tensor, slots: torch.Tensor, slot_indexes: torch.Tensor, to_slots: bool
) -> None:
    _check_slots(pages, slots)
    if not len(page_indexes):
        return
    unit = _alignment(pages.alignment, slots.data_ptr(), slots.stride(0))
    columns, rows = _tile(pages, unit)
    grid = len(page_indexes), len(pages.views), triton.cdiv(pages.heads * pages.tokens, rows)
    _copy[grid](
        pages.table,
        slots,
        page_indexes,
        slot_indexes,
        slots.stride(0) // unit,
        *pages.strides_in(unit),
        TO_SLOTS=to_slots,
        HEADS=pages.heads,
        TOKENS=pages.tokens,
        **_constants(pages, unit, columns, rows),
    )


def _alignment(*bytes_each: int) -> int:
    """The largest power of two, 16 at most, that divides all of these."""
    together = UNIT_BYTES_MAX
    for number in bytes_each:
        together |= number
    return together & -together


def _constants(pages: Pages, unit: int, columns: int, rows: int) -> dict[str, object]:
    word = min(unit, 8)
    return {
        "WORD": WORDS[word],
        "UNIT": unit // word,
        "ALIGNMENT": unit,
        "WIDTH": pages.row_bytes // word,
        "COLUMNS": columns,
        "ROWS": rows,
    }


def _tile(pages: Pages, unit: int) -> tuple[int, int]:
    """Words and rows that a program takes at a time, both powers of two."""
    columns = triton.next_power_of_2(pages.row_bytes // min(unit, 8))
    rows = max(1, TILE_BYTES // (columns * min(unit, 8)))
    return columns, min(rows, triton.next_power_of_2(pages.heads * pages.tokens))


def _blocks(pages: Pages, slots: torch.Tensor) -> torch.Tensor:
    """The blocks in slots as `[slots, layers * parts, heads, tokens, dim]`, sharing memory."""
    _check_slots(pages, slots)
    shape = len(slots), len(pages.views), pages.heads, pages.tokens, pages.dim
    return slots[:, : pages.block_bytes].view(pages.dtype).unflatten(1, shape[1:])


def _check_slots(pages: Pages, slots: torch.Tensor) -> None:
    if slots.dim() != 2 or slots.dtype != torch.uint8 or slots.stride(1) != 1:
        raise ValueError(f"slots: uint8[slots, slot_bytes] with a last stride of 1 is needed, not {slots.dtype} {slots.shape}")
    if slots.shape[1] < pages.block_bytes:
        raise ValueError(f"slots: {slots.shape[1]} bytes a slot, and a block of these pages has {pages.block_bytes}")
    size = pages.views[0].element_size()
    if slots.stride(0) % size or slots.data_ptr() % size:
        raise ValueError(
            f"slots: one every {slots.stride(0)} bytes from {slots.data_ptr():#x} on; multiples of {size} are needed"
        )


def _check_new(pages: Pages, new: Sequence[torch.Tensor]) -> None:
    for part in new:
        if part.shape[1:] != (pages.heads, pages.dim) or part.stride() != new[0].stride() or part.dtype != pages.dtype:
            raise ValueError(
                f"store: {part.dtype} {tuple(part.shape)} with strides {part.stride()} does not go to {pages!r}, or not with "
                f"{new[0].stride()}; give {pages.parts} tensors [tokens, heads, dim] of one layout"
            )
    if len(new) != pages.parts or new[0].stride(2) != 1:
        raise ValueError(f"store: {pages.parts} tensors with a last stride of 1 are needed, not {len(new)}")

"""Attention of decode over paged KV, beside the libraries that engines use for it, where they can be imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.measure import DIM, HEADS, TOKENS, Machine, Result, against
from tierd_kernels.attention import attend
from tierd_kernels.pages import Pages

GROUP = 4
"""Query heads of one KV head."""
SHARE_MIN, LIBRARY_SHARE_MIN = 0.7, 1 / 1.3
"""Of memory bandwidth, where there is no library; of the fastest library's, where there is one."""


def decode(machine: Machine, memory: Result) -> Iterator[Result]:
    """One token of many sequences over their paged KV, one layer: the libraries', and ours against the fastest of them."""
    for sequences, length in ((64, 4096), (1, 32768)):
        if machine.scale < 1:
            sequences, length = machine.count(sequences), machine.count(length)
        case = Case(machine, sequences, length)
        libraries = []
        for library, action in case.libraries.items():
            seconds = seconds_of_library(machine, library, action)
            if seconds:
                libraries.append(against(memory, f"{library}, {case.name}", case.bytes, seconds, None))
        yield from libraries
        fastest = min(libraries[1:], key=lambda result: result.seconds, default=None)  # torch's is no target
        best, wanted = (fastest, LIBRARY_SHARE_MIN) if fastest else (memory, SHARE_MIN)
        yield against(best, f"paged decode, {case.name}", case.bytes, machine.seconds(case.ours), wanted)


class Case:
    """So many sequences of that length, of random numbers in bf16: KV in pages for us, and as much contiguous for others."""

    def __init__(self, machine: Machine, sequences: int, length: int) -> None:
        pages_each, device = -(-length // TOKENS), machine.device
        self.name = f"{sequences} x {length} tokens"
        self.bytes = sequences * length * 2 * HEADS * DIM * 2
        self._kv = torch.randn(sequences * pages_each, 2, HEADS, TOKENS, DIM, device=device).bfloat16()
        self._tables = torch.randperm(len(self._kv)).int().view(sequences, pages_each).to(device)
        self._lengths = torch.full((sequences,), length, dtype=torch.int32, device=device)
        self._query = torch.randn(sequences, HEADS * GROUP, DIM, device=device).bfloat16()
        self._contiguous = torch.randn(2, sequences, length, HEADS, DIM, device=device).bfloat16()
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        pages = Pages([self._kv[:, part] for part in (0, 1)])
        self.ours = partial(attend, self._query, pages, 0, self._tables, starts, self._lengths, 1)

    @property
    def libraries(self) -> dict[str, Callable[[], Callable[[], object]]]:
        """What prepares the attention of each library; raises ImportError where there is none."""
        return {
            "scaled_dot_product_attention, contiguous": self._torch,
            "FlashInfer, paged": self._flashinfer,
            "FlashAttention, contiguous": self._flash_attention,
        }

    def _torch(self) -> Callable[[], object]:
        keys, values = self._contiguous.transpose(2, 3)
        return partial(scaled_dot_product_attention, self._query[:, :, None], keys, values, enable_gqa=True)

    def _flashinfer(self) -> Callable[[], object]:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=self._kv.device)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
        tables, heads = self._tables, self._query.shape[1]
        starts = torch.arange(len(tables) + 1, dtype=torch.int32, device=tables.device) * tables.shape[1]
        last = (self._lengths - 1) % TOKENS + 1
        kinds = {"q_data_type": self._query.dtype, "kv_data_type": self._kv.dtype}
        wrapper.plan(starts, tables.flatten(), last, heads, HEADS, DIM, TOKENS, **kinds)
        return partial(wrapper.run, self._query, self._kv)

    def _flash_attention(self) -> Callable[[], object]:
        try:
            from flash_attn_interface import flash_attn_with_kvcache  # version 3
        except ImportError:
            from flash_attn import flash_attn_with_kvcache
        return partial(
            flash_attn_with_kvcache, self._query[:, None], self._contiguous[0], self._contiguous[1], cache_seqlens=self._lengths
        )


def seconds_of_library(machine: Machine, library: str, prepare: Callable[[], Callable[[], object]]) -> float:
    """What a library's attention takes; 0 where it cannot be imported or does not work, which is said."""
    try:
        return machine.seconds(prepare())
    except ImportError:
        return 0.0
    except Exception as error:  # of somebody else's, which must not end our measurements
        print(f"{library} does not work here: {type(error).__name__}: {error}", file=sys.stderr)
        return 0.0

"""What kernels do in a second, beside what the same GPU can do: each measurement has a baseline of the same bytes.

Bandwidth counts bytes read plus bytes written. Measurements take the device, so that tests run them, small, without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from tierd_kernels.attention import attend
from tierd_kernels.checksum import digest
from tierd_kernels.pages import Pages, gather, scatter
from tierd_kernels.quantize import FORMATS, dequantize, quantize

REPEATS, WARM_UP = 20, 5
LAYERS, HEADS, TOKENS, DIM, GROUP = 32, 8, 16, 128, 4
"""A block of 2 MiB in bfloat16, as Llama 3 8B has them."""


@dataclass(frozen=True)
class Result:
    """One measurement: seconds are the median, `share` is of the baseline's bandwidth, `target` what issue 4 asks of it."""

    name: str
    bytes: int
    seconds: float
    baseline: str = ""
    share: float | None = None
    target: float | None = None

    @property
    def gb_per_second(self) -> float:
        """10^9 bytes a second."""
        return self.bytes / self.seconds / 1e9


@dataclass(frozen=True)
class Machine:
    """Where and how much: `scale` 1 is meant for a GPU with 40 GB or more, tests take much less."""

    device: str
    scale: float = 1.0

    def count(self, wanted: int) -> int:
        """So many, at this scale."""
        return max(2, int(wanted * self.scale))

    def seconds(self, action: Callable[[], object]) -> float:
        """Median time of an action, on the GPU's own clock where there is one."""
        for _ in range(WARM_UP if self.device == "cuda" else 1):
            action()
        if self.device != "cuda":
            start = perf_counter()
            action()
            return perf_counter() - start
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            action()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return median(times)


def all_measurements(machine: Machine) -> Iterator[Result]:
    """Everything, cheapest first; a caller who runs out of time stops."""
    memory = copy_bandwidth(machine)
    yield memory
    yield from copies(machine, memory)
    yield from pinned(machine)
    yield from pinned_path(machine)
    yield from checksums(machine, memory)
    yield from quantisation(machine, memory)
    yield from decode(machine, memory)


def against(baseline: Result, name: str, bytes: int, seconds: float, target: float | None) -> Result:
    """A result with its share of a baseline's bandwidth."""
    share = bytes / seconds / (baseline.bytes / baseline.seconds)
    return Result(name, bytes, seconds, baseline.name, share, target)


def copy_bandwidth(machine: Machine) -> Result:
    """Device-to-device copy of 1 GiB: what the others are compared with."""
    source = torch.zeros(machine.count(1 << 30), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    return Result("device-to-device copy", 2 * len(source), machine.seconds(partial(target.copy_, source)))


def copies(machine: Machine, memory: Result) -> Iterator[Result]:
    """Gather and scatter of scattered pages, in the layouts of engines and in two sizes of block."""
    for name, layers, blocks in (("2 MiB", LAYERS, 512), ("64 KiB", 1, 8192)):
        count = machine.count(blocks)
        whole = torch.zeros(count, layers, 2, HEADS, TOKENS, DIM, dtype=torch.bfloat16, device=machine.device)
        slots = torch.zeros(count, whole[0].numel() * 2, dtype=torch.uint8, device=machine.device)
        moves = torch.randperm(count).to(machine.device), torch.randperm(count).to(machine.device)
        layouts = {
            "page first": [whole[:, layer, part] for layer in range(layers) for part in (0, 1)],
            "by layer, token before head": [
                part.view(count, TOKENS, HEADS, DIM).transpose(1, 2)
                for layer in whole.view(layers, 2, count, -1)
                for part in layer
            ],
        }
        for layout, views in layouts.items():
            pages = Pages(views)
            total = 2 * count * pages.block_bytes
            for verb, action in (
                ("gather", partial(gather, pages, moves[0], slots, moves[1])),
                ("scatter", partial(scatter, slots, moves[0], pages, moves[1])),
            ):
                yield against(memory, f"{verb} {name} blocks, {layout}", total, machine.seconds(action), 0.85)


def pinned(machine: Machine) -> Iterator[Result]:
    """Copies between pinned memory and the GPU: all at once, and block by block."""
    total = machine.count(256 << 20) // 65536 * 65536 or 65536
    near = torch.zeros(total, dtype=torch.uint8, device=machine.device)
    far = torch.zeros(total, dtype=torch.uint8, pin_memory=machine.device == "cuda")
    for name, source, target in (("pinned to GPU", far, near), ("GPU to pinned", near, far)):
        once = Result(name, total, machine.seconds(partial(target.copy_, source, non_blocking=True)))
        yield once
        for block_bytes, goal in ((2 << 20, 0.9), (64 << 10, 0.8)):
            pairs = list(zip(target.split(block_bytes), source.split(block_bytes), strict=True))

            seconds = machine.seconds(partial(copy_each, pairs))
            yield against(once, f"{name}, {block_bytes >> 10} KiB at a time", total, seconds, goal)


def pinned_path(machine: Machine) -> Iterator[Result]:
    """Blocks between registered slots and an engine's pages, as tierd's client moves them, beside one plain copy of the bytes.

    In one run a block (2 MiB, and 64 KiB), and in a tensor a layer and part (32 KiB each), which goes through staging. Seconds
    are those of the worker that waits, from the call to the end of the last copy. Without a GPU nothing is measured.
    """
    if machine.device != "cuda":
        return
    from tierd_engine.device import device_pages, views_of

    for name, layers, blocks, goal in (("2 MiB", LAYERS, 128, 0.9), ("64 KiB", 1, 4096, 0.8)):
        count = machine.count(blocks)
        whole = torch.zeros(count, layers, 2, HEADS, TOKENS, DIM, dtype=torch.bfloat16, device=machine.device)
        far = torch.zeros(count, whole[0].numel() * 2, dtype=torch.uint8, pin_memory=True)
        near, order = torch.zeros_like(far, device=machine.device), np.random.default_rng(1).permutation(count)
        pools = {"one run": device_pages(views_of(whole))}
        if layers > 1:
            pools["a tensor a layer and part"] = device_pages([view.clone() for view in views_of(whole)])
        total = far.numel()
        for verb, target, source in (("load", near, far), ("store", far, near)):
            plain = Result(
                f"plain {verb} of {name} blocks", total, machine.seconds(partial(target.copy_, source, non_blocking=True))
            )
            yield plain
            for kind, pool in pools.items():
                pool.pins.cover(far.data_ptr())
                copies = partial(pool.fill if verb == "load" else pool.drain, order, far.numpy(), order[::-1].copy())
                copies()
                yield against(
                    plain, f"{verb} {name} blocks, {kind}", total, median(waited(copies) for _ in range(REPEATS)), goal
                )


def waited(action: Callable[[], object]) -> float:
    """Seconds that the calling thread needs."""
    start = perf_counter()
    action()
    return perf_counter() - start


def copy_each(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """One asynchronous copy after another, to the first of each pair."""
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def checksums(machine: Machine, memory: Result) -> Iterator[Result]:
    """Digests of many blocks in one call."""
    for name, length, count in (("2 MiB", 2 << 20, 512), ("64 KiB", 64 << 10, 8192)):
        payloads = torch.zeros(machine.count(count), length, dtype=torch.uint8, device=machine.device)
        seconds = machine.seconds(partial(digest, payloads))
        yield against(memory, f"checksum of {name} blocks", payloads.numel(), seconds, 0.7)


def quantisation(machine: Machine, memory: Result) -> Iterator[Result]:
    """Packing and unpacking of 2 MiB blocks, by format."""
    blocks = torch.randn(machine.count(256), 2 * LAYERS, HEADS, TOKENS, DIM, device=machine.device).bfloat16()
    for format in FORMATS:
        packed = torch.zeros(len(blocks), format.packed_bytes(blocks.shape[1:]), dtype=torch.uint8, device=machine.device)
        total = blocks.numel() * 2 + packed.numel()
        seconds = machine.seconds(partial(quantize, blocks, packed, format))
        yield against(memory, f"quantise to {format.name}", total, seconds, 0.5)
        seconds = machine.seconds(partial(dequantize, packed, blocks, format))
        yield against(memory, f"dequantise from {format.name}", total, seconds, 0.5)


def decode(machine: Machine, memory: Result) -> Iterator[Result]:
    """One token of many sequences over their paged KV, one layer: ours, torch's over contiguous KV, and FlashInfer's."""
    for sequences, length in ((64, 4096), (1, 32768)):
        sequences, length = (machine.count(sequences), machine.count(length)) if machine.scale < 1 else (sequences, length)
        pages_each = -(-length // TOKENS)
        shape = sequences * pages_each, 2, HEADS, TOKENS, DIM
        kv = torch.randn(shape, device=machine.device).bfloat16()
        pages = Pages([kv[:, part] for part in (0, 1)])
        tables = torch.randperm(len(kv)).int().view(sequences, pages_each).to(machine.device)
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=machine.device)
        lengths = torch.full((sequences,), length, dtype=torch.int32, device=machine.device)
        query = torch.randn(sequences, HEADS * GROUP, DIM, device=machine.device).bfloat16()
        total, name = sequences * length * 2 * HEADS * DIM * 2, f"{sequences} x {length} tokens"
        seconds = machine.seconds(partial(attend, query, pages, 0, tables, starts, lengths, 1))
        yield against(memory, f"paged decode, {name}", total, seconds, 0.7)
        keys, values = torch.randn(2, sequences, HEADS, length, DIM, device=machine.device).bfloat16()
        contiguous = partial(scaled_dot_product_attention, query[:, :, None], keys, values, enable_gqa=True)
        seconds = machine.seconds(contiguous)
        yield against(memory, f"scaled_dot_product_attention, contiguous, {name}", total, seconds, None)
        if machine.device == "cuda" and (seconds := flashinfer_seconds(machine, query, kv, tables, lengths)):
            yield against(memory, f"FlashInfer, {name}", total, seconds, None)


def flashinfer_seconds(
    machine: Machine, query: torch.Tensor, kv: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor
) -> float:
    """What FlashInfer's paged decode takes; 0 where it cannot be imported."""
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except ImportError:
        return 0.0
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=machine.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    starts = torch.arange(len(tables) + 1, dtype=torch.int32, device=machine.device) * tables.shape[1]
    last = (lengths - 1) % TOKENS + 1
    wrapper.plan(
        starts, tables.flatten(), last, query.shape[1], HEADS, DIM, TOKENS, q_data_type=query.dtype, kv_data_type=kv.dtype
    )
    return machine.seconds(partial(wrapper.run, query, kv))

"""What copies and kernels do in a second, beside what the same GPU can do: each measurement has a baseline of the same bytes.

Bandwidth counts bytes read plus bytes written. Measurements take the device, so that tests run them, small, without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch

from tierd_kernels.checksum import digest
from tierd_kernels.pages import Pages, gather, scatter
from tierd_kernels.quantize import FORMATS, dequantize, quantize

REPEATS, WARM_UP = 20, 5
LAYERS, HEADS, TOKENS, DIM = 32, 8, 16, 128
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

"""Blocks between an engine's pages and tierd's memory, beside one plain copy of as much: by the client, and with a daemon.

Seconds are those of the thread that waits, from the call to the end of the last copy. Without a GPU pages are in host memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from threading import Event
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.measure import DIM, HEADS, LAYERS, REPEATS, TOKENS, Machine, Result, against
from tierd.bench.scratch import Daemon, scratch_daemon
from tierd.block import chain
from tierd.client import Client
from tierd.cuda import Device, DeviceArray
from tierd.layout import Layout
from tierd.tiers.kernels import DeviceDigests
from tierd_engine.device import DevicePages, device_pages, views_of

CASES = (("2 MiB", LAYERS, 128, 0.9), ("64 KiB", 1, 4096, 0.8))
"""Name, layers and number of blocks, and the share of a plain copy that is wanted."""
STAGED, STAGED_SHARE_MIN = "a tensor a layer and part", 0.8
"""Runs of 32 KiB, which go through a staging buffer on the GPU."""
SEGMENTS, SEGMENT_BYTES_MIN = 8, 16 << 20
CHAINS = 6
"""So many chains fit the tier; the older ones are evicted."""
DIGESTED_BYTES = 32 << 20
PIN_SECONDS_MAX, DEADLINE_SECONDS = 30.0, 20.0


def client_copies(machine: Machine) -> Iterator[Result]:
    """What the client's copies take by themselves, from and to registered memory. Only on a GPU: elsewhere there are none."""
    if machine.device != "cuda":
        return
    for name, layers, blocks, _ in CASES:
        whole = pages_of(machine, layers, blocks)
        far = host_memory(machine, whole)
        order = np.random.default_rng(1).permutation(len(far))
        for kind, pool in pools_of(machine, whole).items():
            pool.pins.cover(far.data_ptr())
            for verb, copy in (("load", pool.fill), ("store", pool.drain)):
                plain = plain_copy(machine, f"{verb} of {name} blocks", whole, far, verb)
                move = partial(copy, order, far.numpy(), order[::-1].copy())
                move()
                seconds = median(seconds_of(move) for _ in range(REPEATS))
                yield against(plain, f"{verb} {name} blocks without a daemon, {kind}", far.numel(), seconds, None)


def digests_by_driver(machine: Machine, memory: Result) -> Iterator[Result]:
    """Digests as the daemon has them of blocks that go straight: a batch in each call, which waits. Only on a GPU."""
    if machine.device != "cuda":
        return
    device = Device(torch.cuda.current_device())
    compute = DeviceDigests(device)
    batch = torch.zeros(DIGESTED_BYTES, dtype=torch.uint8, device=machine.device)
    for name, length in (("2 MiB", 2 << 20), ("64 KiB", 64 << 10)):
        rows = DeviceArray(device, batch.data_ptr(), len(batch) // length, length)
        payloads = [rows[at] for at in range(len(rows))]
        compute(payloads, length)
        seconds = median(seconds_of(partial(compute, payloads, length)) for _ in range(REPEATS))
        yield against(memory, f"digests of {len(rows)} {name} blocks by the driver, waited for", len(batch), seconds, None)


def through_daemon(
    machine: Machine, pools: Callable[[Machine, torch.Tensor], dict[str, Any]] | None = None
) -> Iterator[Result]:
    """Stores of new chains, which evict older ones, and loads of what was stored, through client and daemon.

    `pools` makes pools of pages, by default `pools_of`.
    """
    for name, layers, blocks, goal in CASES:
        whole = pages_of(machine, layers, blocks)
        far = host_memory(machine, whole)
        layout = Layout(layers=layers, kv_heads=HEADS, head_dim=DIM, block_tokens=TOKENS, dtype="bfloat16")
        plain = {verb: plain_copy(machine, f"{verb} of {name} blocks", whole, far, verb) for verb in ("store", "load")}
        yield from plain.values()
        repeats = REPEATS if machine.device == "cuda" else 1
        for kind, pool in (pools or pools_of)(machine, whole).items():
            with (
                serving(CHAINS * far.numel()) as daemon,
                Client(daemon.socket, model="bench", layout=layout, deadline_seconds=DEADLINE_SECONDS) as client,
            ):
                if isinstance(pool, DevicePages):
                    client.pin(pool.pins)
                chains = Chains(client, pool, np.random.default_rng(1).permutation(len(far)))
                chains.fill(daemon)
                for verb in ("store", "load"):
                    seconds = median(chains.seconds(verb) for _ in range(repeats))
                    wanted = STAGED_SHARE_MIN if kind == STAGED else goal
                    title = f"{verb} {name} blocks through client and daemon, {kind}"
                    yield against(plain[verb], title, far.numel(), seconds, wanted)


class Chains:
    """Chains of blocks that are stored from `pages` of a pool, and loaded to them, a whole chain in each call."""

    def __init__(self, client: Client, pool: Any, pages: np.ndarray) -> None:
        self.bytes = len(pages) * client.layout.block_bytes
        self._client, self._pool, self._pages = client, pool, pages
        self._firsts = count(step=len(pages))
        self._names = b""

    def seconds(self, verb: str) -> float:
        """How long it takes to "store" a new chain, or to "load" the one that was stored last; its hashes are there before.

        Raises RuntimeError where not every block is moved.
        """
        if verb == "store":
            first, blocks = next(self._firsts), len(self._pages)
            self._names = chain(range(first, first + blocks), 1)
        return seconds_of(self._store if verb == "store" else self._load)

    def fill(self, daemon: Daemon) -> None:
        """Store until the tier is full, so that every further store evicts, and every segment is registered."""
        for _ in range(daemon.status()["tiers"]["cpu"]["limit_bytes"] // self.bytes + 1):
            self.seconds("store")
        if isinstance(self._pool, DevicePages):
            wait_pinned(self._client)

    def _store(self) -> None:
        self._check(self._client.store(self._names, self._pool, self._pages).stored)

    def _load(self) -> None:
        self._check(self._client.load(self._names, self._pool, self._pages))

    def _check(self, done: int) -> None:
        if done != len(self._pages):
            raise RuntimeError(f"of {len(self._pages)} blocks {done} were moved: {self._client.statistics}")


@contextmanager
def serving(cpu_bytes: int) -> Iterator[Daemon]:
    """A daemon with a cpu tier of about that size, in a temporary directory."""
    segment = max(SEGMENT_BYTES_MIN, cpu_bytes // SEGMENTS)
    settings = {"cpu__bytes": SEGMENTS * segment, "cpu__segment_bytes": segment, "nvme__bytes": 0}
    with scratch_daemon(Path(tempfile.gettempdir()), **settings) as daemon:
        yield daemon


def wait_pinned(client: Client) -> None:
    """Wait until a full tier is registered, or refused; raises RuntimeError if it is not in time."""
    deadline, never = perf_counter() + PIN_SECONDS_MAX, Event()
    while client.statistics["segments_pinned"] + client.statistics["pins_refused"] < SEGMENTS:
        if perf_counter() > deadline:
            raise RuntimeError(f"segments are still not registered after {PIN_SECONDS_MAX:g} s: {client.statistics}")
        never.wait(0.01)


def pages_of(machine: Machine, layers: int, blocks: int) -> torch.Tensor:
    """An engine's pages, `[page, layer, K/V, head, token, dim]`."""
    shape = machine.count(blocks), layers, 2, HEADS, TOKENS, DIM
    return torch.zeros(shape, dtype=torch.bfloat16, device=machine.device)


def host_memory(machine: Machine, whole: torch.Tensor) -> torch.Tensor:
    """As much host memory as these pages have, uint8 `[page, bytes]`; registered where there is a GPU."""
    return torch.zeros(len(whole), whole[0].numel() * 2, dtype=torch.uint8, pin_memory=machine.device == "cuda")


def pools_of(machine: Machine, whole: torch.Tensor) -> dict[str, Any]:
    """Pages as pools of tierd's client, by what a block is made of."""
    if machine.device != "cuda":
        return {"one run": whole.view(len(whole), -1).view(torch.uint8).numpy()}
    staged = {STAGED: device_pages([view.clone() for view in views_of(whole)])} if whole.shape[1] > 1 else {}
    return {"one run": device_pages(views_of(whole)), **staged}


def plain_copy(machine: Machine, what: str, whole: torch.Tensor, far: torch.Tensor, verb: str) -> Result:
    """One copy of all bytes in the direction of a verb."""
    near = whole.view(len(whole), -1).view(torch.uint8)
    target, source = (near, far) if verb == "load" else (far, near)
    return Result(f"plain copy for a {what}", far.numel(), machine.seconds(partial(target.copy_, source, non_blocking=True)))


def seconds_of(action: Callable[[], object]) -> float:
    """Seconds that the calling thread needs."""
    start = perf_counter()
    action()
    return perf_counter() - start

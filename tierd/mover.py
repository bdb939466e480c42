"""Moves blocks between tiers, in worker threads: demand loads before prefetches before write-back.

A transfer that somebody waits for is cut into parts, one list of blocks per thread, so that every thread keeps the
medium busy with one list and nobody pays for a future per block; a write-back is one part, since others go on beside
it. Who copies: between memory and file whoever `Paths` chooses; between two tiers in host memory the io threads, by
`np.copyto`; between host memory and a GPU its copy engines. All of them release the GIL.
A transfer that was submitted always ends in `Space.finish`, whatever happens to those who wait for it.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from tierd import clock
from tierd.core.plan import IO_ERROR, MISMATCH, OK, REASONS, WRITE_BACK, Transfer
from tierd.cuda import DeviceArray
from tierd.log import get_logger
from tierd.space import Arena, Space
from tierd.tiers.nvme import READ_DAMAGED, READ_FAILED, READ_OK
from tierd.tiers.paths import download, upload
from tierd.tiers.segment import Medium
from tierd.tiers.tier import NvmeTier

log = get_logger("mover")
Slots = NDArray[np.int32]
Payload = NDArray[np.uint8]
OUTCOME = np.zeros(3, np.uint8)
OUTCOME[[READ_OK, READ_FAILED, READ_DAMAGED]] = OK, IO_ERROR, MISMATCH


class Mover:
    """Owns the io threads and the queue of parts. `finished` is called on the loop after each transfer."""

    def __init__(self, threads: int, finished: Callable[[Space, Transfer], None]) -> None:
        self.threads = threads
        self.in_flight: Counter[str] = Counter()
        """Transfers by reason."""
        self.moved: Counter[tuple[str, str, str]] = Counter()
        """Bytes by (reason, source, target)."""
        self.seconds: defaultdict[tuple[str, str, str], float] = defaultdict(float)
        """Busy thread seconds, likewise."""
        self._finished = finished
        self._progress = clock.monotonic_seconds()
        """When a part last ended, or could first be expected to."""
        self._pool = ThreadPoolExecutor(threads, "tierd-io")
        self._free = threads
        self._queue: list[tuple[int, int, _Job, NDArray[np.intp]]] = []
        self._order = count()
        self._lock = Lock()
        """Around the queue, which the threads take from."""
        self._workers: set[asyncio.Future[None]] = set()

    @property
    def queued(self) -> int:
        """Parts that wait for a thread."""
        return len(self._queue)

    def stuck_seconds(self) -> float:
        """How long no part of a transfer has ended although there are transfers; 0 when there are none."""
        return clock.monotonic_seconds() - self._progress if any(self.in_flight.values()) else 0.0

    def submit(self, space: Space, transfer: Transfer) -> None:
        """Start a transfer; on the loop only."""
        if not any(self.in_flight.values()):
            self._progress = clock.monotonic_seconds()
        self.in_flight[transfer.reason] += 1
        job = _Job(space, transfer)
        cuts = 1 if transfer.reason == WRITE_BACK else min(self.threads, len(transfer))
        parts = np.array_split(np.arange(len(transfer)), cuts)
        job.parts = len(parts)
        with self._lock:
            for part in parts:
                heapq.heappush(self._queue, (REASONS.index(transfer.reason), next(self._order), job, part))
        self._start()

    def hasten(self, transfer: Transfer) -> None:
        """Somebody waits for a transfer that was submitted as less urgent; on the loop only."""
        with self._lock:
            self._queue = [(0, *part[1:]) if part[2].transfer is transfer else part for part in self._queue]
            heapq.heapify(self._queue)

    async def close(self) -> None:
        """Wait for what is under way: a started part cannot be stopped. What is queued is forgotten, as by a crash."""
        with self._lock:
            self._queue.clear()
        while self._workers:
            await asyncio.wait(self._workers)
        self._pool.shutdown()

    def _start(self) -> None:
        """Set free threads to work."""
        loop = asyncio.get_running_loop()
        for _ in range(min(self._free, len(self._queue))):
            self._free -= 1
            worker = asyncio.ensure_future(self._attend(loop.run_in_executor(self._pool, self._work, loop)))
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    async def _attend(self, work: asyncio.Future[None]) -> None:
        await work
        self._free += 1
        self._start()  # for what was queued while it ended

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Move parts as long as there are any, the most urgent first; in a worker thread, which waits for nobody."""
        while (queued := self._next()) is not None:
            job, part = queued
            started = clock.monotonic_seconds()
            try:
                outcome = job.run(part)
            except OSError as error:  # a GPU that does not copy: its blocks are misses
                log.error("transfer failed", transfer=job.transfer.id, reason=job.transfer.reason, error=str(error))
                outcome = np.full(len(part), IO_ERROR, np.uint8)
            except Exception:
                log.exception("transfer failed", transfer=job.transfer.id, reason=job.transfer.reason)
                outcome = np.full(len(part), IO_ERROR, np.uint8)
            loop.call_soon_threadsafe(self._end, job, part, outcome, clock.monotonic_seconds() - started)

    def _next(self) -> tuple[_Job, NDArray[np.intp]] | None:
        with self._lock:
            return heapq.heappop(self._queue)[2:] if self._queue else None

    def _end(self, job: _Job, part: NDArray[np.intp], outcome: NDArray[np.uint8], seconds: float) -> None:
        transfer = job.transfer
        self._progress = clock.monotonic_seconds()
        way = transfer.reason, transfer.source, transfer.target
        self.seconds[way] += seconds
        job.outcome[part] = outcome
        job.parts -= 1
        self.moved[way] += int((outcome == OK).sum()) * job.space.namespace.layout.block_bytes
        if not job.parts:
            self.in_flight[transfer.reason] -= 1
            job.space.finish(transfer, job.outcome, clock.unix_milliseconds())
            self._finished(job.space, transfer)


class _Job:
    """A transfer under way."""

    def __init__(self, space: Space, transfer: Transfer) -> None:
        self.space, self.transfer = space, transfer
        self.outcome = np.full(len(transfer), IO_ERROR, np.uint8)
        self.parts = 0

    def __lt__(self, other: _Job) -> bool:
        return False

    def run(self, part: NDArray[np.intp]) -> NDArray[np.uint8]:
        """Move some of the blocks; in a worker thread."""
        transfer = self.transfer
        source, target = self.space.arena(transfer.source), self.space.arena(transfer.target)
        sources, targets = transfer.source_slots[part], transfer.target_slots[part]
        match source.tier.medium, target.tier.medium:
            case _, Medium.FILE:
                hashes, parents = _pick(transfer.hashes, part), _pick(transfer.parents, part)
                return _write(target, targets, source.payloads(sources), hashes, parents)
            case Medium.FILE, _:
                return _read(source, sources, target.payloads(targets))
            case Medium.DEVICE, Medium.MEMORY:
                download(target.payloads(targets), source.payloads(sources))
            case Medium.DEVICE, Medium.DEVICE:
                _bounce(source.payloads(sources), target.payloads(targets))
            case Medium.MEMORY, Medium.DEVICE:
                upload(target.payloads(targets), source.payloads(sources))
            case _:
                _copy(source.payloads(sources), target.payloads(targets))
        return np.full(len(part), OK, np.uint8)


def _write(arena: Arena, slots: Slots, payloads: list[Payload], hashes: bytes, parents: bytes) -> NDArray[np.uint8]:
    assert isinstance(arena.tier, NvmeTier), f"{arena.tier} has no files"
    outcome = np.full(len(slots), IO_ERROR, np.uint8)
    for ordinal, local, where in arena.pool.by_segment(slots):
        chosen = np.arange(len(slots))[where]
        memory = [payloads[at] for at in chosen.tolist()]
        names = _pick(hashes, chosen), _pick(parents, chosen)
        written = arena.tier.paths.write(arena.segments[ordinal], local, memory, *names)
        outcome[chosen] = np.where(written, OK, IO_ERROR)
    return outcome


def _read(arena: Arena, slots: Slots, payloads: list[Payload]) -> NDArray[np.uint8]:
    assert isinstance(arena.tier, NvmeTier), f"{arena.tier} has no files"
    outcome = np.full(len(slots), IO_ERROR, np.uint8)
    for ordinal, local, where in arena.pool.by_segment(slots):
        chosen = np.arange(len(slots))[where]
        memory = [payloads[at] for at in chosen.tolist()]
        outcome[chosen] = OUTCOME[arena.tier.paths.read(arena.segments[ordinal], local, memory)]
    return outcome


def _bounce(sources: list[DeviceArray], targets: list[DeviceArray]) -> None:
    """From one GPU to another, block by block through host memory: what cpu has too does not come this way."""
    staged = np.empty(len(sources[0]), np.uint8)
    for source, target in zip(sources, targets, strict=True):
        download([staged], [source])
        upload([target], [staged])


def _copy(sources: list[Payload], targets: list[Payload]) -> None:
    for source, target in zip(sources, targets, strict=True):
        np.copyto(target, source)


def _pick(hashes: bytes, positions: NDArray[np.intp]) -> bytes:
    return np.frombuffer(hashes, "V32")[positions].tobytes()

"""The workers' side: copies between vLLM's pages and tierd, on threads of its own or, where asked to, within the step."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING

from tierd.client import Client, Stored
from tierd_engine.connectors.failures import said_not_raised
from tierd_engine.connectors.vllm.api import init_logger
from tierd_engine.connectors.vllm.messages import Done, Run, Work
from tierd_engine.connectors.vllm.options import Options
from tierd_engine.connectors.vllm.pages import LayerPages
from tierd_engine.connectors.vllm.stats import TierdStats

if TYPE_CHECKING:
    from tierd_engine.device import DevicePages

    Pages = LayerPages | DevicePages

log = init_logger(f"vllm.{__name__}")


@dataclass
class Outcome:
    """What has ended since the last look, taken at once: no request is said to be loaded before its failures are."""

    done: Done = field(default_factory=Done)
    loaded: set[str] = field(default_factory=set)
    bad_pages: set[int] = field(default_factory=set)
    stats: TierdStats = field(default_factory=TierdStats)


class WorkerSide:
    """Owns the client. Loads run in parallel; saves one after the other, because a block is stored after its parent.

    A step's copies wait for what the engine's stream has been given before them: what is saved has been computed then, and
    nobody uses any more what a load overwrites. The threads that copy wait; the engine does not.
    """

    def __init__(self, client: Client, options: Options) -> None:
        self.client, self.options = client, options
        self.pool: Pages | None = None
        self._loaders = ThreadPoolExecutor(options.load_threads, "tierd-load", initializer=copy_alone)
        self._saver = ThreadPoolExecutor(1, "tierd-save", initializer=copy_alone)
        self._ended: SimpleQueue[tuple[Run, str, dict[str, int], float]] = SimpleQueue()
        self._failures = -1
        """Work that the scheduler planned when it knew of no more failed loads than these rests on pages never filled."""
        self.outcome = Outcome()

    def use(self, pool: Pages) -> None:
        """Copy from and to these pages from now on, with tierd's segments registered for it where they are a GPU's."""
        self.pool = pool
        if pool.pins:
            self.client.pin(pool.pins)

    def load(self, work: Work) -> None:
        """Begin this step's loads, or make them."""
        pool = self._now(work.loads)
        for run in work.loads:
            if self.options.load == "sync":
                self._load(run, pool, work.failures)
            else:
                self._loaders.submit(self._load, run, pool)

    def save(self, work: Work) -> None:
        """Begin this step's saves, or make them; the step has computed what is in the pages, or its stream will."""
        pool = self._now(work.saves)
        for run in work.saves:
            if work.failures <= self._failures:
                self._ended.put((run, "saves", {"skipped": len(run.pages)}, 0.0))
            elif self.options.save == "sync":
                self._save(run, pool)
            else:
                self._saver.submit(self._save, run, pool)

    def take(self) -> Outcome:
        """What has ended since the last call."""
        self.outcome = outcome = Outcome()
        block_bytes = self.pool.block_bytes if self.pool else 0
        while True:
            try:
                run, what, blocks, seconds = self._ended.get_nowait()
            except Empty:
                return outcome
            outcome.stats.count(f"{what[:-1]}_seconds", seconds)
            for result, count in blocks.items():
                outcome.stats.count(f"{what[:-1]}_blocks", count, result)
                if result in ("loaded", "stored"):
                    outcome.stats.count("copied_bytes", count * block_bytes, result)
            if what == "saves":
                outcome.done.saves[run.number] = blocks.get("stored", 0) + blocks.get("present", 0), 1
                continue
            arrived = blocks["loaded"]
            outcome.done.loads[run.number] = arrived, 1
            outcome.bad_pages.update(run.pages[arrived:].tolist())
            if self.options.load == "async":
                outcome.loaded.add(run.request_id)

    def close(self) -> None:
        """Wait for what is under way, which no daemon can make longer than the deadline, and end the session."""
        self._loaders.shutdown(cancel_futures=True)
        self._saver.shutdown(cancel_futures=True)
        self.client.close()

    def _now(self, runs: list[Run]) -> Pages | None:
        """The pages of these runs behind all that the engine has asked for until now. To be called by its thread."""
        return self.pool.now() if self.pool and runs else None

    def _load(self, run: Run, pool: Pages | None, failures: int | None = None) -> None:
        began, arrived = perf_counter(), 0
        with said_not_raised(log, "load"):
            assert pool is not None, "vLLM loads before it registered its pages"
            arrived = self.client.load(run.hashes, pool, run.pages, run.parent)
        if arrived < len(run.pages) and failures is not None:
            self._failures = failures
        counts = {"loaded": arrived, "failed": len(run.pages) - arrived}
        self._ended.put((run, "loads", counts, perf_counter() - began))

    def _save(self, run: Run, pool: Pages | None) -> None:
        began, stored = perf_counter(), Stored(refused=len(run.pages))
        with said_not_raised(log, "save"):
            assert pool is not None, "vLLM saves before it registered its pages"
            stored = self.client.store(run.hashes, pool, run.pages, run.parent)
        counts = {"stored": stored.stored, "present": stored.present, "refused": stored.refused}
        self._ended.put((run, "saves", counts, perf_counter() - began))


def copy_alone() -> None:
    """A thread that copies uses itself only, wherever there is a core to spare.

    vLLM binds its computing threads to cores, and torch would share each copy of some MiB among threads that wait for each
    other: with one core busy, a prefix of 93 MiB took 90 to 1,000 ms, and 20 to 50 ms by one thread. torch's own switch is
    the whole process's; OpenMP's is the calling thread's.
    """
    with suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    with suppress(AttributeError):  # torch without OpenMP
        ctypes.CDLL(None).omp_set_num_threads(1)

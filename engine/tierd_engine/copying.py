"""Private pages with a tierd client beside them: worker threads copy blocks from the daemon's memory and to it.

The engine's thread decides and keeps all accounts; workers only call the client, and put what became of it on a queue
that `poll` reads. A page stays in use until every copy from it or to it has ended, whoever has released it before.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as List
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

from tierd.block import HASH_BYTES, ROOT, split
from tierd.clock import monotonic_seconds
from tierd.layout import Layout
from tierd_engine.load import HOLE, Load, Speeds, Target, pieces
from tierd_engine.memory import NAMED, Commit, Lookup, PrivateMemory, Reservation
from tierd_engine.request import Hints

if TYPE_CHECKING:
    from tierd.client import Client
    from tierd_engine.device import DevicePages

LOAD_THREADS = 4
"""Most of what they do is to wait for the daemon."""
STORE_BLOCKS = 8
"""Blocks that fill during decode are stored that many at a time, or when their sequence ends."""
DRAIN_SECONDS_MAX = 30.0


class CopyingMemory(PrivateMemory):
    """PrivateMemory whose misses are looked up in tierd and whose new blocks are stored there.

    Owns the client. A block is copied once each way, with the GIL released; every failure of the daemon, and of a GPU's
    copy engines, is a miss.
    """

    def __init__(self, layout: Layout, pages: int, client: Client, device: str = "cpu") -> None:
        super().__init__(layout, pages, device)
        self.client = client
        self.copies: DevicePages | None = None
        """How blocks get to and from pages that are not in host memory."""
        if self.tensor.is_cuda:
            from tierd_engine.device import device_pages, views_of  # needs triton

            self.use(device_pages(views_of(self.tensor)))
        self.loading: Counter[bytes] = Counter()
        self._answers: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._changed = Event()
        self._loaders = ThreadPoolExecutor(LOAD_THREADS, "tierd-load")
        self._storer = ThreadPoolExecutor(1, "tierd-store")
        self._jobs = 0
        self._queue: deque[Load] = deque()
        self._storing = 0
        self._reserving: Reserving | None = None
        self._unstored: list[tuple[bytes, bytes, int]] = []
        self.speeds = Speeds()

    def use(self, copies: DevicePages) -> None:
        """Copy blocks that way from now on, with tierd's segments registered for it."""
        self.copies = copies
        self.client.pin(copies.pins)

    def lookup(self, hashes: bytes) -> Lookup:
        """What is in use just now and, asked of the daemon, what is in its tiers."""
        pages = self.live(hashes)
        load = Load(self, hashes, pages)
        self.hits["live"] += load.ready
        if not load.done:
            parent = hashes[(load.first - 1) * HASH_BYTES : load.first * HASH_BYTES] if load.first else ROOT
            self._submit(self._loaders, load.answered, self.client.lookup, hashes[load.first * HASH_BYTES :], parent)
        return load

    def reserve(self, count: int, urgent: bool = False) -> Reservation:
        """As many pages as are free, at most `count`; later, when stores will give back more."""
        reserving = Reserving(count)
        self._reserving = reserving
        self._reserve()
        return reserving

    def commit(self, pages: List[int], parents: bytes, hashes: bytes) -> Commit:
        """Name pages, and store what is new."""
        committed = super().commit(pages, parents, hashes)
        for code, page, parent, name in zip(committed.codes, pages, split(parents), split(hashes), strict=True):
            if code == NAMED:
                self.pool.share([page])
                self._unstored.append((parent, name, page))
        if len(self._unstored) >= STORE_BLOCKS:
            self._store()
        return committed

    def release(self, pages: List[int]) -> None:
        """End the caller's hold; what has not been stored yet is stored first."""
        if self._unstored and pages:
            self._store()
        super().release(pages)

    def ended(self, block: bytes, turn: str, hints: Hints) -> None:
        """Tell the daemon, behind what is stored before."""
        self._store()
        self._submit(self._storer, lambda _: None, hints.tell, self.client, block, turn)

    def poll(self) -> None:
        """Take what the workers did, and start the loads for which there are pages now."""
        self._changed.clear()
        while True:
            try:
                answer = self._answers.get_nowait()
            except Empty:
                break
            answer()
        self._reserve()
        if self._reserving is None:
            self._queue = deque(load for load in self._queue if not load.start())

    def wait(self, seconds: float) -> None:
        """Sleep until a worker has something to say."""
        self._changed.wait(seconds)

    def check(self) -> None:
        """As PrivateMemory, once the workers are idle."""
        self._drain()
        assert not self._jobs and not self.loading, f"{self._jobs} copies have not ended"
        super().check()

    def close(self) -> None:
        """Store what is left, end the workers, close the client."""
        self._drain()
        self._loaders.shutdown()
        self._storer.shutdown()
        self.client.close()

    # For loads.

    def live(self, hashes: bytes) -> list[int]:
        """The page of every block that is in use now, shared with the caller, and HOLE for the others."""
        found = map(self.blocks.get, split(hashes))
        pages = [HOLE if page is None else page for page in found]
        self.pool.share(page for page in pages if page != HOLE)
        return pages

    def enqueue(self, load: Load) -> None:
        """Call `load.start()` with every poll until it says that it needs no more."""
        self._queue.append(load)

    def copy(self, load: Load, found: Any, targets: list[Target]) -> None:
        """Have a worker copy blocks of what was found into pages, which are the copy's until it has ended."""
        self.loading.update(load.name(block) for block, _ in targets)
        copied = partial(self._copied, load, targets)
        self._submit(self._loaders, copied, self._copy, load, found, self._pages(), targets)

    def end_lease(self, found: Any) -> None:
        """Have a worker give back what was found and is not wanted: a full socket could keep us waiting."""
        self._submit(self._loaders, lambda _: None, found.release)

    def place(self, name: bytes, page: int) -> int:
        """A block has arrived in a page of ours: the page that has this block from now on, shared with the caller."""
        [code] = super().commit([page], ROOT, name).codes.tolist()
        if code == NAMED:
            return page
        self.pool.release([page])  # somebody computed the same meanwhile
        return int(code)

    # In workers.

    def _copy(self, load: Load, found: Any, pool: Any, targets: list[Target]) -> float:
        """Copy piece by piece, tell of each, and return the seconds that it took."""
        began = monotonic_seconds()
        with found:
            for piece in pieces(targets):
                if load.stopped:
                    break
                pages = [page for _, page in piece]
                good = found.copy_into(pool, pages, piece[0][0] - load.first, len(piece))
                self._answer(partial(load.arrived, targets, good))
                if good < len(piece):
                    break
        return monotonic_seconds() - began

    def _answer(self, answer: Callable[[], None]) -> None:
        self._answers.put(answer)
        self._changed.set()

    # In the engine's thread again.

    def _copied(self, load: Load, targets: list[Target], seconds: float) -> None:
        self.loading -= Counter(load.name(block) for block, _ in targets)
        load.ended(targets, seconds)

    def _pages(self) -> Any:
        """What the client copies from and to: pages whose users have computed all that they were asked to until now."""
        return self.copies.now() if self.copies else self.pool.bytes

    def _store(self) -> None:
        """Give the storer what was committed, as runs in which each block is the next one's parent."""
        runs: list[list[tuple[bytes, bytes, int]]] = []
        for block in self._unstored:
            if runs and runs[-1][-1][1] == block[0]:
                runs[-1].append(block)
            else:
                runs.append([block])
        self._unstored = []
        for run in runs:
            pages = [page for _, _, page in run]
            hashes = b"".join(name for _, name, _ in run)
            self._storing += 1
            stored = partial(self._stored, pages)
            self._submit(self._storer, stored, self.client.store, hashes, self._pages(), pages, run[0][0])

    def _reserve(self) -> None:
        reserving = self._reserving
        if reserving and (self.pool.free_count >= reserving.count or not self._storing):
            reserving.pages = self.pool.allocate(min(reserving.count, self.pool.free_count))
            reserving.done = True
            self._reserving = None

    def _stored(self, pages: list[int], _: Any) -> None:
        self._storing -= 1
        super().release(pages)

    def _drain(self) -> None:
        """Wait until the workers have nothing left to do."""
        deadline = monotonic_seconds() + DRAIN_SECONDS_MAX
        self._store()
        self.poll()
        while self._jobs and monotonic_seconds() < deadline:
            self.wait(0.1)
            self.poll()

    def _submit(self, workers: ThreadPoolExecutor, then: Callable[[Any], None], call: Callable[..., Any], *given: Any) -> None:
        """Have a worker make a call; `poll` passes what it returned to `then`."""
        self._jobs += 1
        workers.submit(call, *given).add_done_callback(lambda future: self._answer(partial(self._ended, then, future)))

    def _ended(self, then: Callable[[Any], None], future: Future[Any]) -> None:
        self._jobs -= 1
        then(future.result())


class Reserving:
    """Pages, once there are as many as asked or none to wait for. The scheduler asks for one reservation at a time."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.done = False
        self.pages: list[int] = []

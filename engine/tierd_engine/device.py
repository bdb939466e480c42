"""An engine's pages on a GPU as a pool of tierd's client: blocks go between them and mapped slots by copy engines.

Where a page is one contiguous run, each block is one DMA. Where it is not (a tensor a layer, tokens before heads), blocks
are gathered in a staging buffer on the GPU, which is contiguous, and go from there; loads take the same way back. All of it
is given to a stream by a worker, which then waits for its end, so that nothing is released or committed before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray

from tierd.client.pinned import Addresses, CopyEngines, NoCopy, Ticket
from tierd.client.pins import Pins
from tierd.errors import Invalid
from tierd_kernels.pages import Pages, gather, scatter

STAGING_BYTES = 32 << 20
"""Of each lane, taken when it is first needed; more blocks than fit go in turns, which the stream keeps apart."""
STAGED_ALIGNMENT = 256

Numbers = NDArray[np.int64]


class DevicePages:
    """A `tierd.client.transfer.Pool` of pages on a GPU, given as strided views, one per layer and part.

    streams: of loads and of stores, as the driver knows them (`torch.cuda.Stream.cuda_stream`). computing: the stream on which
    the engine computes just now. keeping: what must live as long as this. Copies are begun, and waited for, by the thread
    that calls; many may. Raises Invalid where the driver cannot use the GPU.
    """

    def __init__(
        self, pages: Pages, engines: CopyEngines, streams: Sequence[int], computing: Callable[[], int], keeping: object = None
    ) -> None:
        self.block_bytes = pages.block_bytes
        self.pins = Pins(engines)
        self._pages, self._engines, self._computing, self._keeping = pages, engines, computing, keeping
        self._loads, self._stores = (Lane(pages, stream) for stream in streams)
        self._after: Ticket | None = None
        self._broken: NoCopy | None = None
        size = pages.views[0].element_size()
        self._first, self._stride = pages.views[0].data_ptr(), pages.strides[0] * size
        self.contiguous = pages.strides[1:] == (pages.tokens * pages.dim, pages.dim) and all(
            view.data_ptr() == self._first + at * pages.heads * pages.tokens * pages.row_bytes
            for at, view in enumerate(pages.views)
        )

    def __len__(self) -> int:
        count: int = self._pages.count
        return count

    def __repr__(self) -> str:
        return f"<DevicePages {self._pages}, {'one run' if self.contiguous else 'staged'}>"

    def now(self) -> DevicePages:
        """The same pages as they are when all that the engine has given its stream is computed: what to copy from, or to.

        To be called by the engine's thread: it neither waits nor raises, the copies do.
        """
        later = copy(self)
        try:
            later._after = Ticket(self._engines, self._computing())
        except NoCopy as error:
            later._broken = error
        return later

    def fill(self, pages: Numbers, slots: NDArray[np.uint8], indexes: Numbers) -> None:
        """Copy slot `indexes[i]` to page `pages[i]`, for every i; has ended when it returns, and also when it raises NoCopy."""
        self.begin(pages, slots, indexes, loading=True).wait()

    def drain(self, pages: Numbers, slots: NDArray[np.uint8], indexes: Numbers) -> None:
        """Copy page `pages[i]` to slot `indexes[i]`, for every i; as `fill`."""
        self.begin(pages, slots, indexes, loading=False).wait()

    def begin(self, pages: Numbers, slots: NDArray[np.uint8], indexes: Numbers, loading: bool) -> Ticket:
        """Give a stream the copies; the ticket says when they have ended. Raises NoCopy, and then nothing is under way."""
        if self._broken:
            raise self._broken
        if self._after:
            self._after.wait()
        host = slots.ctypes.data + indexes.astype(np.uint64) * np.uint64(slots.strides[0])
        registered = self.pins.covers(slots.ctypes.data)
        lane = self._loads if loading else self._stores
        problem: NoCopy | RuntimeError | None = None
        with lane.lock:
            try:
                with self._engines:
                    if self.contiguous:
                        near = np.uint64(self._first) + pages.astype(np.uint64) * np.uint64(self._stride)
                        self._engines.copy(near, host, self.block_bytes, lane.stream, loading, registered)
                    else:
                        self._stage(lane, pages, host, loading, registered)
            except (NoCopy, RuntimeError) as error:
                problem = error
            ticket = Ticket(self._engines, lane.stream)
        if problem:
            ticket.wait()  # those before the one that failed are under way
            raise problem if isinstance(problem, NoCopy) else NoCopy(str(problem)) from problem
        return ticket

    def _stage(self, lane: Lane, pages: Numbers, host: Addresses, loading: bool, registered: bool) -> None:
        staging = lane.staging()
        rows = np.uint64(staging.data_ptr()) + np.arange(len(staging), dtype=np.uint64) * np.uint64(staging.stride(0))
        with lane.current():
            for at in range(0, len(pages), len(staging)):
                some = torch.from_numpy(pages[at : at + len(staging)]).to(staging.device)
                turn = torch.arange(len(some), device=staging.device)
                if not loading:
                    gather(self._pages, some, staging, turn)
                there = host[at : at + len(staging)]
                self._engines.copy(rows[: len(some)], there, self.block_bytes, lane.stream, loading, registered)
                if loading:
                    scatter(staging, turn, self._pages, some)


class Lane:
    """One direction: its stream, and a staging buffer that only work on this stream touches."""

    def __init__(self, pages: Pages, stream: int) -> None:
        self.stream = stream
        self.lock = Lock()
        """Held while copies are given to the stream, not while they run."""
        self._block_bytes, self._device = pages.block_bytes, pages.device
        self._staging: torch.Tensor | None = None

    def staging(self) -> torch.Tensor:
        """uint8 `[blocks, bytes]`, a block in each row."""
        if self._staging is None:
            row = -(-self._block_bytes // STAGED_ALIGNMENT) * STAGED_ALIGNMENT
            with self.current():
                self._staging = torch.empty((max(1, STAGING_BYTES // row), row), dtype=torch.uint8, device=self._device)
        return self._staging

    def current(self) -> AbstractContextManager[object]:
        """Kernels of this thread go to the lane's stream."""
        if self._device.type != "cuda":
            return nullcontext()
        context: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.ExternalStream(self.stream, self._device))
        return context


def views_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The views `[page, head, token, dim]` of an engine's own pages, `[page, layer, K/V, head, token, dim]`."""
    return [tensor[:, layer, part] for layer in range(tensor.shape[1]) for part in (0, 1)]


def device_pages(views: Sequence[torch.Tensor], parts: int = 2) -> DevicePages:
    """Pages on a GPU, of so many parts a layer, with two streams of their own.

    Raises Invalid when they do not go together, or the driver cannot use the GPU.
    """
    try:
        pages = Pages(views, parts)
    except ValueError as error:
        raise Invalid(str(error)) from error
    device = pages.device
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    return DevicePages(
        pages,
        CopyEngines(device.index or 0),
        [stream.cuda_stream for stream in streams],
        lambda: int(torch.cuda.current_stream(device).cuda_stream),
        keeping=streams,
    )

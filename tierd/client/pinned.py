"""Copies between host memory and a GPU by its copy engines.

Work is given to a stream of the caller's and goes on by itself; a `Ticket` is asked whether it has ended. No call here waits
for the GPU but `Ticket.wait`, which a worker calls, and a copy from or to memory that is not registered, for which the driver
may take its time in the calling thread.

Source: CUDA driver API, "Memory Management" (cuMemcpyBatchAsync: CUDA 12.8 on), "Event Management".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import byref, c_size_t, c_void_p
from threading import Event, Lock

import numpy as np
from numpy.typing import NDArray

from tierd.driver import NOT_READY, NOT_SUPPORTED, Context, CopyAttributes, ask, call, check, has
from tierd.errors import TierdError

WITHOUT_TIMING, IN_STREAM_ORDER, BESIDE_KERNELS = 2, 1, 1
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 20e-6, 1e-3
"""Between two looks at a ticket; each pause is twice the last."""

Addresses = NDArray[np.uint64]


class NoCopy(TierdError):
    """The driver refused a copy, or it failed: a miss. Nothing of it is under way any more."""

    code = "copy"


class CopyEngines(Context):
    """The copy engines of one GPU, by its number among those that this process sees."""

    def __init__(self, number: int) -> None:
        """Raises Invalid when there is no driver or no such GPU."""
        super().__init__(number)
        self._batch = True

    def copy(self, device: Addresses, host: Addresses, size: int, stream: int, to_device: bool, registered: bool) -> None:
        """Within `with`: give a stream one copy of `size` bytes for each pair of addresses, uint64 `[copies]`.

        All in one call where the driver can, the host memory is `registered` and the stream is not the default one. Raises
        NoCopy when the driver refuses one; those before it may be under way then.
        """
        targets, sources = (device, host) if to_device else (host, device)
        with refusals():
            if registered and stream and self._batch and len(host) > 1:
                self._batch = copy_batch(targets, sources, size, stream)
                if self._batch:
                    return
            name = "cuMemcpyHtoDAsync_v2" if to_device else "cuMemcpyDtoHAsync_v2"
            for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
                call(name, target, source, size, stream)


class Ticket:
    """Everything that a stream had been given when this was made. `done` never waits; threads may share it."""

    def __init__(self, context: Context, stream: int) -> None:
        """Raises NoCopy when the driver has no event; then everything has ended."""
        self._context = context
        self._lock = Lock()
        self._event: c_void_p | None = c_void_p()
        with refusals(), context:
            try:
                call("cuEventCreate", byref(self._event), WITHOUT_TIMING)
                call("cuEventRecord", self._event, stream)
            except OSError:
                call("cuStreamSynchronize", stream)
                raise

    def __del__(self) -> None:
        """Nobody asks any more: the driver keeps the event for as long as it needs it."""
        if self._event is not None:
            with suppress(OSError), self._context:
                call("cuEventDestroy_v2", self._event)

    @property
    def done(self) -> bool:
        """Whether all of it has ended; raises NoCopy when something failed, after which nothing of it is under way."""
        with self._lock:
            if self._event is None:
                return True
            with refusals(), self._context:
                code = ask("cuEventQuery", self._event)
                if code == NOT_READY:
                    return False
                event, self._event = self._event, None
                ask("cuEventDestroy_v2", event)
                check("cuEventQuery", code)
            return True

    def wait(self) -> None:
        """Look again and again until it is done, for a thread that has nothing else to do. There is no deadline: what a copy
        engine still works on must not be given back.
        """
        pause, never = PAUSE_SECONDS_MIN, Event()
        while not self.done:
            never.wait(pause)
            pause = min(2 * pause, PAUSE_SECONDS_MAX)


def copy_batch(targets: Addresses, sources: Addresses, size: int, stream: int) -> bool:
    """Copies of `size` bytes each in one call; False: this driver does not take batches, and has taken nothing."""
    sizes, first = np.full(len(targets), size, np.uint64), np.zeros(1, np.uint64)
    attributes = CopyAttributes(source_order=IN_STREAM_ORDER, flags=BESIDE_KERNELS)
    lists = (array.ctypes.data for array in (targets, sources, sizes))
    arguments = (*lists, len(sizes), byref(attributes), first.ctypes.data, 1, byref(c_size_t()), stream)
    code = ask("cuMemcpyBatchAsync", *arguments) if has("cuMemcpyBatchAsync") else NOT_SUPPORTED
    if code != NOT_SUPPORTED:
        check("cuMemcpyBatchAsync", code)
    return code != NOT_SUPPORTED


@contextmanager
def refusals() -> Iterator[None]:
    """What the driver refuses within raises NoCopy, with its words."""
    try:
        yield
    except OSError as error:
        raise NoCopy(error.strerror) from error

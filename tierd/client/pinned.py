"""Copies between host memory and a GPU by its copy engines: the few calls of the CUDA driver that they take.

Nothing is loaded before the first `Driver`. Work is given to a stream of the caller's and goes on by itself; a `Ticket` is
asked whether it has ended. No call here waits for the GPU but `Ticket.wait`, which a worker calls, and a copy from or to memory
that is not registered, for which the driver may take its time in the calling thread. The GIL is released in every call.

Source: CUDA driver API, "Memory Management" (cuMemcpyBatchAsync: CUDA 12.8 on), "Event Management", as in cuda.h of CUDA 12.8.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from functools import cache
from threading import Event, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.errors import Invalid, TierdError

LIBRARY = "libcuda.so.1"
NOT_READY, NOT_SUPPORTED = 600, 801
WITHOUT_TIMING, IN_STREAM_ORDER, BESIDE_KERNELS = 2, 1, 1
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 20e-6, 1e-3
"""Between two looks at a ticket; each pause is twice the last."""

Addresses = NDArray[np.uint64]


class Attributes(Structure):
    """CUmemcpyAttributes; the hints are for memory that is neither registered nor a device's."""

    _fields_ = (("source_order", c_int), ("source_hint", c_int * 2), ("target_hint", c_int * 2), ("flags", c_uint))


_CALLS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_ulonglong, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_ulonglong, c_size_t, c_void_p),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
}
_BATCH = (c_void_p, c_void_p, c_void_p, c_size_t, POINTER(Attributes), c_void_p, c_size_t, POINTER(c_size_t), c_void_p)


class NoCopy(TierdError):
    """The driver refused a copy, or it failed: a miss. Nothing of it is under way any more."""

    code = "copy"


class Driver:
    """One GPU, by its number among those that this process sees; its primary context, which torch uses too.

    A context is current only within `with driver`, so that the caller's own is never changed.
    """

    def __init__(self, device: int) -> None:
        """Raises Invalid when there is no driver or no such GPU."""
        self._context = c_void_p()
        self._batch = True
        try:
            self.call("cuInit", 0)
            self.call("cuDevicePrimaryCtxRetain", byref(self._context), device)
        except (NoCopy, OSError, AttributeError) as error:
            raise Invalid(f"cuda:{device} cannot be used: {error}") from error

    def __enter__(self) -> Driver:
        self.call("cuCtxPushCurrent_v2", self._context)
        return self

    def __exit__(self, *_: object) -> None:
        self.call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def register(self, address: int, size: int) -> None:
        """Lock host memory in place, so that copy engines reach it. Takes about a second for some GiB; raises NoCopy."""
        with self:
            self.call("cuMemHostRegister_v2", address, size, 0)

    def unregister(self, address: int) -> None:
        """End what `register` did; before the memory is unmapped."""
        with self:
            self.call("cuMemHostUnregister", address)

    def copy(self, device: Addresses, host: Addresses, size: int, stream: int, to_device: bool, registered: bool) -> None:
        """Within `with driver`: give a stream one copy of `size` bytes for each pair of addresses, uint64 `[copies]`.

        All in one call where the driver can, the host memory is `registered` and the stream is not the default one. Raises
        NoCopy when the driver refuses one; those before it may be under way then.
        """
        if registered and stream and self._batch and len(host) > 1 and self._copy_batch(device, host, size, stream, to_device):
            return
        name = "cuMemcpyHtoDAsync_v2" if to_device else "cuMemcpyDtoHAsync_v2"
        pairs = (device, host) if to_device else (host, device)
        for target, source in zip(*(addresses.tolist() for addresses in pairs), strict=True):
            self.call(name, target, source, size, stream)

    def _copy_batch(self, device: Addresses, host: Addresses, size: int, stream: int, to_device: bool) -> bool:
        """False: this driver does not take batches, and has taken nothing."""
        if (batch := _batch()) is None:
            self._batch = False
            return False
        targets, sources = (device, host) if to_device else (host, device)
        sizes, first = np.full(len(host), size, np.uint64), np.zeros(1, np.uint64)
        attributes = Attributes(source_order=IN_STREAM_ORDER, flags=BESIDE_KERNELS)
        lists = (array.ctypes.data for array in (targets, sources, sizes))
        code = batch(*lists, len(host), byref(attributes), first.ctypes.data, 1, byref(c_size_t()), stream)
        if code == NOT_SUPPORTED:
            self._batch = False
            return False
        check("cuMemcpyBatchAsync", code)
        return True

    def call(self, name: str, *arguments: Any) -> None:
        """One call of the driver; raises NoCopy with its name and the driver's words."""
        check(name, getattr(_library(), name)(*arguments))


class Ticket:
    """Everything that a stream had been given when this was made. `done` never waits; threads may share it."""

    def __init__(self, driver: Driver, stream: int) -> None:
        """Raises NoCopy when the driver has no event; then everything has ended."""
        self._driver = driver
        self._lock = Lock()
        self._event: c_void_p | None = c_void_p()
        with driver:
            try:
                driver.call("cuEventCreate", byref(self._event), WITHOUT_TIMING)
                driver.call("cuEventRecord", self._event, stream)
            except NoCopy:
                driver.call("cuStreamSynchronize", stream)
                raise

    def __del__(self) -> None:
        """Nobody asks any more: the driver keeps the event for as long as it needs it."""
        if self._event is not None:
            with suppress(TierdError), self._driver:
                _library().cuEventDestroy_v2(self._event)

    @property
    def done(self) -> bool:
        """Whether all of it has ended; raises NoCopy when something failed, after which nothing of it is under way."""
        with self._lock:
            if self._event is None:
                return True
            with self._driver:
                code = _library().cuEventQuery(self._event)
                if code == NOT_READY:
                    return False
                event, self._event = self._event, None
                _library().cuEventDestroy_v2(event)
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


def check(name: str, code: int) -> None:
    """Raise NoCopy if a call of the driver says anything but success."""
    if code:
        word = c_char_p()
        _library().cuGetErrorName(code, byref(word))
        raise NoCopy(f"{name} says {(word.value or b'an unknown error').decode()} ({code})")


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(LIBRARY)
    for name, types in _CALLS.items():
        getattr(library, name).argtypes = types
    return library


@cache
def _batch() -> Any:
    """cuMemcpyBatchAsync as of CUDA 12.8, which later drivers still have under that name; None in earlier ones."""
    call = getattr(_library(), "cuMemcpyBatchAsync", None)
    if call is not None:
        call.argtypes = _BATCH
    return call

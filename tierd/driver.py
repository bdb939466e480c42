"""The CUDA driver by ctypes: one binding, for memory that processes share (`cuda`), for copies (`client.pinned`) and
for kernels that were compiled beforehand (`tiers.kernels`).

Nothing is loaded before the first `Context`. Then this process has the GPU's primary context, which torch and kvikio use too.
The rules of this file: a context is current only within `with context`, so that the caller's own is never changed, and every
call releases the GIL. A call that an older driver lacks is missed when it is made, not before.

Source: CUDA driver API as in cuda.h of CUDA 12.8. All calls are there from CUDA 11.4 on, but cuMemcpyBatchAsync.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_ushort, c_void_p
from functools import cache
from typing import Any, Self

from tierd.errors import Invalid

LIBRARY = "libcuda.so.1"
PORTABLE = 1
"""Registered for all contexts of this process, whichever GPU they are of."""
NOT_READY, NOT_SUPPORTED = 600, 801
"""Codes that are answers, and no failures: work is under way; this driver does not do that."""


class Location(Structure):
    """CUmemLocation."""

    _fields_ = (("type", c_int), ("id", c_int))


class AllocationFlags(Structure):
    """CUmemAllocationProp.allocFlags."""

    _fields_ = (("compression", c_ubyte), ("gpu_direct_rdma", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4))


class AllocationProperties(Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("flags", AllocationFlags),
    )


class Access(Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", c_int))


class CopyAttributes(Structure):
    """CUmemcpyAttributes; the hints are for memory that is neither registered nor a device's."""

    _fields_ = (("source_order", c_int), ("source_hint", Location), ("target_hint", Location), ("flags", c_uint))


DevicePointer, Handle, Flags = c_ulonglong, c_ulonglong, c_ulonglong
_Context, _Stream, _Event, _Module, _Function = c_void_p, c_void_p, c_void_p, c_void_p, c_void_p
_CALLS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (c_void_p, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(_Context), c_int),
    "cuCtxPushCurrent_v2": (_Context,),
    "cuCtxPopCurrent_v2": (POINTER(_Context),),
    "cuCtxSynchronize": (),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(AllocationProperties), c_int),
    "cuMemCreate": (POINTER(Handle), c_size_t, POINTER(AllocationProperties), Flags),
    "cuMemRelease": (Handle,),
    "cuMemExportToShareableHandle": (c_void_p, Handle, c_int, Flags),
    "cuMemImportFromShareableHandle": (POINTER(Handle), c_void_p, c_int),
    "cuMemAddressReserve": (POINTER(DevicePointer), c_size_t, c_size_t, DevicePointer, Flags),
    "cuMemAddressFree": (DevicePointer, c_size_t),
    "cuMemMap": (DevicePointer, c_size_t, c_size_t, Handle, Flags),
    "cuMemUnmap": (DevicePointer, c_size_t),
    "cuMemSetAccess": (DevicePointer, c_size_t, POINTER(Access), c_size_t),
    "cuMemGetAllocationPropertiesFromHandle": (POINTER(AllocationProperties), Handle),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(DevicePointer), c_size_t),
    "cuMemFree_v2": (DevicePointer,),
    "cuMemsetD8_v2": (DevicePointer, c_ubyte, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, DevicePointer, c_size_t),
    "cuMemcpyHtoD_v2": (DevicePointer, c_void_p, c_size_t),
    "cuMemcpyDtoHAsync_v2": (c_void_p, DevicePointer, c_size_t, _Stream),
    "cuMemcpyHtoDAsync_v2": (DevicePointer, c_void_p, c_size_t, _Stream),
    # As of CUDA 12.8; later drivers still have it under that name. Arrays: targets, sources, sizes.
    "cuMemcpyBatchAsync": (
        *(c_void_p, c_void_p, c_void_p, c_size_t),
        *(POINTER(CopyAttributes), c_void_p, c_size_t, POINTER(c_size_t), _Stream),
    ),
    "cuModuleLoadData": (POINTER(_Module), c_char_p),
    "cuModuleGetFunction": (POINTER(_Function), _Module, c_char_p),
    # Blocks of the grid, threads of a block, bytes of shared memory, stream; pointers to the values of the parameters.
    "cuLaunchKernel": (_Function, *(c_uint,) * 6, c_uint, _Stream, POINTER(c_void_p), c_void_p),
    "cuStreamSynchronize": (_Stream,),
    "cuEventCreate": (POINTER(_Event), c_uint),
    "cuEventRecord": (_Event, _Stream),
    "cuEventQuery": (_Event,),
    "cuEventDestroy_v2": (_Event,),
}


class Context:
    """The primary context of one GPU, by its number among those that this process sees."""

    def __init__(self, number: int) -> None:
        """Raises Invalid with the reason when there is no driver, or no such GPU."""
        self.number = number
        self._context = c_void_p()
        count = c_int()
        with needing(number):
            call("cuInit", 0)
            call("cuDeviceGetCount", byref(count))
            if number >= count.value:
                raise OSError(errno.ENODEV, f"this process sees {count.value} GPUs")
            call("cuDevicePrimaryCtxRetain", byref(self._context), number)

    def __enter__(self) -> Self:
        """Make the context current in this thread, above whatever was."""
        call("cuCtxPushCurrent_v2", self._context)
        return self

    def __exit__(self, *_: object) -> None:
        call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def register(self, address: int, size: int) -> None:
        """Lock host memory in place, so that copy engines of all GPUs reach it at full speed. Blocks while pages are locked,
        for about a second for some GiB; raises OSError.
        """
        with self:
            call("cuMemHostRegister_v2", address, size, PORTABLE)

    def unregister(self, address: int) -> None:
        """End what `register` did; before the memory is unmapped. Raises OSError."""
        with self:
            call("cuMemHostUnregister", address)


@contextmanager
def needing(number: int) -> Iterator[None]:
    """What fails within makes a GPU unusable: it raises Invalid with the reason."""
    try:
        yield
    except OSError as error:
        raise Invalid(f"cuda:{number} cannot be used: {error.strerror}") from error


def call(name: str, *arguments: Any) -> None:
    """One call of the driver; raises OSError with its name and the driver's words for anything but success."""
    check(name, ask(name, *arguments))


def ask(name: str, *arguments: Any) -> int:
    """One call whose code is an answer; raises OSError only when the driver cannot be loaded or has no such call."""
    code: int = _function(name)(*arguments)
    return code


def check(name: str, code: int) -> None:
    """Raise OSError if a call of that name did not succeed."""
    if code:
        word = c_char_p()
        ask("cuGetErrorName", code, byref(word))
        raise OSError(errno.EIO, f"{name} says {(word.value or b'an unknown error').decode()} ({code})")


def has(name: str) -> bool:
    """Whether this driver has such a call."""
    return hasattr(_library(), name)


@cache
def _function(name: str) -> Callable[..., int]:
    try:
        function: Any = getattr(_library(), name)
    except AttributeError as error:
        raise OSError(errno.ENOSYS, f"the NVIDIA driver has no {name}: install a newer one") from error
    function.argtypes = _CALLS[name]
    checked: Callable[..., int] = function
    return checked


@cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise OSError(errno.ENOSYS, f"the NVIDIA driver cannot be loaded ({error}): install it") from error

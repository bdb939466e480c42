"""Mapping descriptors by hand: where huge pages can serve them, and unmapped when we say so.

Python's mmap object takes no address, so that its mappings start anywhere and huge pages are of no use to them; and in a
forked child its destructor unmaps whatever is at an address that MADV_DONTFORK left empty.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

from tierd.layout import HUGE_PAGE_BYTES

POPULATE_WRITE, HUGEPAGE, COLLAPSE = 23, 14, 25
"""What `advise` can ask for and Python's mmap module has no names for: page tables for all of it, huge pages when memory
is touched, huge pages in place of what is there (Linux 5.14, 2.6.38 and 6.1)."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value
FIXED, NORESERVE = 0x10, 0x4000
"""Flags of mmap that Python has no names for."""


def map_shared(descriptor: int, size: int, writable: bool = True) -> int:
    """The address of a new shared mapping; from the size of a huge page on it is a multiple of one. Raises OSError."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    if size < HUGE_PAGE_BYTES:
        return map_at(0, size, protection, mmap.MAP_SHARED, descriptor)
    reserved = map_at(0, size + HUGE_PAGE_BYTES, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = address + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        map_at(address, size, protection, mmap.MAP_SHARED | FIXED, descriptor)
    except OSError:
        unmap(reserved, size + HUGE_PAGE_BYTES)
        raise
    for start, length in ((reserved, address - reserved), (end, reserved + size + HUGE_PAGE_BYTES - end)):
        if length:
            unmap(start, length)
    return address


def unmap(address: int, size: int) -> None:
    """Give a mapping up; nothing may use its memory any more."""
    _LIBC.munmap(address, size)


def advise(address: int, size: int, advice: int) -> int:
    """madvise, with the GIL released; returns 0 or the errno."""
    return 0 if _LIBC.madvise(address, size, advice) == 0 else ctypes.get_errno()


def view(address: int, size: int) -> memoryview:
    """The bytes of a mapping that outlives the view."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def shared_array(descriptor: int, size: int) -> NDArray[np.uint8]:
    """A writable shared mapping as uint8 `[size]`, unmapped when the last view of it is gone. Raises OSError."""
    address = map_shared(descriptor, size)
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, unmap, address, size).atexit = False
    return np.frombuffer(memoryview(memory), np.uint8)


def map_at(address: int, size: int, protection: int, flags: int, descriptor: int = -1) -> int:
    """mmap: the address of a new mapping, anywhere for 0, or at `address` with FIXED in `flags`. Raises OSError."""
    found = _LIBC.mmap(address, size, protection, flags, descriptor, 0)
    if found is None or found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)

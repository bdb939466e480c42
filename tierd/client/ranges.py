"""Ranges of addresses that are reserved once and filled in pieces, in host memory and in a GPU's.

A piece is shared memory that came as a descriptor, or memory of our own; what is neither cannot be touched. Offsets and lengths
are in bytes. Everything raises OSError when it cannot be done.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any, Protocol

import numpy as np

from tierd.client.mapping import MEDIUM_DEVICE, MEDIUM_MEMORY, check_descriptor
from tierd.cuda import Device, DeviceArray
from tierd.errors import Invalid
from tierd.layout import PAGE_BYTES
from tierd.memory import FIXED, NORESERVE, advise, map_at, unmap

PROT_NONE = 0
NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


class Range(Protocol):
    """A range of addresses. `unit` divides every offset and length; `medium` is what segments say that fit into it."""

    medium: int
    unit: int

    def check(self, descriptor: int, length: int) -> None:
        """Raise Invalid unless the descriptor is safe to map."""

    def map(self, offset: int, length: int, descriptor: int) -> None:
        """Put shared memory there; the descriptor stays the caller's."""

    def own(self, offset: int, length: int) -> None:
        """Put memory of this process there."""

    def clear(self, offset: int, length: int) -> None:
        """Take what `map` has put there."""

    def rows(self, count: int, row_bytes: int) -> Any:
        """All of it as uint8 `[count, row_bytes]`: a numpy array, or a DeviceArray on a GPU."""

    def close(self) -> None:
        """Give the whole range back, once; nobody may touch it any more."""


class HostRange:
    """Host memory: memfds, which forked children do not inherit."""

    medium, unit = MEDIUM_MEMORY, PAGE_BYTES

    def __init__(self, length: int) -> None:
        self._length = length
        self._base = self._map(0, length, PROT_NONE, NOTHING)

    def check(self, descriptor: int, length: int) -> None:
        """See Range: it must be sealed, since memory that shrinks is a SIGBUS."""
        check_descriptor("slots", descriptor, length)

    def map(self, offset: int, length: int, descriptor: int) -> None:
        """See Range."""
        self._map(self._base + offset, length, READ_WRITE, mmap.MAP_SHARED | FIXED, descriptor)

    def own(self, offset: int, length: int) -> None:
        """See Range."""
        self._map(self._base + offset, length, READ_WRITE, NOTHING | FIXED)

    def clear(self, offset: int, length: int) -> None:
        """See Range."""
        self._map(self._base + offset, length, PROT_NONE, NOTHING | FIXED)

    def rows(self, count: int, row_bytes: int) -> Any:
        """See Range."""
        memory = memoryview((ctypes.c_ubyte * self._length).from_address(self._base)).cast("B")
        return np.ndarray((count, row_bytes), np.uint8, memory)

    def close(self) -> None:
        """See Range."""
        length, self._length = self._length, 0
        if length:
            unmap(self._base, length)

    def _map(self, address: int, length: int, protection: int, flags: int, descriptor: int = -1) -> int:
        found = map_at(address, length, protection, flags, descriptor)
        advise(found, length, mmap.MADV_DONTFORK)
        return found


class DeviceRange:
    """Memory of one GPU. What is taken away is not touched any more: all work on the GPU is waited for first."""

    medium = MEDIUM_DEVICE

    def __init__(self, length: int, device: Device) -> None:
        self.unit = device.granularity
        self._device = device
        self._length = -(-length // self.unit) * self.unit
        self._base = device.reserve(self._length)
        self._pieces: set[tuple[int, int]] = set()

    def check(self, descriptor: int, length: int) -> None:
        """See Range: the driver refuses what is no exported memory, or less than is mapped."""
        if length % self.unit:
            raise Invalid(f"the daemon announced {length} bytes of slots, which are no whole units of {self.unit}")

    def map(self, offset: int, length: int, descriptor: int) -> None:
        """See Range."""
        self._device.map(self._base + offset, length, descriptor)
        self._pieces.add((offset, length))

    def own(self, offset: int, length: int) -> None:
        """See Range; rounded up to whole units."""
        length = -(-length // self.unit) * self.unit
        descriptor = self._device.create(length)
        try:
            self.map(offset, length, descriptor)
        finally:
            os.close(descriptor)

    def clear(self, offset: int, length: int) -> None:
        """See Range."""
        self._device.unmap(self._base + offset, length)
        self._pieces.discard((offset, length))

    def rows(self, count: int, row_bytes: int) -> Any:
        """See Range."""
        return DeviceArray(self._device, self._base, count, row_bytes)

    def close(self) -> None:
        """See Range."""
        for offset, length in list(self._pieces):
            self.clear(offset, length)
        length, self._length = self._length, 0
        if length:
            self._device.free(self._base, length)

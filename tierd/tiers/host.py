"""Memory segments: two memfds that clients map too, and that outlive the daemon where somebody keeps their descriptors.

Header and directory are one memfd, which clients get read-only, the slots another. Both are sealed against shrinking
and growing, since a mapping of a shrunk memfd is a SIGBUS, and have mode 0600, since a memfd's default would let
another user re-open a read-only descriptor for writing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tierd.errors import Busy, Invalid
from tierd.layout import Layout, Namespace
from tierd.tiers.directory import Directory
from tierd.tiers.segment import HEADER_BYTES, HUGE_PAGE_BYTES, Geometry, Header, Medium

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_THP_FOR_SHARED_MEMORY = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_HUGE_PAGES_CONFIGURED = [Path("/proc/sys/vm/nr_hugepages"), Path("/proc/sys/vm/nr_overcommit_hugepages")]
_LIBC = ctypes.CDLL(None, use_errno=True)


class HostSegment:
    """One segment in memory: `directory` and `slots` (uint8 `[slot_count, slot_bytes]`) are views on shared memory.

    `directory_fd` and `slots_fd` belong to the segment until `close`. `page_kind` says what its slots are made of:
    "hugetlb", "thp" (the kernel was asked for huge pages and may give them) or "4k".
    """

    def __init__(self, header: Header, directory_fd: int, slots_fd: int) -> None:
        shape = header.geometry
        self.header = header
        self.directory_fd, self.slots_fd = directory_fd, slots_fd
        self.kept_as = ""
        """The name under which a service manager keeps its descriptors, if it does."""
        self.directory = Directory(memoryview(_map(directory_fd, shape.directory_bytes)), header)
        mapping = np.frombuffer(_map(slots_fd, shape.slots_bytes), np.uint8)
        self.slots: NDArray[np.uint8] = mapping[: shape.slot_count * shape.slot_bytes].reshape(shape.slot_count, -1)
        self.page_kind = _page_kind(slots_fd, mapping)
        _advise(mapping, _MADV_POPULATE_WRITE)  # page tables for what is already in memory

    def __repr__(self) -> str:
        shape = self.header.geometry
        name = self.segment_id.hex()[:8]
        return f"<HostSegment {name}: {shape.slot_count} slots of {shape.slot_bytes}, {self.page_kind}>"

    @staticmethod
    def geometry(layout: Layout, segment_bytes: int, huge_pages: str = "auto") -> Geometry:
        """The geometry that `create` gives every segment of a layout; raises Invalid as it does.

        huge_pages is "off", "require" or "auto": from the kernel's pool where one is configured and a segment is at
        least 16 of its pages. Slots are rounded up to such pages, so the choice is made once and not by what is free
        right now.
        """
        pool = any(path.exists() and int(path.read_text()) > 0 for path in _HUGE_PAGES_CONFIGURED)
        if huge_pages == "require" and not pool:
            raise Invalid(
                "cpu.huge_pages is 'require', but the kernel's pool is empty: "
                f"set vm.nr_hugepages to the tier's size in pages of {HUGE_PAGE_BYTES} bytes, or use 'auto'"
            )
        huge = huge_pages == "require" or (huge_pages == "auto" and pool and segment_bytes >= 16 * HUGE_PAGE_BYTES)
        return Geometry.fit(layout, segment_bytes, HUGE_PAGE_BYTES) if huge else Geometry.fit(layout, segment_bytes)

    @classmethod
    def create(cls, namespace: Namespace, segment_bytes: int, epoch: int, huge_pages: str = "auto") -> HostSegment:
        """Make a new segment of at most `segment_bytes`, every page of it present.

        Blocks for as long as the kernel needs to zero the memory, with the GIL released: call it on a worker thread.
        Raises Invalid where no block fits or huge pages cannot be had, Busy where there is no memory.
        """
        shape = cls.geometry(namespace.layout, segment_bytes, huge_pages)
        header = Header.fresh(Medium.MEMORY, namespace, shape, epoch)
        name = f"tierd-{header.segment_id.hex()[:8]}"
        descriptors: list[int] = []
        try:
            descriptors.append(_memfd(f"{name}-directory", shape.directory_bytes, huge=False))
            os.pwrite(descriptors[0], header.pack(), 0)
            huge = shape.slots_page_bytes == HUGE_PAGE_BYTES
            descriptors.append(_prefaulted(f"{name}-slots", shape.slots_bytes, huge, strict=huge_pages == "require"))
            for descriptor in descriptors:
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            return cls(header, *descriptors)
        except OSError as error:
            _close_all(descriptors)
            raise Busy(f"no memory for a segment of {shape.total_bytes} bytes: {error}; lower the tier's bytes") from error

    @classmethod
    def adopt(cls, directory_fd: int, slots_fd: int) -> HostSegment:
        """Take over a segment that an earlier daemon made, as it is; the descriptors belong to the segment from then
        on.

        Raises Invalid with the reason when these two are not a whole segment; then they remain the caller's.
        """
        for name, descriptor in (("directory", directory_fd), ("slots", slots_fd)):
            if (seals := _seals(descriptor)) & SEALS != SEALS:
                raise Invalid(f"{name} descriptor has seals {seals:#x}, a segment's has {SEALS:#x}: not made by tierd")
        header = Header.unpack(os.pread(directory_fd, HEADER_BYTES, 0))
        if header.medium != Medium.MEMORY:
            raise Invalid(f"segment {header.segment_id.hex()} says it is a {header.medium.name.lower()}, not memory")
        shape = header.geometry
        for name, descriptor, expected in (
            ("directory", directory_fd, shape.directory_bytes),
            ("slots", slots_fd, shape.slots_bytes),
        ):
            if (size := os.fstat(descriptor).st_size) != expected:
                raise Invalid(f"{name} of segment {header.segment_id.hex()} has {size} bytes, its header says {expected}")
        try:
            return cls(header, directory_fd, slots_fd)
        except OSError as error:
            raise Invalid(f"segment {header.segment_id.hex()} cannot be mapped: {error}") from error

    @property
    def segment_id(self) -> bytes:
        """The segment's 16 random bytes."""
        return self.header.segment_id

    def readonly_directory_fd(self) -> int:
        """A new descriptor of the directory that cannot be used to write; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.directory_fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Give up descriptors and views. The memory is free when nobody else views, maps or keeps it."""
        del self.directory, self.slots
        _close_all([self.directory_fd, self.slots_fd])


def _memfd(name: str, size: int, huge: bool) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if huge else 0)
    descriptor = os.memfd_create(name, flags)
    try:
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _prefaulted(name: str, size: int, huge: bool, strict: bool) -> int:
    """A memfd with all its pages present; from the huge page pool where wanted, and then only there if `strict`."""
    try:
        descriptor = _memfd(name, size, huge)
    except OSError:
        if not huge or strict:
            raise
        return _prefaulted(name, size, huge=False, strict=False)
    try:
        _populate(descriptor, size)
    except OSError:
        os.close(descriptor)
        if not huge or strict:
            raise
        return _prefaulted(name, size, huge=False, strict=False)
    return descriptor


def _populate(descriptor: int, size: int) -> None:
    """Touch all pages through a mapping of our own. Called by ctypes, which releases the GIL; `mmap.madvise` does
    not."""
    mapping = np.frombuffer(_map(descriptor, size), np.uint8)
    _advise(mapping, _MADV_HUGEPAGE)
    if (code := _advise(mapping, _MADV_POPULATE_WRITE)) == errno.EINVAL:  # a kernel before 5.14
        os.posix_fallocate(descriptor, 0, size)
    elif code:
        raise OSError(code, os.strerror(code))


def _advise(mapping: NDArray[np.uint8], advice: int) -> int:
    """madvise; returns 0 or the errno."""
    address, length = ctypes.c_void_p(mapping.ctypes.data), ctypes.c_size_t(mapping.nbytes)
    return 0 if _LIBC.madvise(address, length, advice) == 0 else ctypes.get_errno()


def _map(descriptor: int, size: int) -> mmap.mmap:
    return mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def _seals(descriptor: int) -> int:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:  # not a memfd at all
        return 0


def _page_kind(descriptor: int, mapping: NDArray[np.uint8]) -> str:
    if os.fstat(descriptor).st_blksize == HUGE_PAGE_BYTES:
        return "hugetlb"
    allowed = _THP_FOR_SHARED_MEMORY.read_text() if _THP_FOR_SHARED_MEMORY.exists() else "[never]"
    refused = "[never]" in allowed or "[deny]" in allowed
    return "4k" if refused or _advise(mapping, _MADV_HUGEPAGE) else "thp"


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)

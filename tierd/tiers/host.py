"""Memory segments: two memfds that clients map too, and that outlive the daemon where somebody keeps their descriptors.

Header and directory are one memfd, which clients get read-only, the slots another. Both are sealed against shrinking
and growing, since a mapping of a shrunk memfd is a SIGBUS, and have mode 0600, since a memfd's default would let
another user re-open a read-only descriptor for writing.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tierd.errors import Busy, Invalid
from tierd.layout import HUGE_PAGE_BYTES, PAGE_BYTES, Layout, Namespace
from tierd.memory import COLLAPSE, HUGEPAGE, POPULATE_WRITE, advise, shared_array
from tierd.tiers.directory import Directory
from tierd.tiers.segment import HEADER_BYTES, Geometry, Header, Medium

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_HUGE_PAGES_CONFIGURED = [Path("/proc/sys/vm/nr_hugepages"), Path("/proc/sys/vm/nr_overcommit_hugepages")]


class HostSegment:
    """One segment in memory: `directory` and `slots` (uint8 `[slot_count, slot_bytes]`) are views on shared memory.

    `directory_fd` and `slots_fd` belong to the segment until `close`. `page_kind` says what its slots are made of:
    "hugetlb" (from the kernel's pool), "thp" (transparent huge pages), "4k", or "adopted": as an earlier daemon made it.
    """

    def __init__(self, header: Header, directory_fd: int, slots_fd: int, page_kind: str) -> None:
        shape = header.geometry
        self.header = header
        self.directory_fd, self.slots_fd, self.page_kind = directory_fd, slots_fd, page_kind
        self.kept_as = ""
        """The name under which a service manager keeps its descriptors, if it does."""
        self.shred = False
        """Whether its bytes are to be overwritten before they are given back."""
        self.directory = Directory(shared_array(directory_fd, shape.directory_bytes).data, header)
        mapping = shared_array(slots_fd, shape.slots_bytes)
        self.slots: NDArray[np.uint8] = mapping[: shape.slot_count * shape.slot_bytes].reshape(shape.slot_count, -1)
        _advise(mapping, POPULATE_WRITE)  # page tables for what is already in memory

    def __repr__(self) -> str:
        shape = self.header.geometry
        name = self.segment_id.hex()[:8]
        return f"<HostSegment {name}: {shape.slot_count} slots of {shape.slot_bytes}, {self.page_kind}>"

    @staticmethod
    def geometry(layout: Layout, segment_bytes: int, huge_pages: str = "auto") -> Geometry:
        """The geometry that `create` gives every segment of a layout; raises Invalid as it does.

        huge_pages is "off", "require" (the kernel's pool) or "auto": from the pool where one is configured and a
        segment is at least 16 of its pages, transparent ones otherwise. Slots are rounded up to pages of the pool, so
        the choice is made once and not by what is free right now.
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
            descriptors.append(make_directory(header))
            huge = shape.slots_page_bytes == HUGE_PAGE_BYTES
            slots_fd, page_kind = _prefaulted(f"{name}-slots", shape.slots_bytes, huge, huge_pages)
            descriptors.append(slots_fd)
            fcntl.fcntl(slots_fd, fcntl.F_ADD_SEALS, SEALS)
            return cls(header, descriptors[0], slots_fd, page_kind)
        except OSError as error:
            close_all(descriptors)
            raise Busy(f"no memory for a segment of {shape.total_bytes} bytes: {error}; lower the tier's bytes") from error

    @classmethod
    def adopt(cls, directory_fd: int, slots_fd: int) -> HostSegment:
        """Take over a segment that an earlier daemon made, as it is; the descriptors belong to the segment from then
        on.

        Raises Invalid with the reason when these two are not a whole segment; then they remain the caller's.
        """
        _check_seals("slots", slots_fd)
        header = read_directory(directory_fd, Medium.MEMORY)
        _check_size("slots", slots_fd, header, header.geometry.slots_bytes)
        try:
            return cls(header, directory_fd, slots_fd, "adopted")
        except OSError as error:
            raise Invalid(f"segment {header.segment_id.hex()} cannot be mapped: {error}") from error

    @property
    def segment_id(self) -> bytes:
        """The segment's 16 random bytes."""
        return self.header.segment_id

    def readonly_directory_fd(self) -> int:
        """A new descriptor of the directory that cannot be used to write; the caller closes it."""
        return open_readonly(self.directory_fd)

    def outdate(self, epoch: int) -> None:
        """Make all that it has stale to the next life; this one must have taken it out of the index."""
        os.pwrite(self.directory_fd, self.header.outdated(epoch), 0)

    def wipe(self) -> None:
        """Overwrite all blocks and their names."""
        self.slots[:] = 0
        self.directory.identity.view(np.uint8)[:] = 0

    def close(self) -> None:
        """Give up descriptors and views. The memory is free when nobody else views, maps or keeps it."""
        del self.directory, self.slots
        close_all([self.directory_fd, self.slots_fd])


def make_directory(header: Header) -> int:
    """A new sealed memfd with this header and an empty directory behind it. Raises OSError."""
    descriptor = _memfd(f"tierd-{header.segment_id.hex()[:8]}-directory", header.geometry.directory_bytes, huge=False)
    try:
        os.pwrite(descriptor, header.pack(), 0)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_directory(descriptor: int, medium: Medium) -> Header:
    """The header of a whole directory memfd of that medium; raises Invalid with the reason when it is something else."""
    _check_seals("directory", descriptor)
    header = Header.unpack(os.pread(descriptor, HEADER_BYTES, 0))
    if header.medium != medium:
        found, wanted = header.medium.name.lower(), medium.name.lower()
        raise Invalid(f"segment {header.segment_id.hex()} says it is of the medium {found}, not {wanted}")
    _check_size("directory", descriptor, header, header.geometry.directory_bytes)
    return header


def open_readonly(descriptor: int) -> int:
    """A new descriptor of a memfd that cannot be used to write; the caller closes it."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def close_all(descriptors: list[int]) -> None:
    """Close each."""
    for descriptor in descriptors:
        os.close(descriptor)


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


def _prefaulted(name: str, size: int, huge: bool, huge_pages: str) -> tuple[int, str]:
    """A memfd with all its pages present, and their kind: `huge` ones from the pool, else transparent ones where they
    can be had.

    Where the pool has not enough, ordinary memory is taken, unless the pool is required.
    """
    descriptor = -1
    try:
        descriptor = _memfd(name, size, huge)
        transparent = _populate(descriptor, size, transparent=not huge and huge_pages == "auto")
    except OSError:
        if descriptor >= 0:
            os.close(descriptor)
        if not huge or huge_pages == "require":
            raise
        return _prefaulted(name, size, False, huge_pages)
    return descriptor, "hugetlb" if huge else "thp" if transparent else "4k"


def _populate(descriptor: int, size: int, transparent: bool) -> bool:
    """Touch all pages, through a mapping of our own; returns whether they are transparent huge ones."""
    mapping = shared_array(descriptor, size)
    collapsed = transparent and size >= HUGE_PAGE_BYTES and _collapse(mapping)
    if (code := _advise(mapping, POPULATE_WRITE)) == errno.EINVAL:  # a kernel before 5.14
        os.posix_fallocate(descriptor, 0, size)
    elif code:
        raise OSError(code, os.strerror(code))
    return collapsed


def _collapse(mapping: NDArray[np.uint8]) -> bool:
    """Have the kernel use huge pages, whatever its settings for shared memory are: ten times as fast as touching every
    small one. False where it does not (Linux before 6.1, or memory is fragmented)."""
    _advise(mapping, HUGEPAGE)
    for start in range(0, len(mapping), HUGE_PAGE_BYTES):  # a huge page can take the place of a page, not of nothing
        _advise(mapping[start : start + PAGE_BYTES], POPULATE_WRITE)
    return not _advise(mapping, COLLAPSE)


def _advise(mapping: NDArray[np.uint8], advice: int) -> int:
    return advise(mapping.ctypes.data, mapping.nbytes, advice)


def _check_seals(name: str, descriptor: int) -> None:
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:  # not a memfd at all
        seals = 0
    if seals & SEALS != SEALS:
        raise Invalid(f"{name} descriptor has seals {seals:#x}, a segment's has {SEALS:#x}: not made by tierd")


def _check_size(name: str, descriptor: int, header: Header, expected: int) -> None:
    if (size := os.fstat(descriptor).st_size) != expected:
        raise Invalid(f"{name} of segment {header.segment_id.hex()} has {size} bytes, its header says {expected}")

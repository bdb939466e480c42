"""A segment in this process's memory: its state words to read, its slots to copy from and to.

A segment that somebody else can shrink is a SIGBUS, so the seals of both descriptors are checked; so is everything
else that an offset into the mapping rests on.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.errors import Invalid
from tierd.layout import PAGE_BYTES, Layout
from tierd.memory import advise, map_shared, unmap, view

HEADER = Struct("<8s2I16s32s16s4Q2I6Q")
CRC = Struct("<I")
CRC_OFFSET = PAGE_BYTES - CRC.size
MAGIC, VERSION = b"TIERDSEG", 1
MEDIUM_MEMORY, MEDIUM_DEVICE = 1, 3
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
STATE_BYTES = 8


class Mapping:
    """A mapped segment. `state` is uint64 `[slots]` and read-only, `slots` uint8 `[slots, slot_bytes]`.

    Both views die with `close`: whoever uses them counts in `users`, and `close` waits for nobody. `wanted` is False
    once the segment was given up.
    """

    def __init__(self, attached: dict[str, Any], directory_fd: int, slots_fd: int, layout: Layout) -> None:
        """Map what an `attach` names; raises Invalid when the descriptors are not that. They stay the caller's."""
        check_descriptor("directory", directory_fd, attached["directory_bytes"])
        check_descriptor("slots", slots_fd, attached["slots_bytes"])
        header = read_header(os.pread(directory_fd, PAGE_BYTES, 0))
        check_header(header, attached, layout)
        self.segment: bytes = header.segment
        self.namespace: bytes = header.namespace
        self.users = 0
        self.wanted = True
        self.unpin: Callable[[], None] | None = None
        """What has to be called before the slots are unmapped, because a driver knows them."""
        self._pid = os.getpid()
        self._areas: list[tuple[int, int]] = []
        try:
            directory = self._map(directory_fd, attached["directory_bytes"], writable=False)
            slots = self._map(slots_fd, attached["slots_bytes"], writable=True)
        except OSError as error:
            self.close()
            raise Invalid(f"segment {self.segment.hex()} cannot be mapped: {error}") from error
        self.state: NDArray[np.uint64] = np.ndarray(header.slot_count, "<u8", directory, header.state_offset)
        self.state.flags.writeable = False
        self.slots: NDArray[np.uint8] = np.ndarray((header.slot_count, header.slot_bytes), np.uint8, slots)

    def __repr__(self) -> str:
        return f"<Mapping {self.segment.hex()[:8]}: {self.users} users, {'wanted' if self.wanted else 'given up'}>"

    def close(self) -> None:
        """Unmap; nothing may use the views any more. In a forked child there is nothing to unmap."""
        assert self.users == 0, f"{self} is in use"
        if self.unpin and os.getpid() == self._pid:
            self.unpin()
        self.state, self.slots = np.empty(0, np.uint64), np.empty((0, 0), np.uint8)
        areas, self._areas = self._areas, []
        for address, length in areas if os.getpid() == self._pid else ():
            unmap(address, length)

    def _map(self, descriptor: int, length: int, writable: bool) -> memoryview:
        address = map_shared(descriptor, length, writable)
        self._areas.append((address, length))
        if code := advise(address, length, mmap.MADV_DONTFORK):
            raise OSError(code, os.strerror(code))
        return view(address, length)


@dataclass(frozen=True)
class Header:
    """The fields of a segment's header that a client depends on; `docs/segment-format.md` has all."""

    segment: bytes
    namespace: bytes
    fingerprint: bytes
    payload_bytes: int
    slot_bytes: int
    slot_count: int
    state_offset: int


def read_header(page: bytes, wanted: int = MEDIUM_MEMORY) -> Header:
    """Read the header of a segment of a medium; raises Invalid when it is damaged or something else."""
    if len(page) != PAGE_BYTES:
        raise Invalid(f"segment header has {len(page)} bytes, not {PAGE_BYTES}")
    magic, version, medium, segment, namespace, fingerprint, _, _, payload, slot, count, _, state, *_ = HEADER.unpack_from(page)
    if (magic, version, medium) != (expected := (MAGIC, VERSION, wanted)):
        raise Invalid(f"segment has magic, version and medium {(magic, version, medium)}, this client maps {expected}")
    if (crc := CRC.unpack_from(page, CRC_OFFSET)[0]) != (found := zlib.crc32(memoryview(page)[:CRC_OFFSET])):
        raise Invalid(f"segment header crc is {crc:#010x}, its bytes give {found:#010x}: damaged")
    return Header(segment, namespace, fingerprint, payload, slot, count, state)


def check_header(header: Header, attached: dict[str, Any], layout: Layout) -> None:
    """The header must agree with what the daemon announced and with the layout, and stay within both descriptors."""
    for what, found, expected in (
        ("segment id", header.segment, attached["segment"]),
        ("slot count", header.slot_count, attached["slots"]),
        ("slot bytes", header.slot_bytes, attached["slot_bytes"]),
        ("layout fingerprint", header.fingerprint, layout.fingerprint),
        ("payload bytes", header.payload_bytes, layout.block_bytes),
        ("slot bytes", header.slot_bytes, layout.slot_bytes),
    ):
        if found != expected:
            raise Invalid(f"segment {header.segment.hex()}: {what} is {found!r}, expected {expected!r}")
    state_end = header.state_offset + header.slot_count * STATE_BYTES
    if header.state_offset % PAGE_BYTES or state_end > attached["directory_bytes"]:
        raise Invalid(f"segment {header.segment.hex()}: states end at {state_end} of {attached['directory_bytes']} bytes")
    slots_end = header.slot_count * header.slot_bytes
    if slots_end > attached["slots_bytes"]:
        raise Invalid(f"segment {header.segment.hex()}: slots end at {slots_end} of {attached['slots_bytes']} bytes")


def check_descriptor(name: str, descriptor: int, size: int) -> None:
    """The descriptor must be a memfd of exactly this size that nobody can change."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise Invalid(f"{name} descriptor is no sealed memfd: {error}") from error
    if seals & SEALS != SEALS:
        raise Invalid(f"{name} descriptor has seals {seals:#x}, it needs {SEALS:#x} (shrink and grow)")
    if (found := os.fstat(descriptor).st_size) != size or not size:
        raise Invalid(f"{name} descriptor has {found} bytes, the daemon announced {size}")

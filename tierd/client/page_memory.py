"""The memory of a paged engine: one range of addresses, in which page number and slot number are the same.

The range is reserved once and never moves, in host memory or in a GPU's (`ranges`). A segment is mapped at the place of its
ordinal, so its slots are pages at once; a place without a segment cannot be touched (SIGSEGV). Behind all slots there are
private pages, which no daemon knows. A place is given up only when no page in it is held, whatever became of the daemon: until
then a new segment of the same ordinal waits for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd.client.mapping import check_descriptor, check_header, read_header
from tierd.client.ranges import DeviceRange, HostRange, Range
from tierd.cuda import Device
from tierd.errors import Busy, Invalid
from tierd.layout import PAGE_BYTES, Layout

Pages = NDArray[np.int32]


@dataclass
class Place:
    """A segment at its ordinal's place: the pages from `first` on."""

    segment: bytes
    namespace: bytes
    first: int
    count: int
    current: bool = True
    """Whether the daemon that we talk to gave it to us."""
    orphan: bool = False
    """Whether its pages are of a session that is gone: the engine's alone, until they are released."""

    @property
    def slots(self) -> slice:
        """Its pages."""
        return slice(self.first, self.first + self.count)


class PageMemory:
    """`pages` is uint8 `[pages_max + private_pages, slot_bytes]`; `held` counts (int32) how often each slot is held."""

    def __init__(self, layout: Layout, pages_max: int, private_pages: int, device: Device | None = None) -> None:
        self.layout, self.pages_max, self.device = layout, pages_max, device
        self.private = range(pages_max, pages_max + private_pages)
        self.held: NDArray[np.int32] = np.zeros(pages_max, np.int32)
        self.places: dict[int, Place] = {}
        self._waiting: dict[int, tuple[Place, int]] = {}
        """Segments whose place is not free yet, with the descriptor of their slots; by ordinal."""
        slot_bytes, count = layout.slot_bytes, pages_max + private_pages
        # A GPU rounds the private pages up to whole units, and they begin where the slots end.
        if device is not None and private_pages and pages_max * slot_bytes % device.granularity:
            unit = f"whole units of {device.granularity} bytes of GPU memory"
            raise Invalid(f"pages_max = {pages_max} slots of {slot_bytes} bytes do not fill {unit}: use a power of two")
        try:
            self._range: Range = DeviceRange(count * slot_bytes, device) if device else HostRange(count * slot_bytes)
            if private_pages:
                self._range.own(pages_max * slot_bytes, private_pages * slot_bytes)
        except OSError as error:
            raise Busy(f"{count * slot_bytes} bytes cannot be mapped: {error}") from error
        self.pages: Any = self._range.rows(count, slot_bytes)

    def attach(self, attached: dict[str, Any], directory_fd: int, slots_fd: int) -> None:
        """Take a segment that the daemon gives; the descriptors stay the caller's.

        Raises Invalid when it is not one, Busy when it cannot be mapped.
        """
        check_descriptor("directory", directory_fd, attached["directory_bytes"])
        header = read_header(os.pread(directory_fd, PAGE_BYTES, 0), self._range.medium)
        check_header(header, attached, self.layout)
        self._range.check(slots_fd, attached["slots_bytes"])
        ordinal, size = attached["ordinal"], attached["slots"] * attached["slot_bytes"]
        if attached["slots_bytes"] != size:
            raise Invalid(f"a segment of pages has {attached['slots_bytes']} bytes of slots, not {size}: without gaps")
        if (old := self._waiting.pop(ordinal, None)) is not None:
            os.close(old[1])
        place = self.places.get(ordinal)
        if place is not None and place.segment == header.segment and not place.orphan:
            place.current = True
        elif (ordinal + 1) * header.slot_count <= self.pages_max:  # what is beyond has no pages here
            new = Place(header.segment, header.namespace, ordinal * header.slot_count, header.slot_count)
            self._waiting[ordinal] = new, os.dup(slots_fd)
            if place is not None:
                place.current = False
            if trouble := self.settle():
                raise Busy(trouble)

    def settle(self) -> str:
        """Give up places that are neither current nor held, and map what waits for them.

        Returns what could not be mapped: its slots have no pages here, and go back when they are given.
        """
        trouble = ""
        for ordinal, place in list(self.places.items()):
            if not place.current and not self.held[place.slots].any():
                self._range.clear(*self._where(place))
                del self.places[ordinal]
        for ordinal, (place, descriptor) in list(self._waiting.items()):
            if ordinal not in self.places:
                try:
                    self._range.map(*self._where(place), descriptor)
                    self.places[ordinal] = place
                except OSError as error:
                    trouble = f"segment {place.segment.hex()} cannot be mapped: {error.strerror}"
                del self._waiting[ordinal]
                os.close(descriptor)
        return trouble

    def give_back(self, segments: set[bytes] | None = None) -> None:
        """These segments are the daemon's again, by default all; those with pages that are held stay mapped."""
        for place in self.places.values():
            place.current &= segments is not None and place.segment not in segments
        for ordinal, (place, descriptor) in list(self._waiting.items()):
            if segments is None or place.segment in segments:
                del self._waiting[ordinal]
                os.close(descriptor)
        self.settle()

    def orphan(self) -> None:
        """The session is gone: what is held is the engine's alone."""
        for place in self.places.values():
            place.orphan = True

    def check_namespace(self, namespace: bytes) -> None:
        """Raise Invalid if the daemon gave a segment of another namespace than this."""
        for place in self.places.values():
            if place.current and place.namespace != namespace:
                raise Invalid(f"segment {place.segment.hex()} is not of our namespace")

    def usable(self, slots: Pages) -> NDArray[np.bool_]:
        """Which slots that the daemon names are pages here."""
        good = np.zeros(len(slots), np.bool_)
        for place in self.places.values():
            if place.current:
                good |= (slots >= place.first) & (slots < place.first + place.count)
        return good

    def of_session(self, pages: Pages) -> Pages:
        """Those of these pages that the session holds: neither private nor orphans."""
        mine = np.zeros(len(pages), np.bool_)
        for place in self.places.values():
            if not place.orphan:
                mine |= (pages >= place.first) & (pages < place.first + place.count)
        return pages[mine]

    def records(self) -> list[tuple[bytes, int, int]]:
        """Segment, index and page of everything that the session holds, as often as it does."""
        found = []
        for place in self.places.values():
            if not place.orphan:
                pages = np.repeat(np.arange(place.first, place.first + place.count), self.held[place.slots]).tolist()
                found += [(place.segment, page - place.first, page) for page in pages]
        return found

    def close(self) -> None:
        """Give the whole range back; nobody may touch it any more."""
        self.give_back()
        self.pages = np.empty((0, 0), np.uint8)
        self._range.close()

    def _where(self, place: Place) -> tuple[int, int]:
        """Offset and length in the range."""
        return place.first * self.layout.slot_bytes, place.count * self.layout.slot_bytes

"""Segments of a GPU's memory: a directory memfd like any other, and slots that are an exported allocation.

Clients are given both descriptors and map the slots where they want them (`tierd.cuda`). The driver maps whole units of its
granularity (2 MiB on most GPUs), and pages lie side by side, so the slots fill the allocation exactly. Where somebody keeps the
descriptors, a later daemon imports the allocation again; where the driver refuses that, the segment is given up with its words.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from math import gcd

import numpy as np

from tierd.cuda import Device, DeviceArray
from tierd.errors import Busy, Invalid
from tierd.layout import Layout, Namespace
from tierd.memory import shared_array
from tierd.tiers.directory import Directory
from tierd.tiers.host import close_all, make_directory, open_readonly, read_directory
from tierd.tiers.segment import Geometry, Header, Medium


class DeviceSegment:
    """One segment on a GPU: `directory` is a view on shared memory, `slots` device memory, uint8 `[slot_count, slot_bytes]`.

    `directory_fd` and `slots_fd` belong to the segment until `close`.
    """

    page_kind = "device"

    def __init__(self, header: Header, directory_fd: int, slots_fd: int, device: Device, clear: bool = False) -> None:
        """Map both; raises OSError, and then the descriptors remain the caller's."""
        shape = header.geometry
        self.header, self.device = header, device
        self.directory_fd, self.slots_fd = directory_fd, slots_fd
        self.kept_as = ""
        """The name under which a service manager keeps its descriptors, if it does."""
        self.shred = False
        """Whether its bytes are to be overwritten before they are given back."""
        self.directory = Directory(shared_array(directory_fd, shape.directory_bytes).data, header)
        address = device.reserve(shape.slots_bytes)
        with ExitStack() as undo:
            undo.callback(device.free, address, shape.slots_bytes)
            device.map(address, shape.slots_bytes, slots_fd)
            undo.callback(device.unmap, address, shape.slots_bytes)
            if clear:
                device.clear(address, shape.slots_bytes)
            undo.pop_all()
        self.slots = DeviceArray(device, address, shape.slot_count, shape.slot_bytes)

    def __repr__(self) -> str:
        shape = self.header.geometry
        return f"<DeviceSegment {self.segment_id.hex()[:8]}: {shape.slot_count} slots of {shape.slot_bytes} on {self.device}>"

    @staticmethod
    def geometry(layout: Layout, segment_bytes: int, granularity: int) -> Geometry:
        """The geometry of every segment of a layout: as many slots as fit and fill whole units of `granularity` bytes.

        Raises Invalid where not even the least number of such slots fits.
        """
        step = granularity // gcd(granularity, layout.slot_bytes)
        needed = Geometry(step, layout.block_bytes).total_bytes
        if needed > segment_bytes:
            raise Invalid(
                f"a segment of {segment_bytes} bytes cannot hold {step} blocks of {layout.block_bytes} bytes, the least that "
                f"fill whole units of {granularity} bytes of GPU memory: raise gpu.segment_bytes to at least {needed}"
            )
        slot_count = Geometry.fit(layout, segment_bytes).slot_count // step * step
        return Geometry(slot_count, layout.block_bytes)

    @classmethod
    def create(cls, namespace: Namespace, segment_bytes: int, epoch: int, device: Device) -> DeviceSegment:
        """Make a new segment of at most `segment_bytes`, its slots zeroed: nobody reads what was there before.

        Raises Invalid where no block fits, Busy where the GPU has no memory.
        """
        shape = cls.geometry(namespace.layout, segment_bytes, device.granularity)
        header = Header.fresh(Medium.DEVICE, namespace, shape, epoch)
        descriptors: list[int] = []
        try:
            descriptors.append(make_directory(header))
            descriptors.append(device.create(shape.slots_bytes))
            return cls(header, descriptors[0], descriptors[1], device, clear=True)
        except OSError as error:
            close_all(descriptors)
            raise Busy(
                f"no GPU memory for a segment of {shape.slots_bytes} bytes: {error.strerror}; lower gpu.bytes"
            ) from error

    @classmethod
    def adopt(cls, directory_fd: int, slots_fd: int, device: Device) -> DeviceSegment:
        """Take over a segment that an earlier daemon made, as it is; the descriptors belong to the segment from then on.

        Raises Invalid with the reason when these two are not a whole segment, or the driver does not import its memory; then
        they remain the caller's.
        """
        header = read_directory(directory_fd, Medium.DEVICE)
        try:
            return cls(header, directory_fd, slots_fd, device)
        except OSError as error:
            name = header.segment_id.hex()
            raise Invalid(f"memory of segment {name} cannot be imported on cuda:{device.number}: {error.strerror}") from error

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
        self.device.clear(self.slots.address, self.header.geometry.slots_bytes)
        self.directory.identity.view(np.uint8)[:] = 0

    def close(self) -> None:
        """Give up descriptors and mappings. The memory is free when nobody else maps or keeps it."""
        address, size = self.slots.address, self.header.geometry.slots_bytes
        del self.directory, self.slots
        self.device.unmap(address, size)
        self.device.free(address, size)
        close_all([self.directory_fd, self.slots_fd])
